"""One rank, two and three give the same losses, and so does plain PyTorch in one process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.launch import forked
from tests.parallel.cases import CASES, GRIDS, SAVED_STEP, SPLITS, THREES
from tests.samples import declared_features, make_dataset
from tests.tiny import write_tiny
from tests.toy_text import WORDS, save_model, text_dataset

WORKER = Path(__file__).with_name("worker.py")
FAULTS = {
    "divide by the local count": "ranking-sgd-row",
    "divide by the world size once more": "ranking-sgd-row",
    "do not divide the tables' gradients": "retrieval-sgd-uniform",
    "do not average the dense gradients": "ranking-sgd-row",
    "leave .grad from the last step": "ranking-sgd-row",
    "own negatives only": "retrieval-sgd-in-batch-short",
}
PLAIN = [name for name, case in CASES.items() if case.plain_steps]
# Each part of these is in another case.
TWINS = (
    "retrieval-adam-dynamic-uniform",
    "retrieval-adam-in-batch",
    "ranking-adam-l2-short",
    "ranking-adagrad-clipped",
    "retrieval-adam-uniform",
    "ranking-sgd-column",
    "retrieval-sgd-accumulated-short",
    "retrieval-adam-dynamic",
    "retrieval-adam-pipelined",
    "retrieval-sgd-full-short",
    "retrieval-sgd-llama-bce",
    "retrieval-sgd-bpr-short",
    "retrieval-sgd-replaced-short",
    "retrieval-sgd-sessions-short",
    "retrieval-sgd-sasrec-mol-short",
    "retrieval-rowwise-adagrad",
    "retrieval-adam-text",
    "retrieval-sgd-text-alone",
    "ranking-adam-frozen-text",
)
FIRST = [name for name in CASES if name not in TWINS]
QUICK = (
    "context-ranking-candidates",
    "context-retrieval-research",
    "context-retrieval-memory",
    "tensor-ranking-concat",
    "sequence-ranking",
)
LATER = [name for name in SPLITS if name not in QUICK]


class Results(dict[int, dict[str, Any]]):
    """What the worker finds, by number of ranks, each launched when it is first asked for; -n: n ranks, slow cases.

    Of slow cases and those of four ranks it runs the ``chosen`` (pytest -k) alone.
    """

    REQUESTS = {
        1: {
            "cases": [(name, None) for name in (*FIRST, *QUICK)],
            "plain": [name for name in PLAIN if name in FIRST],
            "mesh": True,
        },
        -1: {
            "cases": [(name, None) for name in (*TWINS, *THREES, *LATER, *GRIDS)],
            "plain": [name for name in PLAIN if name in TWINS],
        },
        -2: {"cases": [(name, None) for name in (*TWINS, *LATER)]},
        2: {
            "cases": [
                # Split ones first: what they leave behind must not reach the others.
                *((name, None) for name in (*QUICK, *FIRST)),
                *((name, fault) for fault, name in FAULTS.items()),
            ],
            "mesh": True,
            "rings": True,
        },
        3: {"cases": [(name, None) for name in THREES], "mesh": True, "rings": True},
        4: {"cases": [(name, None) for name in GRIDS]},
    }

    def __init__(self, root: Path, chosen: set[str]) -> None:
        super().__init__()
        self.root, self.chosen = root, chosen
        self.moves: dict[tuple[int, int], dict[str, Any]] = {}
        write_tiny(root / "even" / "synthetic", num_users=200)
        write_tiny(root / "short" / "synthetic", num_users=65)
        lengths = np.random.default_rng(0).integers(2, 16, size=80)
        make_dataset(root / "declared" / "synthetic", lengths.tolist(), num_actions=2, declared=declared_features())
        text_dataset(root / "text" / "synthetic", lengths.tolist(), num_actions=2)

    def __missing__(self, ranks: int) -> dict[str, Any]:
        folder = {"save": str(self.root / f"saved{-ranks}")} if ranks < 0 else {}
        request = dict(self.REQUESTS[ranks])
        if ranks < 0 or ranks == 4:
            request["cases"] = [case for case in request["cases"] if case[0] in self.chosen]
            request["plain"] = [name for name in request.get("plain", ()) if name in self.chosen]
        if not (self.root / "bert").exists() and any("text" in name for name, _ in request["cases"]):
            # With smaller weights texts differ by little more than rounding, and ranks hang on that.
            save_model(self.root / "bert", WORDS, initializer_range=0.3)
        self[ranks] = self.launch(abs(ranks), request | folder)
        return self[ranks]

    def of(self, ranks: int, name: str) -> Any:
        """Return what the worker finds for a case, or a plain one, on ``ranks``."""
        return self[ranks if name.removesuffix(" plain") in (*FIRST, *QUICK) else -ranks][name]

    def moved(self, before: int, after: int) -> dict[str, Any]:
        """Return what LATER lose on ``after`` ranks when they begin with the state that ``before`` ranks saved."""
        if (before, after) not in self.moves:
            assert self[-before]
            cases = [(name, None) for name in LATER if name in self.chosen]
            request = {"cases": cases, "load": str(self.root / f"saved{before}")}
            self.moves[before, after] = self.launch(after, request)
        return self.moves[before, after]

    def launch(self, ranks: int, request: dict[str, Any]) -> dict[str, Any]:
        paths = self.root / f"request{ranks}.json", self.root / f"result{ranks}.json"
        paths[0].write_text(json.dumps(request | {"data": str(self.root)}))
        done = forked(WORKER, *map(str, paths), ranks=ranks, cwd=self.root)
        assert done.code == 0, done.err[-4000:]
        found: dict[str, Any] = json.loads(paths[1].read_text())
        return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    chosen = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    return Results(tmp_path_factory.mktemp("ranks"), chosen)


def marked(names: Iterable[str]) -> list[Any]:
    """Return parameters, of which those beside the quick ones are slow."""
    return [name if name in (*FIRST, *QUICK) else pytest.param(name, marks=pytest.mark.slow) for name in names]


def worst(losses: list[float], wanted: list[float]) -> float:
    """Return the largest relative difference."""
    assert len(losses) == len(wanted) > 0
    return max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))


@pytest.mark.parametrize("name", marked(CASES))
def test_two_ranks_lose_what_one_loses(results: Results, name: str) -> None:
    one, two = (results.of(ranks, name)["losses"] for ranks in (1, 2))
    assert len(one) == 30
    assert worst(two, one) < 1e-5


@pytest.mark.parametrize("name", marked(name for name in CASES if "dynamic" in name))
def test_rows_change_hands_alike(results: Results, name: str) -> None:
    one, two = (results.of(ranks, name)["counters"] for ranks in (1, 2))
    assert one == two and one["evictions/item_id"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", THREES)
def test_three_ranks_lose_what_one_loses(results: Results, name: str) -> None:
    assert worst(results[3][name]["losses"], results[-1][name]["losses"]) < 1e-5
    assert results[3][name]["counters"] == results[-1][name]["counters"]
    assert [0, 8] in results[3]["ranking-adam-three"]["shards"]["action"], "a rank without a row of the table"


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert worst(found["losses"], wanted["losses"][-len(found["losses"]) :]) < 1e-5
    assert found["counters"] == wanted["counters"]
    # Samples whose scores differ by rounding alone change places: ten pairs of an AUC after few steps.
    assert found["scores"] == pytest.approx(wanted["scores"], rel=1e-5, abs=5e-4)


@pytest.mark.parametrize("name", marked((*QUICK, *LATER)))
def test_tokens_and_heads_split_over_two_ranks(results: Results, name: str) -> None:
    two, one = (results.of(ranks, name) for ranks in (2, 1))
    assert_same(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_four_ranks_split_two_ways(results: Results, name: str) -> None:
    assert_same(results[4][name], results[-1][name])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", LATER)
def test_a_checkpoint_loads_however_ranks_are_split(results: Results, name: str, before: int, after: int) -> None:
    found = results.moved(before, after)[name]
    assert len(found["losses"]) == SPLITS[name].steps - SAVED_STEP
    assert_same(found, results[-1][name])


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_attention_round_the_ring_is_exact(results: Results, ranks: int) -> None:
    errors = results[ranks]["rings"]
    assert len(errors) > 20
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.parametrize("name", marked((*CASES, *QUICK)))
def test_the_losses_move(results: Results, name: str) -> None:
    """Otherwise a comparison of losses would say nothing about the steps."""
    losses = results.of(1, name)["losses"]
    assert max(losses) - min(losses) > 0.02 * losses[0]


@pytest.mark.parametrize("name", marked(PLAIN))
@pytest.mark.parametrize("ranks", [1, 2])
def test_plain_pytorch_loses_the_same(results: Results, name: str, ranks: int) -> None:
    plain = results.of(1, f"{name} plain")
    assert worst(results.of(ranks, name)["losses"][: len(plain)], plain) < 1e-5


@pytest.mark.parametrize("planted", FAULTS)
def test_a_wrong_average_is_caught(results: Results, planted: str) -> None:
    name = FAULTS[planted]
    assert worst(results[2][f"{name} {planted}"]["losses"], results[1][name]["losses"]) > 1e-4


def test_tables_are_really_sharded(results: Results) -> None:
    two = {name: results[2][name]["shards"] for name in FIRST}
    assert two["ranking-adam-row"]["item_id"] == [[60, 16], [60, 16]]
    assert two["ranking-sgd-table"]["item_id"] == [[120, 16]]
    assert two["ranking-adam-column"]["item_id"] == [[120, 128], [120, 128]]
    assert two["ranking-adam-replicated"] == {}
    assert two["ranking-adamw-widths"] == {
        "item_id": [[60, 24], [60, 24]],
        "segment": [[7, 16]],
    }  # a row for unknown values


def spread_rows(ranks: int) -> list[Any]:
    """Return how often each of 7 items is made on all ranks, and the gradient of each, three asked for by each rank."""
    asked = [item for rank in range(ranks) for item in range(rank, rank + 3)]
    return [[float(item in asked) for item in range(7)], [float(asked.count(item)) for item in range(7)]]


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_mesh(results: Results, ranks: int) -> None:
    rows = [[10.0 * r + 2 * i, 10.0 * r + 2 * i + 1] for r in range(ranks) for i in range(r)]
    for rank, facts in enumerate(results[ranks]["mesh"]):
        assert facts == {
            "gather": rows,
            "gather nothing": [0, 3],
            "gather flags": [True] + [False] * (ranks - 1),
            "sum": [ranks, sum(range(ranks))],
            "each on one rank": spread_rows(ranks),
            "broadcast": {"from": 0},
            "on main": "done by 0",
            "raised": "TrainerArgs.seed_of_rank_0 = 1: said",
            "any": [ranks > 1, False],
            "is main": rank == 0,
        }
