"""The learning rate over steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hstu.config import ConfigError, OptimizerArgs
from hstu.training.schedule import schedule_factor


def rates(total: int, **fields: Any) -> list[float]:
    args = OptimizerArgs(**{"optimizer_str": "adam", "learning_rate": 0.5, **fields})
    return [args.learning_rate * schedule_factor(args, step, total) for step in range(total + 1)]


def test_constant_by_default() -> None:
    assert rates(7) == [0.5] * 8


def test_warm_up_is_linear_and_its_first_step_already_moves() -> None:
    assert rates(6, warmup_steps=4) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("warmup", [0, 3])
def test_linear_and_cosine_start_at_the_peak_and_end_at_the_minimum(warmup: int) -> None:
    total = 13
    for kind in ("linear", "cosine"):
        found = rates(total, lr_schedule=kind, warmup_steps=warmup, min_learning_rate=0.1)
        assert found[warmup] == pytest.approx(0.5) and found[-1] == pytest.approx(0.1)
        for step in range(warmup, total + 1):
            share = (step - warmup) / (total - warmup)
            shape = 1 - share if kind == "linear" else (1 + math.cos(math.pi * share)) / 2
            assert found[step] == pytest.approx(0.1 + 0.4 * shape)
        assert found[warmup:] == sorted(found[warmup:], reverse=True)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_training_shorter_than_the_warm_up_and_longer_than_planned(kind: str) -> None:
    args = OptimizerArgs(optimizer_str="adam", learning_rate=0.5, warmup_steps=10, lr_schedule=kind)  # type: ignore[arg-type]
    assert schedule_factor(args, 4, 5) == pytest.approx(0.5)
    assert 0 <= schedule_factor(args, 500, 20) <= 1


def test_tables_have_a_schedule_of_their_own() -> None:
    shared = dict(optimizer_str="adam", learning_rate=0.5, warmup_steps=2, lr_schedule="linear", min_learning_rate=0.1)
    own = dict(sparse_learning_rate=0.25, sparse_warmup_steps=0, sparse_lr_schedule="cosine")
    for step in range(11):
        args = OptimizerArgs(**shared)  # type: ignore[arg-type]
        assert schedule_factor(args, step, 10) == schedule_factor(args, step, 10, sparse=True), (
            "by default the dense one"
        )
        args = OptimizerArgs(**shared, **own, sparse_min_learning_rate=0.05)  # type: ignore[arg-type]
        expected = 0.2 + 0.8 * (1 + math.cos(math.pi * step / 10)) / 2
        assert schedule_factor(args, step, 10, sparse=True) == pytest.approx(expected)
        assert schedule_factor(args, step, 10) == schedule_factor(OptimizerArgs(**shared), step, 10)  # type: ignore[arg-type]


def test_a_minimum_above_the_peak_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"OptimizerArgs.min_learning_rate = 1.0: must not be above"):
        rates(3, min_learning_rate=1.0)
