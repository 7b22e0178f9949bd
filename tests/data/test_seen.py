"""What users have met before, against loops over users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hstu.config import DatasetArgs
from hstu.data import make_splits, seen, splits
from hstu.data.repeats import count_repeats
from tests.samples import make_dataset

LENGTHS = [3, 9, 4, 12, 5, 1, 7, 20, 6, 4, 8]


@pytest.mark.parametrize("at_once", [1, 10, 10**6])
@pytest.mark.parametrize("protocol", ["leave_one_out", "temporal"])
def test_seen_targets_are_those_of_a_loop(
    protocol: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "_EVENTS_AT_ONCE", at_once)
    dataset = make_dataset(tmp_path / "small", LENGTHS, num_items=9)
    split = make_splits(
        DatasetArgs(dataset_name="small", max_history_seqlen=4, protocol=protocol),  # type: ignore[arg-type]
        dataset,
    )["test"]
    expected = 0
    for user, stop in zip(split.users, split.stop, strict=True):
        items = dataset.gather(np.array([user]), np.array([0]), np.array([stop])).items.tolist()
        expected += items[-1] in items[:-1]
    assert seen.count_seen_targets(dataset, split) == expected > 0


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 5, 0], [0], []])
def test_repeats_are_those_of_a_loop(lengths: list[int]) -> None:
    items = np.random.default_rng(0).integers(9, size=sum(lengths))
    own = np.split(items, np.cumsum(lengths)[:-1]) if lengths else []
    expected = sum(len(part) - len(set(part.tolist())) for part in own)
    assert count_repeats(np.array(lengths, np.int64), items) == expected
