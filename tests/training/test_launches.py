"""What a step launches on a GPU and what it waits for, counted without one; ``tests/gpu`` asks a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.training import step
from tests.parallel.cases import WAITLESS, Case
from tests.samples import declared_features, make_dataset
from tests.training.launches import Asked, Counted, counted
from tests.training.runs import trainer

pytest.importorskip("triton")
#: The network, the loss and the optimizer of configs/ml_100k_retrieval.gin, 32 sequences a step.
ML_100K = (
    "DatasetArgs.contextual_feature_names=()",
    "NetworkArgs.preset='research'",
    "NetworkArgs.hidden_size=64",
    "NetworkArgs.num_attention_heads=1",
    "NetworkArgs.kv_channels=64",
    "NetworkArgs.hidden_dropout=0.3",
    "NetworkArgs.bias_query_time='next'",
    "NetworkArgs.max_attn_len=16",
    "RetrievalArgs.loss='full_softmax'",
    "OptimizerArgs.optimizer_str='adamw'",
)
#: MOST is what this step may launch beside the tables; docs/speed.md says of what it consists. An operator costs the
#: host some 6 us and a call of a function 0.2 us: with these bounds below 3 ms in all.
MOST, MOST_OPERATORS, MOST_CALLS = 250, 420, 1050
CASES = WAITLESS | {"ml-100k": Case("ml-100k", "retrieval", ML_100K)}
QUICK = ("ml-100k", "clipped", "declared", "dynamic-pipelined")
ROWS = torch.tensor([1, 0])
#: What a host waits for, if the tensor is on a device.
WAITS: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "_unique2": lambda x: x.unique(),
    "bincount": lambda x: x.bincount(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "repeat_interleave": lambda x: torch.arange(2).repeat_interleave(x),
    "index": lambda x: x[x > 0],
    "index_put_": lambda x: x.index_put_((x > 0,), ROWS),
    "index_put": lambda x: x.__setitem__(ROWS, 0),
    "tensor": lambda x: torch.tensor([0, 1], device=x.device),
    "to": lambda x: torch.tensor([0, 1]).to(x.device),
}
#: What it does not wait for.
WAITLESS_CALLS: tuple[Callable[[Tensor], object], ...] = (
    lambda x: x[0],
    lambda x: x[ROWS],
    lambda x: x.__setitem__(0, 0),
    lambda x: x.__setitem__(x > 0, 0),
    lambda x: x.__setitem__(ROWS, x.clone()),
    lambda x: x.index_fill_(0, ROWS, 0),
    lambda x: torch.arange(2).repeat_interleave(x, output_size=5),
    lambda x: x.repeat_interleave(2),
    lambda x: torch.tensor([0, 1]).to(x.device, non_blocking=True),
    lambda x: x.to(torch.int32),
)


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = np.random.default_rng(0).integers(2, 16, size=80)
    path = tmp_path_factory.mktemp("launches") / "synthetic"
    make_dataset(path, lengths.tolist(), num_actions=2, declared=declared_features())
    return path


def second_step(data: Path, path: Path, task: str, *bindings: str) -> Counted:
    """Count the second step of a run, in which nothing is done for the first time."""
    with trainer(data, path, task, *bindings) as run:
        run.model.train()
        steps = run.stepper.steps(run.loaders["train"].epoch(0, 0), run.progress)
        for batches in (next(steps), next(steps)):
            with counted(run) as count:
                run.stepper.take(batches, run.progress)
        steps.close()  # type: ignore[attr-defined]
        assert run.progress.dense_steps == 2 and count.launches["triton"] > 8
    return count


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted({*CASES} - {*QUICK}))]
)
def test_launches_and_waits_of_a_step(name: str, data: Path, declared: Path, tmp_path: Path) -> None:
    case = CASES[name]
    count = second_step(declared if case.data == "declared" else data, tmp_path, case.task, *case.bindings)
    assert not count.waits
    assert count.lookups == 1, "rows of batch and pool are asked for together"
    # By rows and by columns, for two layers forward and backward.
    assert sum(number for place, number in count.places.items() if place.endswith("_make_plan")) <= 3
    if name == "ml-100k":
        found = sum(count.launches.values()), count.operators, count.calls
        assert found[0] <= MOST, (found, count.places.most_common(20))
        assert found[1] <= MOST_OPERATORS and found[2] <= MOST_CALLS, found


@pytest.mark.parametrize("name", WAITS)
def test_each_kind_of_wait_is_found(name: str) -> None:
    with Counted() as count, Asked(count):
        WAITS[name](torch.tensor([2, 3]))
    assert [wait.split()[0] for wait in count.waits] == [name]


def test_what_needs_no_wait_is_none() -> None:
    with Counted() as count, Asked(count):
        for call in WAITLESS_CALLS:
            call(torch.tensor([2, 3]))
    assert not count.waits


def test_a_wait_is_found(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is asked for before its backward pass, and rows are chosen by a mask."""
    made = step._Check.__init__

    def asking(self: step._Check, mesh: object, loss: torch.Tensor) -> None:
        bool(loss > 0)
        loss.detach().expand(2)[torch.ones(2, dtype=torch.bool)]
        made(self, mesh, loss)  # type: ignore[arg-type]

    monkeypatch.setattr(step._Check, "__init__", asking)
    waits = second_step(data, tmp_path, "ranking").waits
    assert [wait.split()[0] for wait in waits if "step.py" in wait][-2:] == ["_local_scalar_dense", "index"]
