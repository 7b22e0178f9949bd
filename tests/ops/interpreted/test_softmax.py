"""The Triton cross-entropy against the float64 definition."""

from __future__ import annotations

import pytest
import torch

from hstu.ops.softmax import pool_cross_entropy
from tests.ops.softmax_cases import CASES, build, check


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


@pytest.mark.parametrize("change, message", [(dict(width=300), "too wide"), (dict(dtype=torch.float64), "float64")])
def test_what_the_kernels_do_not_do_is_refused(change: dict, message: str) -> None:
    problem = build((2, 3, change.get("width", 4), None, 1.0), change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        pool_cross_entropy(**problem, backend="triton")
