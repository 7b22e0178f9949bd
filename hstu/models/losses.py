"""Losses as sums over label tokens: the trainer divides by the number of them over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_ELEMENTS = 1 << 24  # scores held at once, 64 MB in float32


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


def ranking_loss(logits: Tensor, actions: Tensor, *, multiclass: bool) -> LossSum:
    """Sum over tasks and label tokens of the cross-entropy.

    Args:
        logits: [L, K].
        actions: [L] int64. Multiclass: the class. Otherwise task k reads bit k.
        multiclass: One softmax over K classes, or K binary tasks.
    """
    if multiclass:
        total = F.cross_entropy(logits.float(), actions, reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(
            logits.float(), action_bits(actions, logits.shape[-1]), reduction="sum"
        )
    return LossSum(total=total, count=actions.numel())


def action_bits(actions: Tensor, num_tasks: int) -> Tensor:
    """Return [L, num_tasks] float32: bit k of each action."""
    return (actions[:, None] >> torch.arange(num_tasks, device=actions.device)).bitwise_and(1).float()


def softmax_loss(
    query: Tensor,
    positive: Tensor,
    positive_ids: Tensor,
    pool: Tensor,
    pool_ids: Tensor,
    *,
    temperature: float,
    columns: Tensor | None = None,
) -> LossSum:
    """Cross-entropy of the positive against negatives from a pool that all label tokens share.

    Scores come from one matrix product with the pool, so that [tokens, negatives, D] never exists. A
    negative whose id is the positive's takes no part. With the whole catalogue as pool and no
    ``columns`` this is the full softmax.

    Args:
        query: [L, D].
        positive: [L, D].
        positive_ids: [L] int64.
        pool: [P, D].
        pool_ids: [P] int64, distinct.
        temperature: Divides scores.
        columns: [L, K] int64, the places in the pool of each token's negatives; None takes all of it.
    """
    if query.shape[0] == 0:  # keeps the graph, so that every rank runs the same backward, but moves nothing
        nothing = 0.0 * (query.sum() + positive.sum() + pool.sum())
        return LossSum(total=nothing, count=0, live_negatives=query.new_zeros(()))
    step = max(1, _CHUNK_ELEMENTS // max(1, pool.shape[0]))
    totals, lives = [], []
    for start in range(0, query.shape[0], step):
        rows = slice(start, start + step)
        args = (query[rows], positive[rows], positive_ids[rows], pool, pool_ids, temperature)
        chosen = None if columns is None else columns[rows]
        if step >= query.shape[0]:
            total, live = _softmax_rows(*args, chosen)
        else:
            total, live = checkpoint(_softmax_rows, *args, chosen, use_reentrant=False)
        totals.append(total)
        lives.append(live)
    return LossSum(total=torch.stack(totals).sum(), count=query.shape[0], live_negatives=torch.stack(lives).sum())


def _softmax_rows(
    query: Tensor,
    positive: Tensor,
    positive_ids: Tensor,
    pool: Tensor,
    pool_ids: Tensor,
    temperature: float,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    query = query / temperature
    right = (query * positive).sum(-1, keepdim=True)
    scores = query @ pool.T
    same = pool_ids[None, :] == positive_ids[:, None]
    if columns is not None:
        scores, same = scores.gather(1, columns), pool_ids[columns] == positive_ids[:, None]
    scores = scores.masked_fill(same, float("-inf"))
    total = torch.cat([right, scores], dim=1).logsumexp(1).sum() - right.sum()
    return total, (~same).sum().to(total.dtype)
