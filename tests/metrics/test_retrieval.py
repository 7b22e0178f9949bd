"""Ranks among ties, HR, NDCG, MRR, and what is left out of the ranking."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hstu.metrics import retrieval
from hstu.metrics.retrieval import per_user_metric, sampled_ranks, target_ranks


def naive_rank(scores: list[float], target: int, excluded: set[int]) -> float:
    if target in excluded:
        return math.inf
    others = [s for j, s in enumerate(scores) if j != target and j not in excluded]
    return 1 + sum(s > scores[target] for s in others) + sum(s == scores[target] for s in others) / 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("wide", [9, 10])
def test_ranks_with_ties_and_exclusions_are_those_of_a_loop(
    seed: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "_WIDE", wide)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (12, 9), generator=generator).float()
    targets = torch.randint(9, (12,), generator=generator)
    out = torch.rand(12, 9, generator=generator) < 0.4
    rows, columns = out.nonzero(as_tuple=True)
    expected = [
        naive_rank(scores[b].tolist(), int(targets[b]), set(out[b].nonzero().flatten().tolist())) for b in range(12)
    ]
    assert target_ranks(scores.clone(), targets, (rows, columns)).tolist() == expected
    plain = [naive_rank(scores[b].tolist(), int(targets[b]), set()) for b in range(12)]
    assert target_ranks(scores.clone(), targets).tolist() == plain


def test_a_constant_model_gets_chance() -> None:
    targets = torch.arange(100)
    ranks = target_ranks(torch.zeros(100, 100), targets)
    assert ranks.tolist() == [50.5] * 100
    assert float(per_user_metric("HR@10", ranks).mean()) == 0.0
    assert float(per_user_metric("HR@51", ranks).mean()) == 1.0


def test_a_target_that_is_left_out_is_a_miss() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0]])
    everything = (torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2]))
    ranks = target_ranks(scores.clone(), torch.tensor([0]), everything)
    assert [float(per_user_metric(name, ranks)) for name in ("HR@10", "NDCG@10", "MRR")] == [0, 0, 0]
    seen = (torch.tensor([0, 0]), torch.tensor([0, 0]))  # an item may have been seen twice
    assert target_ranks(scores.clone(), torch.tensor([1]), seen).tolist() == [2.0]


def test_seen_items_are_left_out_of_their_own_row_only() -> None:
    scores = torch.tensor([[5.0, 1.0, 3.0], [5.0, 1.0, 3.0]])
    ranks = target_ranks(scores, torch.tensor([1, 1]), (torch.tensor([0]), torch.tensor([0])))
    assert ranks.tolist() == [2.0, 3.0]


def test_ranks_are_float64_whatever_the_scores() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert target_ranks(torch.tensor([[0.0, 0.0]], dtype=dtype), torch.tensor([0])).dtype == torch.float64


@pytest.mark.parametrize("target", [0, 1])
def test_a_model_that_is_not_a_number_is_last_and_not_first(target: int) -> None:
    broken = torch.full((1, 50), math.nan)
    assert target_ranks(broken.clone(), torch.tensor([target])).tolist() == [math.inf]
    broken[0, 1] = 0.5
    assert target_ranks(broken, torch.tensor([target])).tolist() == [[math.inf, 50.0][target]]


def assert_hits_include_rank_k(hit: object) -> None:
    ranks = torch.tensor([1.0, 9.5, 10.0, 10.5, 11.0], dtype=torch.float64)
    assert hit(ranks).tolist() == [1, 1, 1, 0, 0]  # type: ignore[operator]


def test_hit_rate_includes_rank_k() -> None:
    assert_hits_include_rank_k(lambda ranks: per_user_metric("HR@10", ranks))
    assert per_user_metric("HR@1", torch.tensor([1.0, 2.0])).tolist() == [1, 0]


def test_a_strict_comparison_is_caught() -> None:
    def strict(ranks: Tensor) -> Tensor:
        return (ranks < 10).double()

    with pytest.raises(AssertionError):
        assert_hits_include_rank_k(strict)


def test_ndcg_and_mrr_of_known_ranks() -> None:
    ranks = torch.tensor([1.0, 2.0, 3.0, 10.0, 11.0, 2.5], dtype=torch.float64)
    expected = [1 / math.log2(r + 1) if r <= 10 else 0.0 for r in ranks.tolist()]
    torch.testing.assert_close(per_user_metric("NDCG@10", ranks), torch.tensor(expected, dtype=torch.float64))
    assert per_user_metric("NDCG@10", ranks)[0] == 1.0
    torch.testing.assert_close(per_user_metric("MRR", ranks), 1 / ranks)


@pytest.mark.parametrize("count", [0, 3, 50])
def test_sampled_ranks_are_those_among_the_drawn_items(count: int) -> None:
    rng = torch.Generator().manual_seed(0)
    scores, targets = torch.randint(-3, 4, (12, 20), generator=rng).float(), torch.randint(20, (12,), generator=rng)
    priorities = torch.rand(12, 20, generator=rng)
    seen = (torch.rand(12, 20, generator=rng) < 0.5).nonzero(as_tuple=True)
    expected = []
    for row in range(12):
        free = set(range(20)) - set(seen[1][seen[0] == row].tolist()) - {int(targets[row])}
        drawn = sorted(free, key=lambda item: -float(priorities[row, item]))[:count]
        expected.append(
            naive_rank(scores[row].tolist(), int(targets[row]), set(range(20)) - set(drawn) - {int(targets[row])})
        )
    assert sampled_ranks(scores, targets, seen, priorities.clone(), count).tolist() == expected


def test_the_name_of_a_sampled_metric_says_what_to_compute() -> None:
    ranks = torch.tensor([1.0, 3.0, 12.0])
    for name in ("HR@10", "NDCG@10", "MRR"):
        assert torch.equal(per_user_metric(f"{name}:sampled_100", ranks), per_user_metric(name, ranks))
