"""Weights that stay as they are or learn faster or slower, by prefixes of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config import ConfigError
from hstu.parallel import Mesh
from tests.tiny import write_tiny
from tests.training.runs import trainer

STEP = ("TrainerArgs.max_train_iters=2", "OptimizerArgs.optimizer_str='sgd'", "OptimizerArgs.learning_rate=0.1",
        "NetworkArgs.hidden_dropout=0.0", "EmbeddingArgs.sharding_type='data_parallel'")  # fmt: skip


@pytest.fixture(scope="module")
def mesh() -> Any:
    with Mesh.create() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("data") / "synthetic", num_users=40)


def moved(data: Path, run: Path, mesh: Mesh, *lines: str) -> dict[str, torch.Tensor]:
    """Return how far one step of SGD moves each dense weight."""
    with trainer(data, run, "retrieval", *STEP, *lines, mesh=mesh) as one:
        before = {name: value.clone() for name, value in one.parallel.dense.state().items()}
        one.stepper.take(next(one.stepper.steps(one.loaders["train"].epoch(0), one.progress)), one.progress)
        return {name: value - before[name] for name, value in one.parallel.dense.state().items()}


@pytest.mark.parametrize("optimizer", [(), ("OptimizerArgs.use_distributed_optimizer=True",
                                            "OptimizerArgs.optimizer_str='adam'")])  # fmt: skip
def test_prefixes_decide_which_weights_learn_and_how_fast(
    data: Path, tmp_path: Path, mesh: Mesh, optimizer: tuple[str, ...]
) -> None:
    plain = moved(data, tmp_path / "plain", mesh, *optimizer)
    factors = "OptimizerArgs.learning_rate_factors={'backbone.': 0.5, 'backbone.layers.1.': 2.0, 'replicated.': 0.25}"
    other = moved(data, tmp_path / "other", mesh, *optimizer, factors, "OptimizerArgs.freeze=('preprocess.',)")
    of = {"preprocess.": 0.0, "backbone.layers.1.": 2.0, "backbone.": 0.5, "replicated.": 0.25}
    seen = set()
    for name, change in plain.items():
        prefix, factor = next(((p, f) for p, f in of.items() if name.startswith(p)), ("", 1.0))
        torch.testing.assert_close(other[name], factor * change, rtol=1e-3, atol=2e-6)
        seen |= {prefix} if change.any() else set()
    assert {*of} <= seen


def test_a_prefix_that_no_weight_has_is_refused(data: Path, tmp_path: Path, mesh: Mesh) -> None:
    for line in ("OptimizerArgs.freeze=('backbon.',)", "OptimizerArgs.learning_rate_factors={'backbon.': 2.0}"):
        with (
            pytest.raises(ConfigError, match="no dense weight has a name that begins with 'backbon.'; they begin with"),
            trainer(data, tmp_path / "run", "retrieval", *STEP, line, mesh=mesh),
        ):
            pass


def test_frozen_weights_are_saved_and_loaded(data: Path, tmp_path: Path, mesh: Mesh) -> None:
    lines = ("OptimizerArgs.freeze=('backbone.layers.0.',)", "OptimizerArgs.optimizer_str='adam'")
    with trainer(data, tmp_path / "run", "retrieval", *STEP, *lines, mesh=mesh) as run:
        run._save()
        run.checkpointer.wait()
        saved = {name: value.clone() for name, value in run.parallel.dense.state().items()}
    with trainer(data, tmp_path / "run", "retrieval", *STEP, *lines, "TrainerArgs.seed=7", mesh=mesh) as run:
        run.resume(tmp_path / "run" / "checkpoints" / "step_000000000")
        loaded = run.parallel.dense.state()
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
