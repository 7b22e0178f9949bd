"""What a step launches on a GPU and what it waits for, counted without one; ``tests/gpu`` asks a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hstu.training import step
from tests.training.launches import Counted, counted
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
BCE = ("RetrievalArgs.loss='bce'", "RetrievalArgs.num_negatives=1")
IN_BATCH = ("RetrievalArgs.num_negatives=-1", "RetrievalArgs.sampling_strategy='in_batch'")
CASES: dict[str, tuple[str, ...]] = {
    "ml-100k": ("retrieval", *ML_100K),
    "ranking": ("ranking", "OptimizerArgs.clip_grad=0.5"),
    "in batch": ("retrieval", *IN_BATCH),
    "one negative": ("retrieval", *BCE),
}
SLOW = ("in batch", "one negative")


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


@pytest.mark.parametrize("name", ["ml-100k", "ranking", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_launches_and_waits_of_a_step(name: str, data: Path, tmp_path: Path) -> None:
    count = second_step(data, tmp_path, *CASES[name])
    assert not count.waits
    assert count.lookups == 1, "rows of batch and pool are asked for together"
    # By rows and by columns, for two layers forward and backward.
    assert sum(number for place, number in count.places.items() if place.endswith("_make_plan")) <= 3
    if name == "ml-100k":
        found = sum(count.launches.values()), count.operators, count.calls
        assert found[0] <= MOST, (found, count.places.most_common(20))
        assert found[1] <= MOST_OPERATORS and found[2] <= MOST_CALLS, found


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
