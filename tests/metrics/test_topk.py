"""Top-k in chunks is the top-k of everything: ties, seen items, short last chunks, ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.metrics import topk
from hstu.metrics.topk import TopK, best_of, top_k

Chunks = Iterator[tuple[int, Tensor]]


def chunks(vectors: Tensor, size: int, first: int = 0) -> Chunks:
    return ((first + start, vectors[start : start + size]) for start in range(0, vectors.shape[0], size))


def by_sorting(queries: Tensor, vectors: Tensor, k: int, seen: tuple[Tensor, Tensor] | None = None) -> TopK:
    """The definition: sort all scores, of equal ones the lower id first."""
    scores = queries @ vectors.T
    if seen is not None:
        scores[seen] = float("-inf")
    scores = scores.nan_to_num(float("-inf"), float("inf"), float("-inf")).numpy()
    items = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, items, 1)
    items = np.where(np.isinf(scores) & (scores < 0), -1, items)
    missing = ((0, 0), (0, k - items.shape[1]))
    return TopK(
        items=torch.from_numpy(np.pad(items, missing, constant_values=-1)),
        scores=torch.from_numpy(np.pad(scores, missing, constant_values=-np.inf)),
    )


def check(found: TopK, expected: TopK) -> None:
    assert torch.equal(found.items, expected.items)
    assert torch.equal(found.scores, expected.scores)


def whole_numbers(*shape: int, seed: int, span: int = 3) -> Tensor:
    """Small whole numbers: products are exact in any order, and many scores are equal."""
    return torch.randint(-span, span + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("span", [0, 1, 40])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("size", [1, 7, 64, 200, 1000])
def test_chunks_change_nothing(size: int, k: int, span: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk, "_SCORES_AT_ONCE", 800)  # several blocks of queries
    queries, vectors = whole_numbers(9, 4, seed=0), whole_numbers(333, 4, seed=1, span=span)
    rows, items = torch.randint(9, (200,)), torch.randint(333, (200,))
    seen = torch.cat([rows, torch.full((333,), 3)]), torch.cat([items, torch.arange(333)])  # query 3 has seen all
    check(top_k(queries, chunks(vectors, size), k, seen=seen), by_sorting(queries, vectors, k, seen))
    keep = torch.rand(333) < 0.2
    out = (~keep).nonzero().squeeze(1)
    left_out = torch.arange(9).repeat_interleave(out.numel()), out.repeat(9)
    every = tuple(torch.cat(parts) for parts in zip(seen, left_out, strict=True))
    check(top_k(queries, chunks(vectors, size), k, seen=seen, keep=keep), by_sorting(queries, vectors, k, every))


def test_fewer_items_than_k():
    queries, vectors = whole_numbers(2, 4, seed=0), whole_numbers(5, 4, seed=1)
    found = top_k(queries, chunks(vectors, 2), 8)
    check(found, by_sorting(queries, vectors, 8))
    assert (found.items[:, 5:] == -1).all() and (found.scores[:, 5:] == -torch.inf).all()


def truncating(queries: Tensor, parts: Chunks, k: int) -> TopK:
    """A chunked top-k with the public fault: what the last chunk cannot fill is lost from the result."""
    best = by_sorting(queries, next(parts)[1], k)
    for first, vectors in parts:
        scores, order = torch.cat([best.scores, queries @ vectors.T], 1).topk(min(k, vectors.shape[0]))
        items = torch.cat([best.items, (first + torch.arange(vectors.shape[0])).expand(len(queries), -1)], 1)
        best = TopK(items=items.gather(1, order), scores=scores)
    return best


@pytest.mark.parametrize(("function", "sound"), [(top_k, True), (truncating, False)])
def test_a_short_last_chunk_truncates_nothing(function: Callable[..., TopK], sound: bool):
    queries, vectors = torch.rand(3, 4) + 0.1, torch.rand(103, 4)
    vectors[102] = 2.0  # the best item is alone in the last chunk
    expected, found = by_sorting(queries, vectors, 10), function(queries, chunks(vectors, 51), 10)
    assert (expected.items[:, 0] == 102).all() and (found.items[:, 0] == 102).all()
    assert (found.items.shape == expected.items.shape and torch.equal(found.items, expected.items)) == sound


def test_scores_that_are_no_numbers_are_left_out_and_zeros_are_equal():
    vectors = torch.tensor([[float("nan")], [-0.0], [0.0], [float("inf")], [-1.0]])
    found = top_k(torch.ones(1, 1), [(0, vectors)], 5)
    assert found.items.tolist() == [[3, 1, 2, 4, -1]]


def test_ids_beyond_what_float32_holds():
    vectors = whole_numbers(70, 4, seed=1)
    found = top_k(whole_numbers(3, 4, seed=0), chunks(vectors, 16, first=2**31 - 3), 20)
    assert torch.equal(found.items - (2**31 - 3), by_sorting(whole_numbers(3, 4, seed=0), vectors, 20).items)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_ranks_are_merged(ranks: int):
    queries, vectors = whole_numbers(5, 4, seed=0), whole_numbers(31, 4, seed=1)
    share = -(-31 // ranks)
    partial: list[Tensor] = []

    def keep(keys: Tensor) -> Tensor:
        partial.append(keys)
        return keys

    for rank in range(ranks):
        part = vectors[rank * share : (rank + 1) * share]
        top_k(queries, chunks(part, 4, first=rank * share), 7, gather=keep)
    joined = top_k(queries, [], 7, gather=lambda keys: torch.cat(partial))
    check(joined, by_sorting(queries, vectors, 7))


def test_no_block_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk, "_SCORES_AT_ONCE", 640)
    sizes = []

    def score(queries: Tensor, vectors: Tensor) -> Tensor:
        sizes.append(queries.shape[0] * vectors.shape[0])
        return queries @ vectors.T

    queries, vectors = torch.rand(50, 4), torch.rand(512, 4)
    found = top_k(queries, chunks(vectors, 64), 3, score=score)
    assert sum(sizes) == 50 * 512 and max(sizes) <= 640
    assert torch.equal(found.items, by_sorting(queries, vectors, 3).items)


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="k = 0"):
        top_k(torch.ones(1, 1), [], 0)


@pytest.mark.parametrize("at_once", [1 << 25, 30])
@pytest.mark.parametrize("k", [1, 4, 9])
def test_the_best_of_some_candidates(k: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "_SCORES_AT_ONCE", at_once)
    rng = torch.Generator().manual_seed(0)
    queries, vectors = torch.randint(-2, 3, (5, 3), generator=rng).float(), torch.randint(-2, 3, (20, 3)).float()
    candidates = torch.stack([torch.randperm(20, generator=rng)[:6] for _ in range(5)])
    candidates[1, 2:4], candidates[2] = -1, -1
    allowed = torch.zeros(5, 21, dtype=torch.bool).scatter_(1, candidates.where(candidates >= 0, 20), True)[:, :20]
    expected = by_sorting(queries, vectors, k, seen=(~allowed).nonzero(as_tuple=True))

    def score(q: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("qd,qcd->qc", q, x)

    check(best_of(queries, candidates, (0, vectors), k, score=score), expected)
    parts = [(0, vectors[:7]), (7, vectors[7:]), (20, vectors[:0])]
    keys: list[Tensor] = []

    def keep(own: Tensor) -> Tensor:
        keys.append(own)
        return torch.cat([*keys, *[torch.full_like(own, topk._NONE)] * (len(parts) - len(keys))])

    found = [best_of(queries, candidates, part, k, score=score, gather=keep) for part in parts]
    check(found[-1], expected)
