"""What a model is for a config and a schema: its inputs, its collator, its tables, and values the data set decides."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hstu.config import Config, ConfigError
from hstu.data.batch import POOL
from hstu.data.collate import Collator
from hstu.data.schema import Schema, unknown_id
from hstu.layers.memory import MemoryBlocks
from hstu.models.backbone import has_position_table
from hstu.models.embedding import Table, category_feature


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The features a model reads, and how long its sequences can be.

    Attributes:
        item: Item feature.
        action: Action feature that is an input, or None.
        contexts: Context features, in token order.
        max_tokens: Tokens of the longest sample.
    """

    item: str
    action: str | None
    contexts: tuple[str, ...]
    max_tokens: int


def fit_to_data(config: Config, schema: Schema) -> Config:
    """Return ``config`` with the values that the data set decides: context features, and what a long sequence needs.

    Raises:
        ConfigError: if config and schema do not fit together.
    """
    inputs, network = model_inputs(config, schema), config.network
    if (network.num_position_buckets or inputs.max_tokens) < inputs.max_tokens:
        raise network.error("num_position_buckets", f"a sample can have {inputs.max_tokens} tokens; use at least that")
    if network.backbone == "hstu" and network.scaling_seqlen == -1:
        network = replace(network, scaling_seqlen=inputs.max_tokens)
    if has_position_table(network):
        network = replace(network, num_position_buckets=network.num_position_buckets or inputs.max_tokens)
    return replace(config, network=network, dataset=replace(config.dataset, contextual_feature_names=inputs.contexts))


def make_collator(config: Config, schema: Schema) -> Collator:
    """Return the collator of ``config`` for data sets of ``schema``.

    Raises:
        ConfigError: for context features that the schema lacks.
    """
    known = tuple(feature.name for feature in schema.contexts)
    chosen = config.dataset.contextual_feature_names
    for name in chosen or ():
        if name not in known:
            available = ", ".join(known) or "none"
            raise ConfigError(
                "DatasetArgs.contextual_feature_names",
                f"= {chosen!r}: data set {schema.name!r} has no context feature {name!r}; it has: {available}",
            )
    retrieval = config.retrieval
    return Collator(
        task=config.task,
        max_history=config.dataset.max_history_seqlen,
        max_candidates=config.dataset.max_num_candidates,
        contexts=known if chosen is None else chosen,
        use_actions=config.network.token_layout != "item" and schema.action is not None,
        history_start=config.dataset.history_start,
        history_end=config.dataset.history_end,
        sampling_ratio=config.dataset.history_sampling_ratio,
        seed=config.trainer.seed,
        unknown_rate=config.feature.unknown_rate,
        whole_history=retrieval is not None and retrieval.loss == "bce" and retrieval.bce_excludes == "history",
    )


def model_inputs(config: Config, schema: Schema) -> Inputs:
    """Return what a model of ``config`` reads from data sets of ``schema``.

    Raises:
        ConfigError: if config and schema do not fit together.
    """
    collator = make_collator(config, schema)
    network = config.network
    if config.retrieval is not None and (schema.item.vocab_size or 0) < 2:
        raise ConfigError("DatasetArgs.dataset_name", f"= {config.dataset.dataset_name!r}: has one item, so that there "
                          "is nothing to choose from; retrieval needs two or more")  # fmt: skip
    if network.token_layout != "item" and schema.action is None:
        raise ConfigError(
            "NetworkArgs.token_layout",
            f"= {network.token_layout!r}: data set {schema.name!r} has no actions; use 'item'",
        )
    if schema.time is None and (network.relative_time_bias or network.num_time_buckets):
        raise ConfigError(
            "NetworkArgs.relative_time_bias",
            f": data set {schema.name!r} has no timestamps; set it to False and NetworkArgs.num_time_buckets to 0",
        )
    per_event = 2 if network.token_layout == "interleave" else 1
    events = per_event * (collator.max_history + 1) + collator.max_candidates
    return Inputs(
        item=schema.item.name,
        action=schema.action.name if schema.action is not None and collator.use_actions else None,
        contexts=collator.contexts,
        max_tokens=len(collator.contexts) + events + config.memory.num_memory_tokens,
    )


