"""What ranking and retrieval share: tables, token stream, backbone, rows. Built from config and schema."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hstu.config import Config, ConfigError
from hstu.data.batch import POOL, Batch, KeyedJaggedTensor
from hstu.data.collate import Collator
from hstu.data.schema import Schema, unknown_id
from hstu.layers.mlp import initialize
from hstu.layers.positions import PositionEncoder
from hstu.layers.postprocess import Postprocess
from hstu.layers.preprocess import Preprocess
from hstu.layers.tokens import Stream
from hstu.models.backbone import has_position_table, make_backbone
from hstu.models.embedding import Embeddings, EmbeddingTables, ItemCategories, Table, category_feature


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
    return Inputs(
        item=schema.item.name,
        action=schema.action.name if schema.action is not None and collator.use_actions else None,
        contexts=collator.contexts,
        max_tokens=len(collator.contexts) + per_event * (collator.max_history + 1) + collator.max_candidates,
    )


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
    unknown = (*inputs.contexts, *categories) if config.feature.unknown_rate > 0 else ()
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


class Encoder(nn.Module):
    """Base of the models: batch to the hidden rows that carry labels.

    Args:
        config: The run.
        schema: The data set.
        allocate_tables: False leaves the tables to ``parallelize``.
    """

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__()
        config = fit_to_data(config, schema)
        network, inputs = config.network, model_inputs(config, schema)
        self.embeddings: Embeddings = EmbeddingTables(make_tables(config, schema), allocate=allocate_tables)
        categories = item_categories(config, schema)
        #: What stands for items beside, or in place of, rows of their own; whoever has the data sets its ids.
        self.categories = None
        if categories:
            unknown = {name: unknown_id(schema, name) for name in categories}
            rate, seed = config.feature.unknown_rate, config.trainer.seed
            self.categories = ItemCategories(inputs.item, unknown, schema.item.vocab_size or 0, rate, seed)
        #: Dense weights with one row for each id of a feature, and the feature.
        self.row_weights: dict[str, str] = {}
        self.features = (*inputs.contexts, inputs.item, *([inputs.action] if inputs.action else []))
        widths = {inputs.item: network.item_embedding_dim} | self.embeddings.widths
        self.preprocess = Preprocess(
            network.hidden_size,
            {name: width for name, width in widths.items() if name in self.features},
            item=inputs.item,
            action=inputs.action,
            contexts=inputs.contexts,
            layout=network.token_layout,
            positions=PositionEncoder(
                network.hidden_size,
                network.num_position_buckets or 0,
                scale_inputs=network.scale_inputs,
                std=network.embedding_initializer_std,
                positions_from_end=network.is_masked,
                num_time_buckets=network.num_time_buckets,
                time_bucket_fn=network.time_bucket_fn,
                dropout=network.input_dropout,
            ),
        )
        #: Chooses the rows of a stream that are held here; ``parallelize`` sets it.
        self.hold: Callable[[Stream], Stream] = lambda stream: stream
        self._laid_out: tuple[Tensor, Stream] | None = None
        self.backbone = make_backbone(network, inputs.max_tokens, with_candidates=config.dataset.max_num_candidates > 0)
        norm = network.output_norm
        eps = config.retrieval.l2_norm_eps if config.retrieval and norm == "l2" else network.norm_epsilon
        self.postprocess = Postprocess(network.hidden_size, norm, eps, last_token=config.task == "retrieval")
        self.autocast_dtype = torch.bfloat16 if network.dtype_str == "bfloat16" else None
        own = (self.preprocess,) if network.is_hugging_face else (self.preprocess, self.backbone)
        for part in own:
            initialize(part, network.dense_initializer_type, network.dense_initializer_normal_std)

    def embed(self, features: KeyedJaggedTensor, step: int) -> dict[str, Tensor]:
        """Look up every feature, items as ``NetworkArgs.item_embedding`` says: name -> [ids of the feature, width]."""
        if self.categories is None:
            found: dict[str, Tensor] = self.embeddings(features)
            return found
        return self.categories.merged(self.embeddings(self.categories.beside(features, step)))

    def stream(self, batch: Batch) -> Stream:
        """Lay out the tokens of ``batch``, and which of them are held here; asked again, the answer is at hand."""
        if self._laid_out is not None and self._laid_out[0] is batch.sample_ids:
            return self._laid_out[1]
        lengths = {name: batch.lengths(name) for name in self.features}
        sizes = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
        stream = self.hold(self.preprocess.stream(lengths, sizes, batch.num_candidates, batch.timestamps))
        self._laid_out = batch.sample_ids, stream
        return stream

    def forget_layout(self) -> None:
        """Lay out the next batch afresh."""
        self._laid_out = None

    def own_labels(self, batch: Batch) -> Batch:
        """Return ``batch`` with only the labels whose rows are held here: those that its scores are for."""
        return self.only_held(batch, batch.label_mask)

    def only_held(self, batch: Batch, reading: Tensor) -> Batch:
        """Return ``batch`` with only the labels whose event in ``reading`` [E] bool, one a label, is read here."""
        stream = self.stream(batch)
        if stream.held is None:
            return batch
        own = stream.places(self.postprocess.rows(stream, reading)) >= 0
        mask = torch.zeros_like(batch.label_mask).index_fill(0, batch.label_mask.nonzero().squeeze(1)[own], True)
        return replace(batch, label_mask=mask, labels=batch.labels[own])

    def look_up(self, batch: Batch, pool: Tensor | None = None) -> dict[str, Tensor]:
        """Return the embeddings of the values held, [n, width] of each feature, and of the item ids ``pool``."""
        stream = self.stream(batch)
        if stream.held is not None:
            batch = batch.only({name: stream.holds(name) for name in self.features})
        return self.embed((batch if pool is None else batch.with_pool(pool)).features, batch.step)

    def encode(self, embedded: dict[str, Tensor], batch: Batch) -> Tensor:
        """Return the rows that carry labels and are held here, [L, D] float32."""
        embedded = {name: embedded[name] for name in self.features}
        with torch.autocast(batch.labels.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            tokens = self.preprocess(embedded, self.stream(batch))
            hidden = self.backbone(tokens)
        rows: Tensor = self.postprocess(hidden, tokens, batch.label_mask)
        return rows

    def num_labels(self, batch: Batch) -> int:
        """Return the label tokens of the loss of ``batch``, before it is computed."""
        return batch.labels.numel()

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens that ``batch`` makes, without asking the device."""
        sizes = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
        action = self.preprocess.action
        if action is not None and self.preprocess.layout in ("add", "concat"):
            sizes.pop(action)
        return sum(sizes[name] for name in self.features if name in sizes)
