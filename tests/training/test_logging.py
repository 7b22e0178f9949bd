"""Weights & Biases: what it is given, and that a run without it can be gone on with, scored and asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hstu.config import ConfigError
from hstu.training.checkpoint_files import find_checkpoint
from hstu.training.hardware import PEAKS, peak_of, present_peak
from hstu.training.logging import check_loggers
from tests.training.runs import trainer

WANDB = ("TrainerArgs.loggers=('wandb',)", "TrainerArgs.wandb_project='shop'", "TrainerArgs.wandb_group='nightly'")


class Calls:
    """Stands in for the wandb module, and keeps what it is told."""

    Error = RuntimeError

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[int] = []

    def init(self, **given: Any) -> SimpleNamespace:
        self.started.append(given)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda exit_code: self.ended.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "wandb", calls)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    return calls


def test_a_run_and_what_goes_on_with_it_are_one_run_of_wandb(data: Path, tmp_path: Path, wandb: Calls) -> None:
    for limit in (2, 3):
        with trainer(data, tmp_path / "mine", "ranking", *WANDB, f"TrainerArgs.max_train_iters={limit}") as run:
            latest = find_checkpoint(tmp_path / "mine" / "checkpoints", "latest")
            if latest is not None:
                run.resume(latest)
            run.train()
    first, second = wandb.started
    assert first["id"] == second["id"] == (tmp_path / "mine" / "wandb_id").read_text()
    assert first["resume"] == "allow" and first["dir"] == str(tmp_path / "mine") and first["name"] == "mine"
    assert (first["project"], first["group"]) == ("shop", "nightly")
    assert first["config"]["network"]["hidden_size"] == 16 and "retrieval" not in first["config"]
    json.dumps(first["config"])
    train = [(step, values["train/loss"]) for step, values in wandb.logged if "train/loss" in values]
    lines = map(json.loads, (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines())
    assert train == [(r["step"], r["loss"]) for r in lines if r["kind"] == "train"] and len(train) == 3
    assert {name for _, values in wandb.logged for name in values} >= {"valid/AUC", "test/AUC", "train/gradient_norm"}
    assert wandb.ended == [0, 0]


def test_another_run_directory_is_another_run(data: Path, tmp_path: Path, wandb: Calls) -> None:
    for name in ("a", "b"):
        with trainer(data, tmp_path / name, "ranking", *WANDB, "TrainerArgs.max_train_iters=1") as run:
            run.train()
    assert wandb.started[0]["id"] != wandb.started[1]["id"]


def test_a_run_that_fails_says_so_to_wandb(
    data: Path, tmp_path: Path, wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer(data, tmp_path, "ranking", *WANDB, "TrainerArgs.max_train_iters=1") as run:
        monkeypatch.setattr(run, "_loop", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.train()
    assert wandb.ended == [1]


def test_a_wandb_that_cannot_start_is_one_line(
    data: Path, tmp_path: Path, wandb: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("No API key configured.\nUse wandb login")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        trainer(data, tmp_path, "ranking", *WANDB) as run,
        pytest.raises(ConfigError, match=r"cannot start \(No API key configured. Use wandb login\); run wandb login"),
    ):
        run.train()


def test_without_wandb_training_is_refused_and_a_trained_model_opens(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for refused in (lambda: check_loggers(("wandb",)), run_of(data, tmp_path)):
        with pytest.raises(ValueError, match=r"TrainerArgs.loggers asks for 'wandb'.*pip install"):
            refused()


def run_of(data: Path, path: Path) -> Any:
    """Make a trainer, which needs no logger, and return how to train it."""

    def train() -> None:
        with trainer(data, path, "ranking", "TrainerArgs.loggers=('wandb',)") as run:
            run.train()

    return train


DEVICES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 3090 Ti": 80e12,
    "Tesla V100-SXM2-16GB": None,
}


def test_the_peak_of_a_gpu_is_known_by_its_name() -> None:
    for name, peak in DEVICES.items():
        found = peak_of(name)
        assert found is not None and found.of("bfloat16") == peak, name
    assert peak_of("Tesla V100-SXM2-16GB").of("float32") == 15.7e12  # type: ignore[union-attr]
    others = ("AMD Instinct MI300X", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
              "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Quadro RTX 6000")  # fmt: skip
    assert [peak_of(name) for name in others] == [None] * len(others)
    assert all(peak.bfloat16 is None or peak.bfloat16 > peak.float32 for peak in PEAKS.values())


@pytest.mark.parametrize(("name", "dtype", "peak"), [
    ("NVIDIA L4", "float32", 30.3e12), ("Tesla V100-SXM2-16GB", "bfloat16", None), ("Some GPU", "float32", None),
])  # fmt: skip
def test_an_unknown_peak_is_said_once(
    name: str, dtype: str, peak: float | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    with caplog.at_level("INFO", "hstu"):
        assert present_peak(dtype) == peak
    said = f"no MFU: the peak of {name} in {dtype} is not known"
    assert caplog.messages == ([] if peak else [said])
