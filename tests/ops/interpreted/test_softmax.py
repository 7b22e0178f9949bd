"""The Triton cross-entropy against the float64 definition."""

from __future__ import annotations

import pytest
import torch

from hstu.ops.softmax import pool_cross_entropy
from tests.ops.softmax_cases import CASES, build, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    problem = build(CASES[name], dtype)
    exact = {key: x.double() if x.is_floating_point() else x for key, x in problem.items() if torch.is_tensor(x)}
    expected = results(problem | exact, "reference")
    plain, kernel = results(problem, "reference"), results(problem, "triton")
    assert torch.equal(kernel["live"], expected["live"])
    for key in expected:
        if key == "live" or not expected[key].numel():
            continue
        error, allowed = ((x[key].double() - expected[key]).abs().max() for x in (kernel, plain))
        assert error <= 3 * allowed + 2e-6 * expected[key].abs().max(), key


@pytest.mark.parametrize("change, message", [(dict(width=300), "too wide"), (dict(dtype=torch.float64), "float64")])
def test_what_the_kernels_do_not_do_is_refused(change: dict, message: str) -> None:
    problem = build((2, 3, change.get("width", 4), None, 1.0), change.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=message):
        pool_cross_entropy(**problem, backend="triton")
