"""Losses as sums over label tokens: the trainer divides by the number of them over all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hstu.layers.similarity import DotProduct, MixtureOfLogits, mutual_information
from hstu.ops import pool_cross_entropy

_CHUNK_ELEMENTS = 1 << 24  # gates, scores or gathered vectors held at once, 64 MB in float32


@dataclass(frozen=True, kw_only=True)
class LossSum:
    """A loss before its mean is taken.

    Attributes:
        total: Scalar, the sum over label tokens (and tasks) of this rank.
        count: Label tokens of this rank.
        live_negatives: Scalar, negatives that took part, summed over label tokens; None if there are none.
    """

    total: Tensor
    count: int
    live_negatives: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SampledCandidates:
    """Label tokens, and the pool of items that each is to be told apart from.

    Attributes:
        query: [L, ..], as the similarity makes them.
        positive: [L, ..], items likewise.
        positive_ids: [L] int64.
        pool: [P, ..], items likewise.
        pool_ids: [P] int64.
        columns: [L, K] int64, the places in the pool of each token's negatives; None takes all of it.
        log_q: Logarithms of the probabilities with which positives [L] and pool [P] are drawn as negatives, to be
            taken off their scores; None: no correction.
        units: Embeddings of positives [L, D] and of the pool [P, D] of length one, where those of the pool that are
            closer to a positive than ``closest`` are none of its negatives; None: all are but the positive itself.
        closest: The largest cosine of a negative.
        counted: [L] bool, the label tokens that count; None: all of them.
        stocked: [P] bool, the places of a pool without ``columns`` that hold an item; None: all of them.
    """

    query: Tensor
    positive: Tensor
    positive_ids: Tensor
    pool: Tensor
    pool_ids: Tensor
    columns: Tensor | None = None
    log_q: tuple[Tensor, Tensor] | None = None
    units: tuple[Tensor, Tensor] | None = None
    closest: float = 1.0
    counted: Tensor | None = None
    stocked: Tensor | None = None

    @property
    def excluded(self) -> Tensor:
        """Which columns are no negatives, [L, K] bool: the positive, what is nearly it, and what is no item."""
        chosen = self.columns
        ids = self.pool_ids[None] if chosen is None else self.pool_ids[chosen]
        same = ids == self.positive_ids[:, None]
        same = same if self.stocked is None else same | ~self.stocked
        if self.units is None:
            return same
        positive, pool = self.units
        cosine = positive @ pool.T if chosen is None else (pool[chosen] @ positive[:, :, None]).squeeze(-1)
        return same | (cosine > self.closest)

    def rows(self, start: int, stop: int) -> SampledCandidates:
        """Return the label tokens [start, stop) alone."""
        chosen = slice(start, stop)
        return replace(
            self,
            query=self.query[chosen],
            positive=self.positive[chosen],
            positive_ids=self.positive_ids[chosen],
            columns=None if self.columns is None else self.columns[chosen],
            log_q=None if self.log_q is None else (self.log_q[0][chosen], self.log_q[1]),
            units=None if self.units is None else (self.units[0][chosen], self.units[1]),
            counted=None if self.counted is None else self.counted[chosen],
        )

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` [L] over the label tokens that count."""
        return values.sum() if self.counted is None else torch.where(self.counted, values, 0).sum()


def softmax_loss(
    sampled: SampledCandidates,
    similarity: DotProduct | MixtureOfLogits,
    *,
    temperature: float | Tensor,
    label_smoothing: float = 0.0,
    mutual_information_weight: float = 0.0,
) -> LossSum:
    """Cross-entropy of the positive against negatives from a pool that all label tokens share.

    With scores s, the loss of a token is ``lse - (1 - e) s+ - e mean(s)``, lse over the positive and its negatives
    and e the smoothing, whose mean is over the pool. A negative whose id is the positive's takes no part, so that
    the whole catalogue as pool and no ``columns`` is the full softmax.

    Args:
        sampled: Label tokens and pool.
        similarity: What made its vectors.
        temperature: Divides scores.
        label_smoothing: e; needs the whole catalogue as pool.
        mutual_information_weight: Of the mutual information between gate and item, taken off the loss (MoL).
    """
    x = sampled
    if x.query.shape[0] == 0:
        return empty_loss(x, similarity)
    assert not label_smoothing or x.columns is None
    if isinstance(similarity, DotProduct) and x.units is not None:
        return _in_chunks(x, similarity, lambda part: _masked_rows(part, similarity, temperature, label_smoothing))
    if isinstance(similarity, DotProduct):
        assert isinstance(temperature, (int, float)), "a learned one is in the queries"
        losses, live = _dot_rows(x, temperature, label_smoothing)
        return LossSum(total=x.sum(losses), count=x.query.shape[0], live_negatives=x.sum(live).to(losses.dtype))
    options = (similarity, temperature, label_smoothing, mutual_information_weight)
    return _in_chunks(x, similarity, lambda part: _mixture_rows(part, *options))


