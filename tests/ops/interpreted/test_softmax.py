"""The Triton cross-entropy against the float64 definition."""

from __future__ import annotations

import pytest
import torch

from hstu.ops.softmax import pool_cross_entropy
from tests.ops.softmax_cases import CASES, build, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_sampled(name: str, dtype: torch.dtype) -> None:
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


def test_the_whole_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="chunked"):
        pool_cross_entropy(**build(CASES["all"], torch.float32), backend="triton")
