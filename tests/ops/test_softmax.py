"""Cross-entropy against a pool: every backend against the definition in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hstu.ops import loops, softmax
from hstu.ops.softmax import chunked, compiled, pool_cross_entropy, sampled
from hstu.ops.softmax.problem import Problem
from tests.ops.softmax_cases import CASES, build, check, results


@pytest.mark.parametrize("elements", [1 << 19, 64])
@pytest.mark.parametrize("name", CASES)
def test_chunks(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CPU_ELEMENTS", elements)
    problem = build(CASES[name], torch.float64)
    expected, ours = (results(problem, backend) for backend in ("reference", "chunked"))
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], msg=key)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_sampled(name: str) -> None:
    problem = build(CASES[name], torch.float64)
    expected, ours = (results(problem, backend) for backend in ("reference", "sampled"))
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], msg=key)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3] is not None])
def test_sampled_in_compiled_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "SHARE_WORK", 64)
    monkeypatch.setattr(compiled, "GROUP_SHARE", 1)
    check(name, torch.float32, backend="sampled")
    found = results(build(CASES[name], torch.float32), "sampled")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    again = results(build(CASES[name], torch.float32), "sampled")
    torch.set_num_threads(before)
    assert all(torch.equal(found[key], again[key]) for key in found)


def test_a_large_pool_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = build(CASES["wide"], torch.float32)
    with loops.torch_only():
        expected = results(problem, "sampled")
    monkeypatch.setattr(sampled, "CACHED", 10)
    found = results(problem, "sampled")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_few_columns_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []

    def spy(query: torch.Tensor, positive: torch.Tensor, pool: torch.Tensor, problem: Problem) -> tuple:
        called.append(problem.columns.shape[1])
        return sampled.pool_cross_entropy_sampled(query, positive, pool, problem)

    monkeypatch.setattr(softmax, "pool_cross_entropy_sampled", spy)
    for count in (2, 10, 30):
        results(build((5, 60, 3, count, 1.0), torch.float32), "auto")
        with loops.torch_only():
            results(build((5, 60, 3, count, 1.0), torch.float32), "auto")
    assert called == [2, 2, 10], "compiled loops also take some more"


def test_the_whole_catalogue_is_the_full_softmax() -> None:
    rng = torch.Generator().manual_seed(0)
    query, items = torch.randn(9, 4, generator=rng), torch.randn(20, 4, generator=rng)
    target = torch.randint(0, 20, (9,), generator=rng)
    loss, live = pool_cross_entropy(query, items[target], target, items, torch.arange(20), temperature=0.3)
    torch.testing.assert_close(loss, F.cross_entropy(query @ items.T / 0.3, target, reduction="none"))
    assert live.tolist() == [19] * 9


def test_extreme_scores_stay_finite() -> None:
    query = torch.tensor([[100.0], [-100.0]], requires_grad=True)
    pool = torch.tensor([[10.0], [-10.0]], requires_grad=True)
    loss, _ = pool_cross_entropy(query, pool[:1].expand(2, 1), torch.tensor([7, 7]), pool, torch.tensor([0, 1]))
    loss.sum().backward()
    assert bool(loss.isfinite().all() and query.grad.isfinite().all() and pool.grad.isfinite().all())


def test_only_the_query_needs_a_gradient() -> None:
    problem = build(CASES["sampled"], torch.float64)
    expected = results(problem, "reference")["d_query"]
    query = problem["query"].clone().requires_grad_()
    loss, _ = pool_cross_entropy(**(problem | {"query": query}))
    weights = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (loss * weights).sum().backward()
    torch.testing.assert_close(query.grad, expected)


def test_memory_does_not_hold_the_scores() -> None:
    saved: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    query, pool = torch.randn(300, 2, requires_grad=True), torch.randn(500, 2, requires_grad=True)
    ids = torch.zeros(300, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        pool_cross_entropy(query, query.detach(), ids, pool, torch.arange(500))
    assert sum(saved) < 3000


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(positive=torch.zeros(1, 1)), "share one shape"),
        (dict(pool=torch.zeros(3, 99)), "pool must be"),
        (dict(pool_ids=torch.zeros(2).long()), "pool_ids must be"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(columns=torch.full((7, 3), 99)), "places in the pool"),
        (dict(backend="fast"), "choose one of"),
        (dict(stocked=torch.ones(60, dtype=torch.bool)), "columns choose items alone"),
        (dict(stocked=torch.ones(2), columns=None), "stocked must be"),
        (dict(backend="sampled", columns=None), "for sampled columns"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    problem = build(CASES["sampled"], torch.float32)
    with pytest.raises(ValueError, match=message):
        pool_cross_entropy(**(problem | change))