def scored_loss(
    sampled: SampledCandidates,
    similarity: DotProduct | MixtureOfLogits,
    losses: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    temperature: float | Tensor,
) -> LossSum:
    """Sum what ``losses`` makes of the scores of label tokens and their negatives.

    Args:
        sampled: Label tokens and pool, without ``log_q``.
        similarity: What made its vectors.
        losses: From what :func:`candidate_scores` returns to the loss of each token, [L].
        temperature: Divides scores.
    """
    assert sampled.log_q is None
    if sampled.query.shape[0] == 0:
        return empty_loss(sampled, similarity)

    def rows(part: SampledCandidates) -> tuple[Tensor, Tensor]:
        right, wrong, live = candidate_scores(part, similarity, temperature)
        return part.sum(losses(right, wrong, live)), part.sum(live.sum(1)).to(right.dtype)

    return _in_chunks(sampled, similarity, rows)


def _in_chunks(
    x: SampledCandidates,
    similarity: DotProduct | MixtureOfLogits,
    rows: Callable[[SampledCandidates], tuple[Tensor, Tensor]],
) -> LossSum:
    """Sum the losses and the live negatives that ``rows`` finds, some label tokens at a time."""
    per_row = x.pool.shape[0] if x.columns is None else x.columns.shape[1]
    if isinstance(similarity, MixtureOfLogits):
        per_row *= similarity.query_groups * similarity.item_groups
    elif x.columns is not None:
        per_row *= x.pool.shape[1]
    step = max(1, _CHUNK_ELEMENTS // max(1, per_row))
    is_random = isinstance(similarity, MixtureOfLogits) and similarity.training and similarity.dropout > 0
    totals, lives = [], []
    for start in range(0, x.query.shape[0], step):
        # These are many times what they are made of: the backward pass computes them again, with what was drawn on the
        # device of the tensor among the arguments.
        total, live = checkpoint(
            lambda part, _: rows(part),
            x.rows(start, start + step),
            x.query,
            use_reentrant=False,
            preserve_rng_state=is_random,
        )
        totals.append(total)
        lives.append(live)
    return LossSum(total=torch.stack(totals).sum(), count=x.query.shape[0], live_negatives=torch.stack(lives).sum())


def empty_loss(x: SampledCandidates, similarity: DotProduct | MixtureOfLogits) -> LossSum:
    """Return the loss of no label tokens: it keeps the graph, so that every rank runs the same backward."""
    weights = sum((p.sum() for p in similarity.parameters()), x.query.sum() + x.positive.sum() + x.pool.sum())
    return LossSum(total=0.0 * weights, count=0, live_negatives=x.query.new_zeros(()))


def candidate_scores(
    x: SampledCandidates, similarity: DotProduct | MixtureOfLogits, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores over the temperature of positives [L] and of negatives [L, K], and which are some [L, K]."""
    items = x.pool[None] if x.columns is None else x.pool[x.columns]
    if isinstance(similarity, DotProduct):
        right = (x.query * x.positive).sum(-1)
        wrong = x.query @ x.pool.T if x.columns is None else (items @ x.query[:, :, None]).squeeze(-1)
    else:
        right, wrong = similarity.mix(x.query, x.positive[:, None])[0][:, 0], similarity.mix(x.query, items)[0]
    return right / temperature, wrong / temperature, ~x.excluded.expand_as(wrong)


def _dot_rows(x: SampledCandidates, temperature: float, smoothing: float) -> tuple[Tensor, Tensor]:
    query, positive, pool = x.query, x.positive, x.pool
    if x.log_q is not None:  # one more channel, in which the query is the temperature and an item its -log q
        query = torch.cat([query, torch.full_like(query[:, :1], temperature)], 1)
        positive, pool = (
            torch.cat([items, -log_q[:, None].to(items.dtype)], 1)
            for items, log_q in zip((positive, pool), x.log_q, strict=True)
        )
    losses, live = pool_cross_entropy(
        query,
        positive,
        x.positive_ids,
        pool,
        x.pool_ids,
        temperature=temperature,
        columns=x.columns,
        stocked=x.stocked,
    )
    if smoothing:
        losses = losses + smoothing * (query * (positive - pool.mean(0))).sum(-1) / temperature
    return losses, live


def _masked_rows(
    x: SampledCandidates, similarity: DotProduct, temperature: float | Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    right, scores, live = candidate_scores(x, similarity, temperature)
    if x.log_q is not None:
        right = right - x.log_q[0]
        scores = scores - (x.log_q[1][None] if x.columns is None else x.log_q[1][x.columns])
    losses = torch.cat([right[:, None], scores.masked_fill(~live, -torch.inf)], 1).logsumexp(1) - right
    if smoothing:
        losses = losses + smoothing * (right - scores.mean(1))
    return x.sum(losses), x.sum(live.sum(1)).to(losses.dtype)


def _mixture_rows(
    x: SampledCandidates,
    similarity: MixtureOfLogits,
    temperature: float | Tensor,
    smoothing: float,
    information_weight: float,
) -> tuple[Tensor, Tensor]:
    items, same = x.pool[None] if x.columns is None else x.pool[x.columns], x.excluded
    scores, gates = similarity.mix(x.query, items)
    right, scores = similarity.mix(x.query, x.positive[:, None])[0] / temperature, scores / temperature
    if x.log_q is not None:
        log_q = x.log_q[1][None, :] if x.columns is None else x.log_q[1][x.columns]
        right, scores = right - x.log_q[0][:, None], scores - log_q
    losses = torch.cat([right, scores.masked_fill(same, -torch.inf)], 1).logsumexp(1) - right[:, 0]
    if smoothing:
        losses = losses + smoothing * (right[:, 0] - scores.mean(1))
    if information_weight:
        losses = losses - information_weight * mutual_information(gates)
    return x.sum(losses), x.sum((~same).sum(1)).to(losses.dtype)


def bpr(right: Tensor, wrong: Tensor, live: Tensor) -> Tensor:
    """Return the mean of -log sigmoid(s+ - s_j) over the negatives j (https://arxiv.org/abs/1205.2618), [L].

    Args:
        right: s+, scores of the positives [L].
        wrong: s_j, scores of the negatives [L, K].
        live: Which of them are some, [L, K] bool; a token without any costs nothing, here and in what follows.
    """
    return -(_shares(live, wrong) * F.logsigmoid(right[:, None] - wrong)).sum(1)


def top1(right: Tensor, wrong: Tensor, live: Tensor) -> Tensor:
    """Return the mean of sigmoid(s_j - s+) + sigmoid(s_j^2) (https://arxiv.org/abs/1511.06939), [L]; see ``bpr``."""
    return (_shares(live, wrong) * _top1_terms(right, wrong)).sum(1)


def top1_max(right: Tensor, wrong: Tensor, live: Tensor) -> Tensor:
    """Return the terms of ``top1`` weighed by the softmax of the negatives (https://arxiv.org/abs/1706.03847), [L]."""
    return (_log_shares(live, wrong).exp() * live * _top1_terms(right, wrong)).sum(1)


def bpr_max(right: Tensor, wrong: Tensor, live: Tensor, *, regularization: float = 1.0) -> Tensor:
    """Return -log sum_j p_j sigmoid(s+ - s_j) + ``regularization`` sum_j p_j s_j^2, [L].

    p is the softmax of the negatives (https://arxiv.org/abs/1706.03847); see ``bpr``.
    """
    log_p = _log_shares(live, wrong)
    losses = -(log_p + F.logsigmoid(right[:, None] - wrong)).logsumexp(1)
    return (losses + regularization * (log_p.exp() * wrong.square()).sum(1)).where(live.any(1), 0.0)


PAIRWISE: dict[str, Callable[..., Tensor]] = {"bpr": bpr, "top1": top1, "top1_max": top1_max, "bpr_max": bpr_max}
"""Losses that compare the positive with each negative, as :func:`scored_loss` takes them."""


def _top1_terms(right: Tensor, wrong: Tensor) -> Tensor:
    return torch.sigmoid(wrong - right[:, None]) + torch.sigmoid(wrong.square())


def _shares(live: Tensor, wrong: Tensor) -> Tensor:
    """Return what each negative weighs in a mean, [L, K]."""
    return live.to(wrong.dtype) / live.sum(1, keepdim=True).clamp(min=1)


def _log_shares(live: Tensor, wrong: Tensor) -> Tensor:
    """Return the logarithm of the softmax of the negatives [L, K]; of a token without any, that of all columns."""
    return wrong.masked_fill(~live & live.any(1, keepdim=True), -torch.inf).log_softmax(1)


def binary_loss(
    sampled: SampledCandidates, live: Tensor, similarity: DotProduct | MixtureOfLogits, *, temperature: float | Tensor
) -> LossSum:
    """Binary cross-entropy of the positive and of one negative (https://arxiv.org/abs/1808.09781, section III-E).

    Args:
        sampled: Label tokens, with one column each.
        live: [L] bool, whether there is a negative.
        similarity: What made its vectors.
        temperature: Divides scores.
    """
    x = sampled
    assert x.columns is not None and x.columns.shape[1] == 1
    pair = torch.stack([x.positive, x.pool[x.columns[:, 0]]], 1)
    if isinstance(similarity, DotProduct):
        scores = torch.einsum("ld,lnd->ln", x.query, pair)
    else:
        scores = similarity.mix(x.query, pair)[0]
    live = live & ~x.excluded[:, 0] if x.units is not None else live
    right, wrong = (scores / temperature).unbind(1)
    total = x.sum(F.softplus(-right) + F.softplus(wrong) * live)
    return LossSum(total=total, count=x.query.shape[0], live_negatives=x.sum(live.long()).to(total.dtype))
