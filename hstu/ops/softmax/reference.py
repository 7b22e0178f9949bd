"""Cross-entropy against a pool, all scores at once: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_cross_entropy_reference(
    query: Tensor,
    positive: Tensor,
    positive_ids: Tensor,
    pool: Tensor,
    pool_ids: Tensor,
    temperature: float,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    right = (query * positive).sum(-1, dtype=wide) / temperature
    scores = (query @ pool.T).to(wide) / temperature
    same = pool_ids[None, :] == positive_ids[:, None]
    if columns is not None:
        scores, same = scores.gather(1, columns), same.gather(1, columns)
    scores = scores.masked_fill(same, -torch.inf)
    loss = torch.cat([right[:, None], scores], 1).logsumexp(1) - right
    return loss, (~same).sum(1)
