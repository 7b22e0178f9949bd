"""Features of all kinds together: every layout of ranks gives the same losses, and takes a state from any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.data import write_dataset
from hstu.data.values import without
from tests.launch import forked
from tests.parallel.cases import FEATURES, MOVED, SAVED_STEP
from tests.parallel.test_ranks import WORKER, worst
from tests.samples import declared_features, make_dataset, read_back

pytestmark = pytest.mark.slow

STEPS = 12


class Runs:
    """What the worker finds on so many ranks, launched when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.found = root, dict[tuple[int, bool], dict[str, Any]]()
        lengths = np.random.default_rng(0).integers(2, 16, size=80)
        make_dataset(root / "declared" / "synthetic", lengths.tolist(), num_actions=2, declared=declared_features())
        write_rare(root / "declared" / "synthetic", root / "rare" / "synthetic")

    def of(self, ranks: int, *, moved: bool = False) -> dict[str, Any]:
        if (ranks, moved) not in self.found:
            if moved:  # states of every layout
                assert self.of(2) and self.of(4)
            cases = (MOVED if moved else FEATURES)[ranks]
            request = {"cases": [(name, None) for name in cases], "load" if moved else "save": str(self.root / "state")}
            paths = [self.root / f"{kind}-{ranks}-{moved}.json" for kind in ("request", "result")]
            paths[0].write_text(json.dumps(request | {"data": str(self.root)}))
            done = forked(WORKER, *map(str, paths), ranks=ranks, cwd=self.root)
            assert done.code == 0, done.err[-4000:]
            self.found[ranks, moved] = json.loads(paths[1].read_text())
        return self.found[ranks, moved]


def write_rare(source: Path, folder: Path) -> None:
    """Write a data set in which the first user and item alone have features."""
    data = read_back(source)
    owners = np.repeat(np.arange(len(data.lengths)), data.lengths)
    columns = {"user": data.contexts, "event": data.events, "item": data.categories}
    ends = {"user": np.arange(len(data.lengths)), "event": owners, "item": np.arange(data.schema.item.vocab_size or 0)}
    features = []
    for feature in data.schema.features:
        if feature in declared_features() or feature.kind == "multi":
            own = columns[feature.level]
            own[feature.name] = values = without(own[feature.name], ends[feature.level] > 0, feature)
            if feature.kind == "multi":
                feature = replace(feature, num_ids=len(values.ids))  # type: ignore[union-attr]  # noqa: PLW2901
        features.append(feature)
    write_dataset(replace(data, schema=replace(data.schema, features=tuple(features))), folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("features"))


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert worst(found["losses"], wanted["losses"][-len(found["losses"]) :]) < 1e-5
    ours, theirs = ({k: v for k, v in run["scores"].items() if v is not None} for run in (found, wanted))
    # Samples whose scores differ by rounding alone change places.
    assert len(ours) > 1 and ours == pytest.approx(theirs, rel=1e-5, abs=5e-4)


def alone(name: str) -> str:
    """Return the case on one rank that ``name`` is compared with."""
    return "-".join((*name.split("-")[:2], "1-1-1"))


@pytest.mark.parametrize("name", [name for ranks in (2, 4) for name in FEATURES[ranks]])
def test_every_layout_loses_what_one_rank_loses(runs: Runs, name: str) -> None:
    one, several = runs.of(1)[alone(name)], runs.of(int(name.split("-")[2]))[name]
    assert len(several["losses"]) == STEPS
    assert max(one["losses"]) - min(one["losses"]) > 0.02 * one["losses"][0], "otherwise it says little about steps"
    assert_same(several, one)


@pytest.mark.parametrize("name", [name for cases in MOVED.values() for name in cases])
def test_a_state_of_one_layout_goes_on_in_another(runs: Runs, name: str) -> None:
    found = runs.of(int(name.split(" as ")[1].split("-")[2]), moved=True)[name]
    assert len(found["losses"]) == STEPS - SAVED_STEP
    assert_same(found, runs.of(1)[alone(name)])
