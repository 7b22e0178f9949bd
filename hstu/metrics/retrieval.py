"""Rank of the target among candidates, and HR, NDCG, MRR of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = 4096  # of a row, worth a call of its own


def target_ranks(scores: Tensor, targets: Tensor, excluded: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return 1 + (candidates that score strictly higher) + half of the ties, [Q] float64.

    The average rank among ties: a model that scores everything alike gets chance, not rank 1. A score that is
    not a number counts as above the target's. A target that cannot be returned, as it is left out or has no number
    as its score, is never found: its rank is infinite.

    Args:
        scores: [Q, n].
        targets: [Q] int64, the column of each row's target.
        excluded: Rows and columns of candidates to leave out. Changes ``scores``.
    """
    if excluded is not None:
        scores[excluded] = float("-inf")
    target_scores = scores.gather(1, targets[:, None])
    not_higher, ties = _counts(scores <= target_scores), _counts(scores == target_scores)
    ranks = 1 + (scores.shape[1] - not_higher).double() + (ties - 1).double() / 2
    return ranks.masked_fill(~(target_scores[:, 0] > float("-inf")), float("inf"))


def _counts(flags: Tensor) -> Tensor:
    """Return how many of each row are set, [Q] int64."""
    if flags.device.type != "cpu" or flags.shape[0] == 0 or flags.shape[1] < _WIDE:
        return flags.sum(1)
    return torch.stack([row.count_nonzero() for row in flags])  # a sum over bools takes ten times as long


def sampled_ranks(
    scores: Tensor, targets: Tensor, seen: tuple[Tensor, Tensor], priorities: Tensor, count: int
) -> Tensor:
    """Return the rank of each target among itself and ``count`` items that its user has not seen, [Q] float64.

    Such ranks favour popular items and are not those of the whole catalogue (https://arxiv.org/abs/2007.13237).

    Args:
        scores: [Q, n].
        targets: [Q] int64.
        seen: Rows and columns of items that may not be drawn; the target never is.
        priorities: [Q, n] in [0, 1), random: the items of highest priority are drawn. Changed.
        count: Items to draw; all that there are, if they are fewer.
    """
    priorities[seen] = -1
    priorities.scatter_(1, targets[:, None], -1)
    drawn = priorities.topk(min(count, scores.shape[1]), 1)
    candidates = torch.cat([targets[:, None], drawn.indices], 1)
    rows, columns = (drawn.values < 0).nonzero(as_tuple=True)
    return target_ranks(scores.gather(1, candidates), torch.zeros_like(targets), (rows, columns + 1))


def per_user_metric(name: str, ranks: Tensor) -> Tensor:
    """Return ``HR@k`` (rank <= k), ``NDCG@k`` (1 / log2(rank + 1) within k) or ``MRR`` (1 / rank) of each rank.

    What follows a colon in ``name`` says which ranks these are, and changes nothing here.
    """
    kind, _, k = name.partition(":")[0].partition("@")
    if kind == "MRR":
        return 1 / ranks
    hit = (ranks <= int(k)).double()
    return hit if kind == "HR" else hit / torch.log2(ranks + 1)
