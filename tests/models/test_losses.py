"""Losses against loops in float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.layers.similarity import DotProduct, MixtureOfLogits, mutual_information
from hstu.models import losses
from hstu.models.losses import LossSum, SampledCandidates, binary_loss, scored_loss
from hstu.models.losses import softmax_loss as softmax_loss_of

L, P, D = 7, 9, 4


DOT = DotProduct(normalize_queries=False, normalize_items=False, eps=1e-6)


def softmax_loss(*, temperature: float, columns: Tensor | None = None, **x: Tensor) -> LossSum:
    return softmax_loss_of(SampledCandidates(**x, columns=columns), DOT, temperature=temperature)


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pool_ids = torch.randperm(20, generator=generator)[:P]
    return {
        "query": torch.randn(L, D, generator=generator, dtype=torch.float64, requires_grad=True),
        "positive": torch.randn(L, D, generator=generator, dtype=torch.float64, requires_grad=True),
        # Some positives are in the pool, some are not.
        "positive_ids": torch.cat([pool_ids[:4], torch.tensor([100, 101, int(pool_ids[2])])]),
        "pool": torch.randn(P, D, generator=generator, dtype=torch.float64, requires_grad=True),
        "pool_ids": pool_ids,
    }


def naive(x: dict[str, Tensor], temperature: float, columns: Tensor | None = None) -> tuple[Tensor, int]:
    """The sum of -log softmax of the positive, and the number of negatives that took part."""
    total, live = torch.zeros((), dtype=torch.float64), 0
    for t in range(x["query"].shape[0]):
        right = (x["query"][t] * x["positive"][t]).sum() / temperature
        terms = [right.exp()]
        for p in range(x["pool"].shape[0]) if columns is None else columns[t].tolist():
            if int(x["pool_ids"][p]) != int(x["positive_ids"][t]):
                terms.append(((x["query"][t] * x["pool"][p]).sum() / temperature).exp())
                live += 1
        total = total - (right.exp() / torch.stack(terms).sum()).log()
    return total, live


def assert_is_the_definition(x: dict[str, Tensor], temperature: float, columns: Tensor | None) -> None:
    loss = softmax_loss(**x, temperature=temperature, columns=columns)
    total, live = naive(x, temperature, columns)
    torch.testing.assert_close(loss.total, total)
    assert loss.count == x["query"].shape[0] and loss.live_negatives is not None and float(loss.live_negatives) == live
    leaves = [x["query"], x["positive"], x["pool"]]
    found = torch.autograd.grad(loss.total, leaves)
    for a, b in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b)


COLUMNS = torch.randint(P, (L, 5), generator=torch.Generator().manual_seed(1))  # with repeats, as drawn
COLUMNS[0] = 0  # every negative of the first token is its positive: none is live


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("columns", [None, COLUMNS], ids=["whole_pool", "columns"])
def test_softmax_loss_and_gradients(temperature: float, columns: Tensor | None) -> None:
    assert_is_the_definition(inputs(), temperature, columns)


def test_negatives_with_the_positives_id_left_in_are_caught() -> None:
    x = inputs()
    unmasked = {**x, "positive_ids": torch.full((L,), 999)}
    total, _ = naive(x, 0.3)
    assert not torch.isclose(softmax_loss(**unmasked, temperature=0.3).total, total)


def test_a_token_without_live_negatives_costs_nothing() -> None:
    x = {name: value[:1] if name != "pool_ids" else value for name, value in inputs().items()}
    x["pool"], x["pool_ids"] = x["pool"][:1], x["pool_ids"][:1]
    loss = softmax_loss(**x, temperature=0.3)
    assert float(loss.total.detach()) == 0.0 and float(loss.live_negatives) == 0  # type: ignore[arg-type]
    gradients = torch.autograd.grad(loss.total, [x["query"], x["pool"]])
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_large_scores_do_not_overflow() -> None:
    x = {k: v.detach().float() * (1 if k.endswith("ids") else 30) for k, v in inputs().items()}
    x["positive_ids"], x["pool_ids"] = x["positive_ids"].long(), x["pool_ids"].long()
    assert math.isfinite(float(softmax_loss(**x, temperature=0.05).total))


def test_a_rank_without_labels_adds_nothing_and_moves_nothing() -> None:
    x = {name: value if name.startswith("pool") else value[:0] for name, value in inputs().items()}
    loss = softmax_loss(**x, temperature=0.05)
    assert float(loss.total.detach()) == 0.0 and loss.count == 0
    gradients = torch.autograd.grad(loss.total, [x["pool"]])  # the graph is there, for every rank runs the same
    assert not gradients[0].any()


# Options of the softmax, and the other similarities


def mixture() -> MixtureOfLogits:
    torch.manual_seed(0)
    shape = dict(query_groups=2, item_groups=2, channels=3, gate_channels=4)
    return MixtureOfLogits(D, **shape, dropout=0.0, eps=1e-6).double()  # type: ignore[arg-type]


def scores_of(x: dict[str, Tensor], similarity: DotProduct | MixtureOfLogits) -> tuple[Tensor, Tensor]:
    """Scores of the positives [L] and of the pool [L, P]."""
    query, pool = similarity.queries(x["query"]), similarity.items(x["pool"])
    return similarity.scores(query, similarity.items(x["positive"])).diagonal(), similarity.scores(query, pool)


def sampled_of(x: dict[str, Tensor], similarity: DotProduct | MixtureOfLogits, **more: Any) -> SampledCandidates:
    made = {"query": similarity.queries, "positive": similarity.items, "pool": similarity.items}
    return SampledCandidates(
        **{name: made[name](value) if name in made else value for name, value in x.items()}, **more
    )


@pytest.mark.parametrize("chunk", [1 << 24, 1])
@pytest.mark.parametrize("log_q", [False, True])
@pytest.mark.parametrize("columns", [None, COLUMNS], ids=["whole_pool", "columns"])
@pytest.mark.parametrize("kind", ["dot", "mol"])
def test_softmax_of_any_similarity_with_correction(
    kind: str, columns: Tensor | None, log_q: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
    x, similarity = inputs(), DOT if kind == "dot" else mixture()
    right, scores = (part / 0.3 for part in scores_of(x, similarity))
    correction = None
    if log_q:
        correction = torch.randn(L, dtype=torch.float64), torch.randn(P, dtype=torch.float64)
        right, scores = right - correction[0], scores - correction[1]
    total, live = torch.zeros((), dtype=torch.float64), 0
    for t in range(L):
        terms = [right[t]]
        for p in range(P) if columns is None else columns[t].tolist():
            if int(x["pool_ids"][p]) != int(x["positive_ids"][t]):
                terms.append(scores[t, p])
                live += 1
        total = total + torch.stack(terms).logsumexp(0) - right[t]
    loss = softmax_loss_of(sampled_of(x, similarity, columns=columns, log_q=correction), similarity, temperature=0.3)
    torch.testing.assert_close(loss.total, total)
    assert float(loss.live_negatives) == live  # type: ignore[arg-type]
    leaves = [x["query"], x["positive"], x["pool"], *similarity.parameters()]
    truth = torch.autograd.grad(total, leaves)
    for a, b in zip(torch.autograd.grad(loss.total, leaves), truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dot", "mol"])
def test_label_smoothing_is_that_of_the_full_softmax(kind: str) -> None:
    x, similarity, targets = inputs(), DOT if kind == "dot" else mixture(), torch.tensor([0, 3, 8, 1, 1, 5, 2])
    x |= {"positive": x["pool"][targets], "positive_ids": x["pool_ids"][targets]}
    loss = softmax_loss_of(sampled_of(x, similarity), similarity, temperature=0.3, label_smoothing=0.2)
    scores = scores_of(x, similarity)[1] / 0.3
    expected = torch.nn.functional.cross_entropy(scores, targets, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    leaves = [x["query"], x["pool"]]
    for a, b in zip(torch.autograd.grad(loss.total, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_mutual_information_is_taken_off_the_loss() -> None:
    x, similarity = inputs(), mixture()
    plain, rewarded = (
        softmax_loss_of(sampled_of(x, similarity), similarity, temperature=0.3, mutual_information_weight=weight).total
        for weight in (0.0, 0.5)
    )
    gates = similarity.mix(similarity.queries(x["query"]), similarity.items(x["pool"])[None])[1]
    torch.testing.assert_close(plain - rewarded, 0.5 * mutual_information(gates).sum())


@pytest.mark.parametrize("kind", ["dot", "mol"])
def test_binary_loss(kind: str) -> None:
    x, similarity = inputs(), DOT if kind == "dot" else mixture()
    columns, live = COLUMNS[:, :1], torch.tensor([True, False, True, True, True, True, True])
    right, scores = scores_of(x, similarity)
    total = torch.zeros((), dtype=torch.float64)
    for t in range(L):
        total = total - torch.sigmoid(right[t] / 0.5).log()
        if live[t]:
            total = total - (1 - torch.sigmoid(scores[t, columns[t, 0]] / 0.5)).log()
    loss = binary_loss(sampled_of(x, similarity, columns=columns), live, similarity, temperature=0.5)
    torch.testing.assert_close(loss.total, total)
    assert (loss.count, float(loss.live_negatives)) == (L, 6)  # type: ignore[arg-type]
    for leaf in (x["query"], x["positive"], x["pool"]):
        truth = torch.autograd.grad(total, leaf, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss.total, leaf, retain_graph=True), truth)


def pairwise_of_one(kind: str, right: Tensor, scores: Tensor) -> Tensor:
    """The loss of one token with the scores [K] of its negatives, as published."""
    ahead = torch.sigmoid(right - scores)
    p = scores.exp() / scores.exp().sum()
    terms = 1 - ahead + torch.sigmoid(scores**2)
    return {
        "bpr": -ahead.log().mean(),
        "top1": terms.mean(),
        "top1_max": (p * terms).sum(),
        "bpr_max": -(p * ahead).sum().log() + 0.7 * (p * scores**2).sum(),
    }[kind]


@pytest.mark.parametrize("chunk", [1 << 24, 1])
@pytest.mark.parametrize("columns", [None, COLUMNS], ids=["whole_pool", "columns"])
@pytest.mark.parametrize("similarity", ["dot", "mol"])
@pytest.mark.parametrize("kind", ["bpr", "top1", "top1_max", "bpr_max"])
def test_pairwise_losses_and_gradients(
    kind: str, similarity: str, columns: Tensor | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk)
    x, scored = inputs(), DOT if similarity == "dot" else mixture()
    right, scores = (part / 0.5 for part in scores_of(x, scored))
    total, live = torch.zeros((), dtype=torch.float64), 0
    for t in range(L):
        places = range(P) if columns is None else columns[t].tolist()
        places = [p for p in places if int(x["pool_ids"][p]) != int(x["positive_ids"][t])]
        live += len(places)
        if places:
            total = total + pairwise_of_one(kind, right[t], scores[t, places])
    of_scores = partial(losses.bpr_max, regularization=0.7) if kind == "bpr_max" else losses.PAIRWISE[kind]
    loss = scored_loss(sampled_of(x, scored, columns=columns), scored, of_scores, temperature=0.5)
    torch.testing.assert_close(loss.total, total)
    assert (loss.count, float(loss.live_negatives)) == (L, live)  # type: ignore[arg-type]
    leaves = [x["query"], x["positive"], x["pool"], *scored.parameters()]
    truth = torch.autograd.grad(total, leaves)
    for a, b in zip(torch.autograd.grad(loss.total, leaves), truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["bpr", "top1", "top1_max", "bpr_max"])
def test_pairwise_losses_of_large_scores_and_of_nothing(kind: str) -> None:
    x = {k: v.detach().float() * (1 if k.endswith("ids") else 30) for k, v in inputs().items()}
    x |= {name: x[name].long() for name in ("positive_ids", "pool_ids")}
    x |= {name: x[name].requires_grad_() for name in ("query", "positive", "pool")}
    for rows in (L, 0):
        loss = scored_loss(sampled_of(x, DOT).rows(0, rows), DOT, losses.PAIRWISE[kind], temperature=0.05)
        assert math.isfinite(float(loss.total.detach())) and loss.count == rows
        gradients = torch.autograd.grad(loss.total, [x["query"], x["positive"], x["pool"]])
        assert all(bool(g.isfinite().all()) and (rows > 0 or not g.any()) for g in gradients)
