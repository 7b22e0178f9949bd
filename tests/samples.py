"""Small data sets, written to disk and read back, for tests above the data floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.config import Config, load_config
from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, write_dataset
from hstu.data.schema import count_statistics


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
    dataset = EncodedDataset(
        schema=Schema(name="small", features=tuple(features), counts=count_statistics(sizes, num_items)),
        lengths=sizes,
        contexts={name: rng.integers(7, size=len(sizes)) for name in contexts},
        events=events,
        vocabularies={
            feature.name: pa.array(np.arange(feature.vocab_size))
            for feature in features
            if (feature.vocab_size or 2**60) < 10**6 and feature.action_type != "bitmask"
        }
        | {name: pa.array(values) for name, values in (originals or {}).items()},
        categories={name: rng.integers(5, size=num_items) for name in categories},
    )
    write_dataset(dataset, folder)
    return SequenceDataset.open(folder)


def read_back(folder: Path) -> EncodedDataset:
    """Everything that a data set on disk holds."""
    dataset = SequenceDataset.open(folder)
    everyone = np.arange(dataset.num_users)
    found = dataset.gather(everyone, np.zeros_like(everyone), dataset.lengths)
    columns = zip(("item", "action", "time"), (found.items, found.actions, found.times), strict=True)
    return EncodedDataset(
        schema=dataset.schema,
        lengths=dataset.lengths,
        contexts=found.contexts,
        events={getattr(dataset.schema, role).name: values for role, values in columns if values is not None},
        vocabularies={
            file.stem: pq.read_table(file)["original"].combine_chunks()
            for file in sorted((folder / "vocabulary").iterdir())
        },
        categories={feature.name: dataset.category_ids(feature.name) for feature in dataset.schema.categories},
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
