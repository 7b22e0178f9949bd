"""HSTU attention, dense and one sample at a time: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.bias import RelativeBias, query_times, time_bucket
from hstu.ops.attention.mask import Mask, positions, visible


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scaling_seqlen: float,
    alpha: float,
    mask: Mask,
    bias: RelativeBias | None,
) -> Tensor:
    """``o_i = 1/S sum_j M_ij silu(alpha <q_i, k_j> + r_ij) v_j``; see :func:`hstu.ops.hstu_attention`."""
    starts = offsets.tolist()
    context, candidates = mask.counts(len(starts) - 1)
    has_time = bias is not None and bias.time is not None
    reader_time = query_times(bias, offsets, mask.num_candidates) if bias and has_time else None
    outputs = [v[:0]]
    for b, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
        rows = slice(start, stop)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * alpha
        if bias is not None and bias.position is not None:
            p = positions(stop - start, candidates[b], q.device)
            scores = scores + bias.position[p[None, :] - p[:, None] + (bias.position.numel() - 1) // 2]
        if bias is not None and bias.time is not None:
            assert reader_time is not None and bias.timestamps is not None
            difference = reader_time[rows, None] - bias.timestamps[None, rows]
            scores = scores + bias.time[time_bucket(difference, bias.time.numel() - 1)]
        place = torch.arange(stop - start, device=q.device)
        segments = None if mask.segments is None else mask.segments[rows]
        memory = None if mask.is_memory is None else mask.is_memory[rows]
        seen = visible(
            mask,
            place[:, None],
            place[None, :],
            context=context[b],
            history=stop - start - candidates[b],
            segments=None if segments is None else (segments[:, None], segments[None, :]),
            memory=None if memory is None else (memory[:, None], memory[None, :]),
        )
        weights = torch.where(seen, F.silu(scores), 0.0).to(v.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[rows]) / scaling_seqlen)
    return torch.cat(outputs)
