"""Batches in flight change nothing but time."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hstu.models.losses import LossSum
from hstu.parallel.pipeline import CachedLookupPipeline, LookupPipeline
from hstu.training.checkpoint_files import find_checkpoint
from hstu.training.step import Stepper
from tests.training.runs import records, trainer

NATIVE = ("TrainerArgs.pipeline_type='native'",)
LIMITS = ("TrainerArgs.max_train_iters=14", "TrainerArgs.eval_interval=3", "TrainerArgs.ckpt_save_interval=5")
REPLICATED = "EmbeddingArgs.table_sharding_types={'segment': 'data_parallel'}"
VARIANTS: dict[str, tuple[str, ...]] = {
    "ranking": ("ranking",),
    "accumulated": ("ranking", "TrainerArgs.gradient_accumulation_steps=3", "TrainerArgs.train_batch_size=11"),
    "widths": ("ranking", "NetworkArgs.item_embedding_dim=22", REPLICATED),
    "uniform": ("retrieval",),
    "in-batch": ("retrieval", "RetrievalArgs.num_negatives=-1"),
    "bce": ("retrieval", "RetrievalArgs.loss='bce'", "RetrievalArgs.num_negatives=1"),
    "cached": ("ranking", "EmbeddingArgs.uvm_caching_tables=('item_id',)"),
    "masked": ("retrieval", "NetworkArgs.backbone='bert'"),
}
SLOW = ("widths", "uniform", "bce")
QUICK = tuple(name for name in VARIANTS if name not in SLOW)


@pytest.mark.parametrize("variant", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_same_records_as_without(data: Path, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, evaluations, saves, and epochs of 4 steps."""
    (task, *bindings), ahead, run_one = VARIANTS[variant], [], LookupPipeline.run

    def watch(self: LookupPipeline, batch: Any, compute: Any) -> Any:
        result = run_one(self, batch, compute)
        ahead.append(len(self.batches))
        return result

    brought, prefetch = Counter[type](), CachedLookupPipeline._prefetch

    def bring(self: CachedLookupPipeline, context: Any) -> None:
        prefetch(self, context)
        brought[type(self)] += 1

    monkeypatch.setattr(LookupPipeline, "run", watch)
    monkeypatch.setattr(CachedLookupPipeline, "_prefetch", bring)
    for name, kind in (("plain", ()), ("native", NATIVE)):
        with trainer(data, tmp_path / name, task, *bindings, *LIMITS, *kind) as run:
            run.train()
    assert records(tmp_path / "native") == records(tmp_path / "plain")
    assert records(tmp_path / "native", "eval") == records(tmp_path / "plain", "eval")
    assert max(ahead) >= 1 and ahead[-1] == 0, "batches were in flight"
    assert [*brought] == ([CachedLookupPipeline] if variant == "cached" else [])


def test_a_pipeline_that_computes_another_step_is_caught(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tee = itertools.tee
    monkeypatch.setattr(itertools, "tee", lambda source: (lambda a, b: (a, itertools.islice(b, 1, None)))(*tee(source)))
    with trainer(data, tmp_path, "ranking", *LIMITS, *NATIVE) as run, pytest.raises(AssertionError, match="another"):
        run.train()


def test_a_resumed_run_goes_on_the_same(data: Path, tmp_path: Path) -> None:
    for name, limits in (("whole", (14,)), ("broken", (7, 14))):
        for limit in limits:
            bindings = (*NATIVE, *LIMITS[1:], f"TrainerArgs.max_train_iters={limit}")
            with trainer(data, tmp_path / name, "retrieval", *bindings) as run:
                latest = find_checkpoint(tmp_path / name / "checkpoints", "latest")
                if latest is not None:
                    run.resume(latest)
                run.train()
    assert records(tmp_path / "broken") == records(tmp_path / "whole")


def test_a_skipped_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps are skipped, and what is in flight is not lost."""
    take = Stepper.take

    def infinite(loss: LossSum) -> LossSum:
        return replace(loss, total=loss.total / 0)

    def breaking(self: Stepper, batches: Any, progress: Any) -> float:
        loss = self.model.loss
        if progress.step + 1 == 5:
            self.model.loss = lambda *args: infinite(loss(*args))
        try:
            return take(self, batches, progress)
        finally:
            self.model.loss = loss

    monkeypatch.setattr(Stepper, "take", breaking)
    for name, kind in (("plain", ()), ("native", NATIVE)):
        with trainer(data, tmp_path / name, "ranking", *LIMITS, *kind, "TrainerArgs.nonfinite_loss='skip'") as run:
            run.train()
        assert run.progress.dense_steps == 13
    assert records(tmp_path / "native") == records(tmp_path / "plain")
