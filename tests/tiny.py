"""Tiny planted data sets and the small configs that go with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from hstu.data.schema import Feature
from hstu.data.synthetic import SyntheticConfig, generate
from hstu.data.writer import EncodedDataset, write_dataset

SHAPE = dict(num_items=120, num_clusters=12, min_seqlen=3, max_seqlen=20)

_COMMON = (
    "DatasetArgs.dataset_name='synthetic'",
    "DatasetArgs.max_history_seqlen=16",
    "NetworkArgs.num_layers=2",
    "NetworkArgs.hidden_size=16",
    "NetworkArgs.num_attention_heads=2",
    "NetworkArgs.kv_channels=8",
    "NetworkArgs.hidden_dropout=0.0",
    "NetworkArgs.item_embedding='local'",
    "OptimizerArgs.optimizer_str='adam'",
    "OptimizerArgs.learning_rate=3e-3",
    "TrainerArgs.train_batch_size=32",
    "TrainerArgs.eval_batch_size=64",
    "TrainerArgs.loggers=()",
    "TrainerArgs.report=False",
)
BINDINGS = {
    "ranking": (*_COMMON, "RankingArgs.prediction_head_arch=[16, 1]"),
    "retrieval": (*_COMMON, "RetrievalArgs.num_negatives=16"),
}


def write_tiny(directory: Path, num_users: int = 200, *, classes: int = 0, **shape: object) -> Path:
    """Write a planted data set named after ``directory``; ``classes`` makes its actions categorical."""
    write_dataset(tiny(num_users, name=directory.name, classes=classes, **shape), directory)
    return directory


def tiny(num_users: int = 200, *, name: str = "synthetic", classes: int = 0, **shape: object) -> EncodedDataset:
    """Return the planted data set that ``write_tiny`` writes."""
    fields = {**SHAPE, **shape}
    dataset = generate(SyntheticConfig(num_users=num_users, **fields), name=name)  # type: ignore[arg-type]
    if classes:
        action = Feature(name="action", role="action", vocab_size=classes, action_type="categorical")
        features = tuple(action if f.role == "action" else f for f in dataset.schema.features)
        ratings = dataset.events["action"] + np.arange(len(dataset.events["action"])) % (classes - 1)
        schema = replace(dataset.schema, features=features, best_possible=None)
        vocabularies = dataset.vocabularies | {"action": pa.array(np.arange(classes))}
        events = dataset.events | {"action": ratings}
        dataset = replace(dataset, schema=schema, events=events, vocabularies=vocabularies)
    return dataset


def renumber(
    dataset: EncodedDataset, orders: dict[str, np.ndarray], more: dict[str, list] | None = None
) -> EncodedDataset:
    """Return the same events with ids in another order, as a log that comes in another order gives them.

    Args:
        dataset: What to renumber.
        orders: Feature -> which of its values, those of ``more`` behind them, has each new id.
        more: Feature -> values that no event has.
    """
    sizes, vocabularies = {f.name: f.vocab_size for f in dataset.schema.features}, dict(dataset.vocabularies)
    columns = {**dataset.contexts, **dataset.events, **dataset.categories}
    for name, order in orders.items():
        values = dataset.vocabularies[name].to_pylist() + (more or {}).get(name, [])
        vocabularies[name], sizes[name] = pa.array([values[place] for place in order]), len(order)
        if name in columns:
            columns[name] = np.argsort(order)[columns[name]]
    if (order := orders.get("item_id")) is not None:
        for name in dataset.categories:
            columns[name] = np.append(columns[name], np.zeros(len(order), np.int64))[order]
    features = tuple(replace(f, vocab_size=sizes[f.name]) for f in dataset.schema.features)
    return replace(
        dataset,
        schema=replace(dataset.schema, features=features, best_possible=None),
        contexts={name: columns[name] for name in dataset.contexts},
        events={name: columns[name] for name in dataset.events},
        categories={name: columns[name] for name in dataset.categories},
        vocabularies=vocabularies,
    )