def memory_blocks(config: Config) -> MemoryBlocks | None:
    """Return where the memory tokens of ``config`` stand; None if there are none."""
    args = config.memory
    if not args.num_memory_tokens:
        return None
    offsets, sizes = zip(*args.insert_method, strict=True)
    return MemoryBlocks(offsets, sizes, config.dataset.max_history_seqlen, args.pretrain_item_num)


def make_tables(config: Config, schema: Schema) -> tuple[Table, ...]:
    """Return one table for each feature that the model embeds, named after it and sized by the schema.

    Raises:
        ConfigError: for a sharding type given to a table that does not exist.
    """
    inputs, network = model_inputs(config, schema), config.network
    widths = {inputs.item: network.item_embedding_dim} if network.item_embedding != "categorical" else {}
    categories = dict.fromkeys(item_categories(config, schema), network.item_embedding_dim)
    widths |= categories
    if inputs.action is not None:
        widths[inputs.action] = network.action_embedding_dim
    widths |= {name: network.contextual_embedding_dim for name in inputs.contexts}
    named = {f"EmbeddingArgs.{f}": getattr(config.embedding, f) for f in ("table_sharding_types", "uvm_caching_tables")}
    named["DynamicEmbeddingArgs.capacity"] = config.dynamic_embedding.capacity
    for field, table in ((field, table) for field, tables in named.items() for table in tables):
        if table not in widths:
            raise ConfigError(field, f": no table {table!r}; tables: {', '.join(widths)}")
    rows = {feature.name: feature.vocab_size for feature in schema.features}
    actions = () if inputs.action is None else (inputs.action,)
    unknown = (*inputs.contexts, *actions, *categories) if config.feature.unknown_rate > 0 else ()
    rows |= {name: unknown_id(schema, name) + 1 for name in unknown}
    rows |= config.dynamic_embedding.capacity
    _check_dynamic(config, inputs.item)
    sources = (inputs.item, POOL) if config.task == "retrieval" else (inputs.item,)
    features = {name: tuple(category_feature(source, name) for source in sources) for name in categories}
    features[inputs.item] = sources
    return tuple(
        Table(
            name=name,
            rows=rows[name] or 0,
            width=width,
            features=features.get(name, (name,)),
            std=network.embedding_initializer_std,
            seed=config.trainer.seed,
            unknown=name in unknown,
        )
        for name, width in widths.items()
    )


def _check_dynamic(config: Config, item: str) -> None:
    """Raise ``ConfigError`` where negatives would be drawn from items of which most have no row."""
    args, retrieval = config.dynamic_embedding, config.retrieval
    if item in args.capacity and retrieval and retrieval.loss == "bce":
        raise args.error("capacity", f"table {item!r}: bce draws its negatives from all items, of which those not met "
                         "yet have no row; use RetrievalArgs.loss = 'sampled_softmax'")  # fmt: skip
    if item in args.capacity and retrieval and retrieval.negatives not in ("in_batch", "uniform"):
        raise args.error("capacity", f"table {item!r}: items not met yet have no row and are no negatives; use "
                         "RetrievalArgs.loss = 'sampled_softmax' with sampling_strategy = 'in_batch' or "
                         "'uniform'")  # fmt: skip


def item_categories(config: Config, schema: Schema) -> tuple[str, ...]:
    """Return the categories that items are embedded by.

    Raises:
        ConfigError: if there are to be some and the data set has none.
    """
    if config.network.item_embedding == "local":
        return ()
    if not schema.categories:
        raise config.network.error("item_embedding", f"data set {schema.name!r} has no categories of items; give the "
                                   "preprocessor an --items file, or use 'local'")  # fmt: skip
    return tuple(feature.name for feature in schema.categories)
