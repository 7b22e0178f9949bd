"""HSTU and softmax attention, dense and one sample at a time: the definitions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.bias import RelativeBias, query_times, time_bucket
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask, positions


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mask: Mask,
    *,
    scaling_seqlen: float,
    alpha: float,
    bias: RelativeBias,
    keys: Layout,
) -> Tensor:
    """``o_i = 1/S sum_j M_ij silu(alpha <q_i, k_j> + r_ij) v_j``; see :func:`hstu.ops.hstu_attention`."""
    outputs = [v[:0]]
    for columns, scores, seen in _samples(q, k, layout, mask, alpha, bias, keys):
        weights = torch.where(seen, F.silu(scores), 0.0).to(v.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[columns]) / scaling_seqlen)
    return torch.cat(outputs)


def softmax_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask, *, alpha: float, keys: Layout
) -> Tensor:
    """``o_i = sum_j softmax_j(alpha <q_i, k_j>) v_j``; see :func:`hstu.ops.softmax_attention`."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    outputs = [v[:0]]
    for columns, scores, seen in _samples(q, k, layout, mask, alpha, RelativeBias(), keys):
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[columns]))
    return torch.cat(outputs)


def _samples(
    q: Tensor, k: Tensor, layout: Layout, mask: Mask, alpha: float, bias: RelativeBias, keys: Layout
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the columns of each sample, its scores ``[H, n, m]``, and who attends to whom ``[n, m]``."""
    queries, stops = layout.offsets.tolist(), keys.offsets.tolist()
    for b, (context, history) in enumerate(zip(keys.context.tolist(), keys.history.tolist(), strict=True)):
        n, columns = queries[b + 1] - queries[b], slice(stops[b], stops[b + 1])
        m = columns.stop - columns.start
        rows = slice(columns.stop - n, columns.stop)  # the queries are the last n of the keys' tokens
        j = torch.arange(m, device=q.device)
        i = j[m - n :]
        scores = torch.einsum("ihd,jhd->hij", q[queries[b] : queries[b + 1]], k[columns]) * alpha
        if bias.position is not None:
            p_i, p_j = positions(i, history), positions(j, history)
            scores = scores + bias.position[p_j[None, :] - p_i[:, None] + (bias.position.numel() - 1) // 2]
        if bias.time is not None:
            assert keys.timestamps is not None
            asked = query_times(keys, bias.query_time)[rows]
            difference = asked[:, None] - keys.timestamps[None, columns]
            scores = scores + bias.time[time_bucket(difference, bias.time.numel() - 1)]
        flags = [
            None if values is None else (values[rows, None], values[None, columns])
            for values in (keys.segments, keys.is_memory)
        ]
        yield (
            columns,
            scores,
            mask.visible(i[:, None], j[None, :], context=context, history=history, segments=flags[0], memory=flags[1]),
        )
