"""A resumed run is the unbroken run, and each part of the saved state is needed for that."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hstu.interrupt import Stopped
from hstu.training.checkpoint import Checkpointer
from hstu.training.checkpoint_files import find_checkpoint
from hstu.training.trainer import Trainer
from tests.launch import forked
from tests.training.runs import losses, records, trainer, worst

STEPS = 14
WORKER = Path(__file__).with_name("resume_worker.py")
VARIANTS = {
    "adam": ("ranking",),
    "adamw-cosine": ("ranking", "OptimizerArgs.optimizer_str='adamw'", "OptimizerArgs.weight_decay=0.1",
                     "OptimizerArgs.lr_schedule='cosine'", "OptimizerArgs.warmup_steps=5"),
    "momentum-linear": ("ranking", "OptimizerArgs.optimizer_str='sgd'", "OptimizerArgs.learning_rate=0.1",
                        "OptimizerArgs.sgd_momentum=0.9", "OptimizerArgs.lr_schedule='linear'",
                        "OptimizerArgs.sparse_optimizer_str='rowwise_adagrad'"),
    "replicated": ("ranking", "EmbeddingArgs.sharding_type='data_parallel'", "OptimizerArgs.clip_grad=0.1"),
    "retrieval": ("retrieval", "NetworkArgs.preset='research'", "EmbeddingArgs.sharding_type='table_wise'"),
    "accumulated": ("ranking", "TrainerArgs.gradient_accumulation_steps=2", "TrainerArgs.train_batch_size=16",
                    "OptimizerArgs.sparse_max_gradient=0.01", "OptimizerArgs.sparse_lr_schedule='linear'"),
    "dynamic": ("ranking", "DynamicEmbeddingArgs.capacity={'item_id': 67}", "TrainerArgs.train_batch_size=4"),
    "dynamic-pipelined": ("retrieval", "DynamicEmbeddingArgs.capacity={'item_id': 67}",
                          "TrainerArgs.train_batch_size=4", "DynamicEmbeddingArgs.min_count=2",
                          "TrainerArgs.pipeline_type='native'"),
    "distributed-optimizer": ("ranking", "OptimizerArgs.use_distributed_optimizer=True"),
}  # fmt: skip
TWO_RANKS = ("retrieval", "dynamic", "distributed-optimizer")


def broken_run(data: Path, path: Path, variant: str, forget: Callable[[Trainer, Path], None] | None = None) -> None:
    """Train 5 steps, forget everything but the files, and train to the end."""
    task, *bindings = VARIANTS[variant]
    with trainer(data, path, task, *bindings, f"TrainerArgs.max_train_iters={STEPS}") as first:
        train_until(first, 5)
    with trainer(data, path, task, *bindings, f"TrainerArgs.max_train_iters={STEPS}") as second:
        checkpoint = find_checkpoint(path / "checkpoints", "latest")
        assert checkpoint is not None
        second.resume(checkpoint)
        if forget is not None:
            forget(second, checkpoint)
        second.train()


def train_until(run: Trainer, step: int) -> None:
    """Train until a signal comes in step ``step``."""
    signalled = lambda: signal.SIGTERM if run.progress.step >= step else None  # noqa: E731
    with mock.patch("hstu.parallel.mesh.requested", signalled), pytest.raises(Stopped):
        run.train()


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of a variant that was never interrupted."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            task, *bindings = VARIANTS[variant]
            with trainer(data, made[variant], task, *bindings, f"TrainerArgs.max_train_iters={STEPS}") as whole:
                whole.train()
        return made[variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_unbroken_one(data: Path, unbroken: Any, tmp_path: Path, variant: str) -> None:
    broken_run(data, tmp_path, variant)
    for kind in ("train", "eval"):
        assert records(tmp_path, kind) == records(unbroken(variant), kind)
    assert losses(tmp_path).keys() == set(range(1, STEPS + 1))
    assert json.loads((tmp_path / "eval.json").read_text()) == json.loads((unbroken(variant) / "eval.json").read_text())


@pytest.mark.parametrize("evaluated", [0, STEPS])
def test_a_run_that_is_stopped_in_an_evaluation_makes_it_again(
    data: Path, unbroken: Any, tmp_path: Path, evaluated: int
) -> None:
    """Between two batches of the first validation (step 10), and of the test: what came before is saved."""
    bindings = (f"TrainerArgs.max_train_iters={STEPS}", "TrainerArgs.eval_batch_size=16")
    with trainer(data, tmp_path, "ranking", *bindings) as first:
        within = lambda: not first.model.training and first.progress.evaluated_step == evaluated  # noqa: E731
        signalled = mock.patch("hstu.parallel.mesh.requested", lambda: signal.SIGTERM if within() else None)
        with signalled, pytest.raises(Stopped) as caught:
            first.train()
    assert caught.value.exit_code == 143 and first.progress.step == (10 if evaluated == 0 else STEPS)
    checkpoint = find_checkpoint(tmp_path / "checkpoints", "latest")
    assert checkpoint is not None and checkpoint.name == f"step_{first.progress.step:09d}"
    with trainer(data, tmp_path, "ranking", *bindings) as second:
        second.resume(checkpoint)
        second.train()
    for kind in ("train", "eval"):
        assert records(tmp_path, kind) == records(unbroken("adam"), kind)
    assert json.loads((tmp_path / "eval.json").read_text()) == json.loads((unbroken("adam") / "eval.json").read_text())


def _forget_moments(run: Trainer, checkpoint: Path) -> None:
    for collection in run.parallel.tables.collections.values():
        for moments in collection.fused_optimizer.state_dict()["state"].values():
            for value in moments.values():
                for shard in value.local_shards():
                    shard.tensor.zero_()


def _forget_dense_moments(run: Trainer, checkpoint: Path) -> None:
    for moments in run.optimizer.dense.state.values():
        moments["exp_avg"].zero_()


def _forget_dense_step(run: Trainer, checkpoint: Path) -> None:
    for moments in run.optimizer.dense.state.values():
        moments["step"].zero_()


def _forget_position(run: Trainer, checkpoint: Path) -> None:
    epoch = type(run.loaders["train"]).epoch
    loader = run.loaders["train"]
    object.__setattr__(loader, "epoch", lambda number, first=0: epoch(loader, number, 0))


FORGOTTEN = {
    "tables' moments": _forget_moments,
    "tables' step": lambda run, checkpoint: run.parallel.tables.set_step(0),
    "dense moments": _forget_dense_moments,
    "dense step": _forget_dense_step,
    "random state": lambda run, checkpoint: torch.manual_seed(0),
    "data position": _forget_position,
}


@pytest.mark.parametrize("part", FORGOTTEN)
def test_each_part_of_the_state_matters(data: Path, unbroken: Any, tmp_path: Path, part: str) -> None:
    broken_run(data, tmp_path, "adam", FORGOTTEN[part])
    assert worst(losses(tmp_path), losses(unbroken("adam"))) > 1e-5


@pytest.mark.parametrize("part", ["ids", "scores", "clock"])
def test_each_part_of_a_row_map_matters(data: Path, unbroken: Any, tmp_path: Path, part: str) -> None:
    def forget(run: Trainer, checkpoint: Path) -> None:
        for name, value in run.parallel.tables.row_maps().items():
            if name.endswith(f"/{part}"):
                value[value < torch.iinfo(value.dtype).max] = torch.iinfo(torch.int64).max if part == "ids" else 0

    broken_run(data, tmp_path, "dynamic", forget)
    assert worst(losses(tmp_path), losses(unbroken("dynamic"))) > 1e-5


def test_nothing_but_the_checkpoint_is_carried_over(data: Path, unbroken: Any, tmp_path: Path) -> None:
    """A checkpoint whose tensors are not loaded gives another run."""
    broken_run(data, tmp_path, "adam", lambda run, checkpoint: _forget_weights(run))
    assert worst(losses(tmp_path), losses(unbroken("adam"))) > 1e-3


def _forget_weights(run: Trainer) -> None:
    run.parallel.tables.fill()


def test_log_lines_go_on_across_a_resume(data: Path, tmp_path: Path) -> None:
    """The mean loss of a line is over all of its steps, those before the interruption too."""
    bindings = ("TrainerArgs.log_interval=7", f"TrainerArgs.max_train_iters={STEPS}")
    for name in ("whole", "broken"):
        with trainer(data, tmp_path / name, "ranking", *bindings) as first:
            if name == "broken":
                train_until(first, 3)
            else:
                first.train()
    with trainer(data, tmp_path / "broken", "ranking", *bindings) as second:
        second.resume(find_checkpoint(tmp_path / "broken" / "checkpoints", "latest"))  # type: ignore[arg-type]
        second.train()
    assert worst(losses(tmp_path / "broken"), losses(tmp_path / "whole")) < 1e-12


def test_two_ranks_resume(data: Path, tmp_path: Path) -> None:
    done = forked(WORKER, str(data), str(tmp_path), ranks=2, cwd=tmp_path)
    assert done.code == 0, done.err[-4000:]
    for variant in TWO_RANKS:
        whole, broken = tmp_path / variant / "whole", tmp_path / variant / "broken"
        assert records(whole) == records(broken), variant
        assert records(whole, "eval") == records(broken, "eval"), variant
    forgetful = tmp_path / "dynamic" / "forgetful"
    assert worst(losses(forgetful), losses(tmp_path / "dynamic" / "whole")) > 1e-5, "rank 1 has its own random state"


def test_saving_changes_nothing(data: Path, unbroken: Any, tmp_path: Path) -> None:
    with trainer(
        data, tmp_path, "ranking", f"TrainerArgs.max_train_iters={STEPS}", "TrainerArgs.ckpt_save_interval=1"
    ) as often:
        often.train()
    assert records(tmp_path) == records(unbroken("adam"))


def test_a_save_is_complete_before_it_is_there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails before its marker leaves nothing that a loader would take."""

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=2") as one:
        monkeypatch.setattr(Checkpointer, "_complete", fail)
        with pytest.raises(OSError, match="disk full"):
            one.train()
    assert find_checkpoint(tmp_path / "checkpoints", "latest") is None
    assert not list((tmp_path / "checkpoints").glob("step_*"))
