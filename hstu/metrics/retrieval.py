"""Rank of the target among candidates, and HR, NDCG, MRR of ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def target_ranks(scores: Tensor, targets: Tensor, excluded: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return 1 + (candidates that score strictly higher) + half of the ties, [Q] float64.

    The average rank among ties: a model that scores everything alike gets chance, not rank 1. A score that is
    not a number counts as above the target's, and a target's that is none as below all others.

    Args:
        scores: [Q, n].
        targets: [Q] int64, the column of each row's target.
        excluded: Rows and columns of candidates to leave out; a target is never left out. Changes ``scores``.
    """
    target_scores = scores.gather(1, targets[:, None]).clone()
    if excluded is not None:
        scores[excluded] = float("-inf")
        scores.scatter_(1, targets[:, None], target_scores)
    not_higher, ties = (scores <= target_scores).sum(1), (scores == target_scores).sum(1)
    higher = scores.shape[1] - not_higher.clamp(min=1)  # the target itself is not above itself
    return 1 + higher.double() + (ties - 1).clamp(min=0).double() / 2


def per_user_metric(name: str, ranks: Tensor) -> Tensor:
    """Return ``HR@k`` (rank <= k), ``NDCG@k`` (1 / log2(rank + 1) within k) or ``MRR`` (1 / rank) of each rank."""
    kind, _, k = name.partition("@")
    if kind == "MRR":
        return 1 / ranks
    hit = (ranks <= int(k)).double()
    return hit if kind == "HR" else hit / torch.log2(ranks + 1)
