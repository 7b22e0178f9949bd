"""What a model is for a config and a schema: its inputs, its collator, its tables, and values the data set decides."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hstu.config import Config, ConfigError
from hstu.data.collate import Collator
from hstu.data.schema import Schema
from hstu.data.sessions import session_column
from hstu.layers.memory import MemoryBlocks
from hstu.models.backbone import has_position_table
from hstu.models.features import Declared, declared_features

MERGED_CONTEXT = "__user__"
"""The token of all features of a user."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The features a model reads, and how long its sequences can be.

    Attributes:
        item: Item feature.
        action: Action feature that is an input, or None.
        declared: The declared features.
        contexts: Tokens of the user's features, in their order.
        items_have_rows: Whether each item has a row of its own.
        max_tokens: Tokens of the longest sample.
    """

    item: str
    action: str | None
    declared: Declared
    contexts: tuple[str, ...]
    items_have_rows: bool
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
    if not inputs.declared.items and not config.item_text.is_vector:
        network = replace(network, item_embedding="local")
    elif inputs.items_have_rows:
        network = replace(network, item_embedding="both")
    declared = inputs.declared
    users, events, items = (
        tuple(feature.name for feature in features)
        for features in (declared.users, (*declared.events, *declared.outcomes), declared.items)
    )
    return replace(
        config,
        network=network,
        dataset=replace(config.dataset, contextual_feature_names=users),
        feature=replace(config.feature, event_features=events, item_features=items),
    )


def make_collator(config: Config, schema: Schema) -> Collator:
    """Return the collator of ``config`` for data sets of ``schema``.

    Raises:
        ConfigError: for features that the schema lacks.
    """
    declared = declared_features(config, schema)
    session_column(config.dataset.sessions, schema)  # or raise
    contexts = tuple(feature.name for feature in declared.users if feature.kind == "categorical")
    retrieval = config.retrieval
    return Collator(
        task=config.task,
        max_history=config.dataset.max_history_seqlen,
        max_candidates=config.dataset.max_num_candidates,
        contexts=contexts,
        user_features=tuple(feature.name for feature in declared.users if feature.kind != "categorical"),
        event_features=tuple(feature.name for feature in (*declared.events, *declared.outcomes)),
        label_features=label_features(config, schema),
        use_actions=config.network.token_layout != "item" and schema.action is not None,
        history_start=config.dataset.history_start,
        history_end=config.dataset.history_end,
        sampling_ratio=config.dataset.history_sampling_ratio,
        seed=config.trainer.seed,
        unknown_rate=config.feature.unknown_rate,
        sessions=config.dataset.sessions,
        memory_room=_memory_room(config),
        whole_history=retrieval is not None and retrieval.loss == "bce" and retrieval.bce_excludes == "history",
    )


def label_features(config: Config, schema: Schema) -> tuple[str, ...]:
    """Return the features of events, actions aside, that a ranking predicts."""
    named = dict.fromkeys(task[2].partition(":")[0] for task in (config.ranking.tasks if config.ranking else ()))
    return tuple(feature.name for feature in schema.of("event") if feature.name in named)


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
        ranks = config.task == "ranking" and config.dataset.max_num_candidates == 0
        more = ", with DatasetArgs.max_num_candidates above 0" if ranks else ""
        raise ConfigError(
            "NetworkArgs.token_layout",
            f"= {network.token_layout!r}: data set {schema.name!r} has no actions; use 'item'{more}",
        )
    if schema.time is None and (network.relative_time_bias or network.num_time_buckets):
        raise ConfigError(
            "NetworkArgs.relative_time_bias",
            f": data set {schema.name!r} has no timestamps; set it to False and NetworkArgs.num_time_buckets to 0",
        )
    per_event = 2 if network.token_layout == "interleave" else 1
    events = per_event * (collator.max_history + 1) + collator.max_candidates
    declared = declared_features(config, schema)
    contexts = tuple(feature.name for feature in declared.users)
    if contexts and config.feature.context_merge == "concat":
        contexts = (MERGED_CONTEXT,)
    return Inputs(
        item=schema.item.name,
        action=schema.action.name if schema.action is not None and collator.use_actions else None,
        declared=declared,
        contexts=contexts,
        items_have_rows=network.item_embedding != "categorical",
        max_tokens=len(contexts) + events + config.memory.num_memory_tokens,
    )


def memory_blocks(config: Config) -> MemoryBlocks | None:
    """Return where the memory tokens of ``config`` stand; None if there are none."""
    args = config.memory
    if not args.num_memory_tokens:
        return None
    offsets, sizes = zip(*args.insert_method, strict=True)
    at_session = config.dataset.sessions is not None
    return MemoryBlocks(offsets, sizes, config.dataset.max_history_seqlen, args.pretrain_item_num, at_session)


def _memory_room(config: Config) -> tuple[int, int] | None:
    args = config.memory
    if not args.num_memory_tokens or config.dataset.sessions is None:
        return None
    return args.pretrain_item_num, args.recent_item_num
