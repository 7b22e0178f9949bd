"""Tiny planted data sets and the small configs that go with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hstu.data.schema import Feature
from hstu.data.synthetic import SyntheticConfig, generate
from hstu.data.writer import write_dataset

SHAPE = dict(num_items=120, num_clusters=12, min_seqlen=3, max_seqlen=20)

_COMMON = (
    "DatasetArgs.dataset_name='synthetic'",
    "DatasetArgs.max_history_seqlen=16",
    "NetworkArgs.num_layers=2",
    "NetworkArgs.hidden_size=16",
    "NetworkArgs.num_attention_heads=2",
    "NetworkArgs.kv_channels=8",
    "NetworkArgs.hidden_dropout=0.0",
    "OptimizerArgs.optimizer_str='adam'",
    "OptimizerArgs.learning_rate=3e-3",
    "TrainerArgs.train_batch_size=32",
    "TrainerArgs.eval_batch_size=64",
    "TrainerArgs.loggers=()",
)
BINDINGS = {
    "ranking": (*_COMMON, "RankingArgs.prediction_head_arch=[16, 1]"),
    "retrieval": (*_COMMON, "RetrievalArgs.num_negatives=16"),
}


def write_tiny(directory: Path, num_users: int = 200, *, classes: int = 0, **shape: object) -> Path:
    """Write a planted data set named after ``directory``; ``classes`` makes its actions categorical."""
    fields = {**SHAPE, **shape}
    dataset = generate(SyntheticConfig(num_users=num_users, **fields), name=directory.name)  # type: ignore[arg-type]
    if classes:
        action = Feature(name="action", role="action", vocab_size=classes, action_type="categorical")
        features = tuple(action if f.role == "action" else f for f in dataset.schema.features)
        ratings = dataset.events["action"] + np.arange(len(dataset.events["action"])) % (classes - 1)
        schema = replace(dataset.schema, features=features, best_possible=None)
        dataset = replace(dataset, schema=schema, events=dataset.events | {"action": ratings})
    write_dataset(dataset, directory)
    return directory
