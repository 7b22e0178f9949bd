"""Values for what a config leaves open, by the size of the data set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """What a data set counts.

    Attributes:
        users: Users.
        items: Items of the catalogue.
        events: Events of all users.
        has_times: Whether events have times, not an order alone.
        ranks: Data ranks that share a step.
    """

    users: int
    items: int
    events: int
    has_times: bool = True
    ranks: int = 1


#: Stands in where a config is checked before its data set is at hand.
UNKNOWN = DataSize(users=10_000, items=10_000, events=100_000)
# Chosen on the validation split of two public logs: 167,597 events of 19,412 users, and 100,000 events of 943 users.
_LABELS = 2_000  # of a step
_PASSES = 30  # over 130,000 events; fewer over more, by the root
_STRIDED, _STRIDE = 50, 100  # events of a user from which there are samples of so many labels
_HIDDEN = 0.4  # of the items, where those that are hidden are the labels
_FULL_SOFTMAX = 4_096  # items, up to which a step scores all of them
#: Of weights: a run that starts from another one has those of that one.
SHAPE = (
    "DatasetArgs.max_history_seqlen",
    "NetworkArgs.hidden_size",
    "NetworkArgs.num_attention_heads",
    "NetworkArgs.kv_channels",
)
_LOSS = ("RetrievalArgs.loss", "RetrievalArgs.num_negatives")


def suggest(size: DataSize, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``Class.field`` -> value of the fields of retrieval that the size of a data set decides.

    Args:
        size: The data set.
        given: ``Class.field`` -> value of what is set, which wins.
    """
    masked = given.get("NetworkArgs.backbone") == "bert"
    values = _schedule(size, given, masked) | _shape(size, given) | _loss(size, masked)
    values |= {"OptimizerArgs.learning_rate": 2e-3, "OptimizerArgs.lr_schedule": "cosine"}
    if given.get("NetworkArgs.backbone", "hstu") == "hstu" and not size.has_times:
        values["NetworkArgs.relative_time_bias"] = False
    if masked:
        values |= {
            "NetworkArgs.norm_placement": "pre",
            "NetworkArgs.scale_inputs": True,
            "NetworkArgs.dense_initializer_type": "xavier_uniform",
            "RetrievalArgs.mask_probability": _HIDDEN,
        }
    if "TrainerArgs.max_train_iters" in given:
        del values["TrainerArgs.max_epochs"]
    if given.keys() & {"RetrievalArgs.loss", "RetrievalArgs.num_negatives", "RetrievalArgs.sampling_strategy"}:
        values = {key: value for key, value in values.items() if key not in _LOSS}
    return {key: value for key, value in values.items() if key not in given}


def _schedule(size: DataSize, given: Mapping[str, Any], masked: bool) -> dict[str, Any]:
    mean = size.events / max(size.users, 1)
    longest = given.get("DatasetArgs.max_history_seqlen") or (50 if mean < 25 else 200)
    labels = max(min(mean - 2, longest / 3), 1)  # of a sample
    batch = max(2 ** min(max(round(math.log2(_LABELS / labels)), 3), 10) // size.ranks, 1)
    epochs = min(max(round(_PASSES * math.sqrt(130_000 / max(size.events, 1))), 3), 100)
    if masked:  # as many labels
        epochs = round(epochs / (given.get("RetrievalArgs.mask_probability") or _HIDDEN))
    passes = given.get("TrainerArgs.max_epochs") or epochs
    samples = size.users * max((mean - 2) / _STRIDE + 0.5 if mean > _STRIDED else 1, 1)
    steps = passes * max(math.ceil(samples / size.ranks / given.get("TrainerArgs.train_batch_size", batch)), 1)
    steps = min(steps, given.get("TrainerArgs.max_train_iters") or steps)
    return {
        "TrainerArgs.train_batch_size": batch,
        "TrainerArgs.eval_batch_size": 1_024 if longest <= 50 else 256,
        "TrainerArgs.max_epochs": epochs,
        "TrainerArgs.log_interval": min(max(steps // 50, 1), 1_000),
        "TrainerArgs.eval_interval": min(max(steps // 10, 1), 50_000),
        "DatasetArgs.max_history_seqlen": longest,
    }


def _shape(size: DataSize, given: Mapping[str, Any]) -> dict[str, Any]:
    names = SHAPE[1:]
    width, heads, channels = (given.get(name) for name in names)
    width = width or (64 if size.events < 10**6 else 128 if size.events < 2 * 10**7 else 256)
    heads = heads or max(width // (channels or 32), 1)
    return dict(zip(names, (width, heads, channels or max(width // heads, 1)), strict=True))


def _loss(size: DataSize, masked: bool) -> dict[str, Any]:
    density = size.events / max(size.items, 1)
    few = size.items <= _FULL_SOFTMAX
    # What is hidden is a noise of its own.
    lower = (density >= 30) + (density >= 150) + masked
    return {
        # Every event is a target, those of long histories too.
        "DatasetArgs.train_stride": _STRIDE if size.events > _STRIDED * size.users else None,
        "NetworkArgs.hidden_dropout": (0.5, 0.3, 0.2, 0.2)[lower],
        "RetrievalArgs.temperature": 0.07,
    } | ({"RetrievalArgs.loss": "full_softmax"} if few else {"RetrievalArgs.num_negatives": 512})
