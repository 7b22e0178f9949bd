"""Small data sets, written to disk and read back, for tests above the data floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hstu.config import Config, load_config
from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, Statistics, write_dataset
from hstu.data.batch import Batch
from hstu.data.schema import count_statistics
from hstu.data.values import Sets, Values
from hstu.models import RankingModel, RetrievalModel


def declared_features() -> tuple[Feature, ...]:
    """A feature of each level and kind, a control column, and one that is known only after the request."""
    numbers = Statistics(mean=0.0, std=1.0, quantiles=tuple(np.linspace(-3, 3, 101).tolist()))
    return (
        Feature(name="income", level="user", kind="numeric", statistics=numbers),
        Feature(name="face", level="user", kind="vector", width=3),
        Feature(name="likes", level="user", kind="multi", vocab_size=6, num_ids=0),
        Feature(name="device", level="event", kind="categorical", vocab_size=5),
        Feature(name="price", level="event", kind="numeric", statistics=numbers),
        Feature(name="place", level="event", kind="vector", width=2),
        Feature(name="tags", level="event", kind="multi", vocab_size=6, num_ids=0, table="likes"),
        Feature(name="watched", level="event", kind="numeric", statistics=numbers, known_at_request=False),
        Feature(name="ending", level="event", kind="categorical", vocab_size=3, known_at_request=False),
        Feature(name="marks", level="event", kind="multi", vocab_size=4, num_ids=0, known_at_request=False),
        Feature(name="brand", level="item", kind="categorical", vocab_size=4),
        Feature(name="weight", level="item", kind="numeric", statistics=numbers),
        Feature(name="genres", level="item", kind="multi", vocab_size=5, num_ids=0),
        Feature(name="image", level="item", kind="vector", width=3),
        Feature(name="request", role="control", level="event", kind="categorical", vocab_size=9),
    )


def draw_values(feature: Feature, number: int, rng: np.random.Generator) -> Values:
    """Random values of a declared feature; some are missing."""
    if feature.kind == "multi":
        sets = [rng.permutation(feature.vocab_size)[: rng.integers(4)] for _ in range(number)]
        offsets = np.cumsum([0, *map(len, sets)])
        return Sets(offsets, np.concatenate(sets))
    if feature.has_ids:
        return rng.integers(feature.vocab_size + 1, size=number)
    values = rng.standard_normal((number, feature.width or 1)).astype(np.float32)
    values[rng.random(number) < 0.2] = np.nan
    return values


def make_dataset(
    folder: Path,
    lengths: Sequence[int],
    *,
    num_items: int = 50,
    num_actions: int | None = 4,
    action_type: str = "categorical",
    with_time: bool = True,
    contexts: Sequence[str] = ("country", "age"),
    categories: Sequence[str] = (),
    items: np.ndarray | None = None,
    times: np.ndarray | None = None,
    originals: dict[str, list] | None = None,
    declared: Sequence[Feature] = (),
    seed: int = 0,
) -> SequenceDataset:
    """Write random sequences of the given lengths into ``folder`` and open them."""
    rng = np.random.default_rng(seed)
    sizes = np.asarray(lengths, np.int64)
    total = int(sizes.sum())
    features = [Feature(name="user", role="user", vocab_size=len(sizes))]
    features += [Feature(name=name, level="user", kind="categorical", vocab_size=7) for name in contexts]
    features.append(Feature(name="item", role="item", vocab_size=num_items))
    features += [Feature(name=name, level="item", kind="categorical", vocab_size=5) for name in categories]
    events = {"item": rng.integers(num_items, size=total) if items is None else items}
    if num_actions is not None:
        features.append(
            Feature(name="action", role="action", vocab_size=num_actions, action_type=action_type)  # type: ignore[arg-type]
        )
        events["action"] = rng.integers(num_actions, size=total)
    if with_time:
        features.append(Feature(name="time", role="time"))
        clock = np.concatenate([np.sort(rng.integers(10**9, 10**9 + 10**6, size=size)) for size in sizes])
        events["time"] = clock.astype(np.int64) if times is None else times
    of_users = {name: rng.integers(7, size=len(sizes)) for name in contexts}
    of_items = {name: rng.integers(5, size=num_items) for name in categories}
    for feature in declared:
        level = {"user": (of_users, len(sizes)), "event": (events, total), "item": (of_items, num_items)}[feature.level]
        level[0][feature.name] = values = draw_values(feature, level[1], rng)
        features.append(replace(feature, num_ids=len(values.ids)) if isinstance(values, Sets) else feature)
    dataset = EncodedDataset(
        schema=Schema(name="small", features=tuple(features), counts=count_statistics(sizes, num_items)),
        lengths=sizes,
        contexts=of_users,
        events=events,
        vocabularies={
            feature.table: pa.array(np.arange(feature.vocab_size))
            for feature in features
            if (feature.vocab_size or 2**60) < 10**6 and feature.action_type != "bitmask"
        }
        | {name: pa.array(values) for name, values in (originals or {}).items()},
        categories=of_items,
    )
    write_dataset(dataset, folder)
    return SequenceDataset.open(folder)


def read_back(folder: Path) -> EncodedDataset:
    """Everything that a data set on disk holds."""
    dataset = SequenceDataset.open(folder)
    everyone = np.arange(dataset.num_users)
    stored = tuple(feature.name for level in ("user", "event") for feature in dataset.schema.stored(level))
    found = dataset.gather(everyone, np.zeros_like(everyone), dataset.lengths, stored)
    columns = zip(("item", "action", "time"), (found.items, found.actions, found.times), strict=True)
    return EncodedDataset(
        schema=dataset.schema,
        lengths=dataset.lengths,
        contexts=found.of_users,
        events={getattr(dataset.schema, role).name: values for role, values in columns if values is not None}
        | found.of_events,
        vocabularies={
            file.stem: pq.read_table(file)["original"].combine_chunks()
            for file in sorted((folder / "vocabulary").iterdir())
        },
        categories={feature.name: dataset.item_features(feature.name) for feature in dataset.schema.stored("item")},
    )


def make_config(task: str, *lines: str) -> Config:
    """A small config of ``task``; ``lines`` win over its defaults."""
    head = {"ranking": "RankingArgs.prediction_head_arch=[6, 4]", "retrieval": "RetrievalArgs.num_negatives=5"}[task]
    defaults = (
        "TrainerArgs.train_batch_size=4",
        "TrainerArgs.eval_batch_size=4",
        "DatasetArgs.dataset_name='small'",
        "DatasetArgs.max_history_seqlen=6",
        "NetworkArgs.num_layers=2",
        "NetworkArgs.hidden_size=8",
        "NetworkArgs.num_attention_heads=2",
        "NetworkArgs.kv_channels=3",
        "NetworkArgs.hidden_dropout=0.0",
        "OptimizerArgs.optimizer_str='adam'",
        "OptimizerArgs.learning_rate=1e-3",
        head,
    )
    return load_config(task, (), [*defaults, *lines]).config  # type: ignore[arg-type]


def label_mask(batch: Batch) -> torch.Tensor:
    """Return which events carry a label, [E] bool."""
    return torch.zeros(batch.num_events, dtype=torch.bool).index_fill(0, batch.label_events, True)


def scores_of(model: RankingModel | RetrievalModel, batch: Batch) -> torch.Tensor:
    """Return what scores the labelled events of ``batch``: logits, or queries."""
    request = model.scoring_request(batch)
    return model.logits(request) if isinstance(model, RankingModel) else model.queries(request)
