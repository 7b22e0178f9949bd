"""Random cross-entropy problems for the tests of every backend."""

from __future__ import annotations

from typing import Any

import torch

from hstu.ops.softmax import pool_cross_entropy
from tests.ops.moved import moved

# tokens, pool, width, sampled columns (None: all of the pool), temperature
CASES: dict[str, tuple[int, int, int, int | None, float]] = {
    "all": (7, 19, 5, None, 1.0),
    "sampled": (7, 19, 5, 4, 0.2),
    "wide": (33, 70, 50, 20, 1.0),
    "all_wide": (18, 130, 64, None, 0.5),
    "all_odd": (35, 67, 25, None, 1.0),
    "all_wider": (5, 33, 256, None, 2.0),
    "one": (1, 1, 1, 1, 1.0),
    "all_one": (1, 1, 1, None, 1.0),
    "all_no_tokens": (0, 5, 3, None, 1.0),
    "empty_pool": (5, 0, 3, None, 1.0),
    "no_tokens": (0, 5, 3, 2, 1.0),
    "no_negatives": (5, 6, 3, 0, 1.0),
}


def build(case: tuple[int, int, int, int | None, float], dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``pool_cross_entropy``."""
    tokens, pool, width, sampled, temperature = case
    rng = torch.Generator().manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=rng, dtype=torch.float64).to(dtype)

    columns = None if sampled is None else torch.randint(0, pool, (tokens, sampled), generator=rng)
    return dict(
        query=normal(tokens),
        positive=normal(tokens),
        positive_ids=torch.randint(0, pool + 3, (tokens,), generator=rng),
        pool=normal(pool),
        pool_ids=torch.randperm(pool, generator=rng),
        temperature=temperature,
        columns=columns,
    )


def results(problem: dict[str, Any], backend: str) -> dict[str, torch.Tensor]:
    """Loss, number of live negatives and every gradient."""
    names = ("query", "positive", "pool")
    inputs = {name: problem[name].detach().clone().requires_grad_() for name in names}
    loss, live = pool_cross_entropy(**(problem | inputs), backend=backend)
    weights = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (loss * weights.to(loss)).sum().backward()
    return {"loss": loss.detach(), "live": live} | {f"d_{name}": inputs[name].grad for name in names}


def check(name: str, dtype: torch.dtype, device: str = "cpu", backend: str = "triton") -> None:
    """The error of a backend is at most three times that of the plain computation."""
    problem: dict[str, Any] = moved(build(CASES[name], dtype), device)
    exact = {key: x.double() if x.is_floating_point() else x for key, x in problem.items() if torch.is_tensor(x)}
    expected = results(problem | exact, "reference")
    plain, kernel = results(problem, "reference"), results(problem, backend)
    assert torch.equal(kernel["live"], expected["live"])
    for key in expected:
        if key == "live" or not expected[key].numel():
            continue
        error, allowed = ((x[key].double() - expected[key]).abs().max() for x in (kernel, plain))
        assert error <= 3 * allowed + 2e-6 * expected[key].abs().max(), key
