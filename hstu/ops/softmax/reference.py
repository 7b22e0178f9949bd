"""Cross-entropy against a pool, all scores at once: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.softmax.problem import Problem


def pool_cross_entropy_reference(
    query: Tensor, positive: Tensor, pool: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    right = (query * positive).sum(-1, dtype=wide) / problem.temperature
    scores = (query @ pool.T).to(wide) / problem.temperature
    if problem.columns is not None:
        scores = scores.gather(1, problem.columns)
    same = problem.same()
    scores = scores.masked_fill(same, -torch.inf)
    loss = torch.cat([right[:, None], scores], 1).logsumexp(1) - right
    return loss, (~same).sum(1)
