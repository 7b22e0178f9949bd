"""HSTU and softmax attention of all samples at once, padded to the longest: the operations of a program.

No loop and no size depends on values, so that ``torch.export`` can write a program of it for batches of any lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.bias import RelativeBias, query_times
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.reference import Pairs
from hstu.ops.jagged import positions_in_sequence, sequence_ids


def hstu_attention_padded(
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
    if q.shape[0] == 0:
        return v[:0]
    rows, columns = padded_rows(layout), padded_rows(keys)
    pairs, seen = _pairs(layout, keys, columns, mask, bias)
    weights = torch.where(seen, F.silu(pairs.scores(q[rows], k[columns], alpha, bias)), 0.0).to(v.dtype)
    return _jagged(torch.einsum("bhij,bjhd->bihd", weights, v[columns]) / scaling_seqlen, layout, q.shape[0])


def softmax_attention_padded(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask, *, alpha: float, keys: Layout
) -> Tensor:
    """``o_i = sum_j softmax_j(alpha <q_i, k_j>) v_j``; see :func:`hstu.ops.softmax_attention`."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    if q.shape[0] == 0:
        return v[:0]
    rows, columns, bias = padded_rows(layout), padded_rows(keys), RelativeBias()
    pairs, seen = _pairs(layout, keys, columns, mask, bias)
    scores = pairs.scores(q[rows], k[columns], alpha, bias)
    # Not -inf: rows of an empty sample see nothing, and NaN there would come back in the gradients.
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return _jagged(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).to(v.dtype), v[columns]), layout, q.shape[0])


def padded_rows(layout: Layout) -> Tensor:
    """Return the token at each place of samples that are padded to the longest, [B, N] int64; behind the end any."""

    def make() -> Tensor:
        place = torch.arange(layout.longest, device=layout.offsets.device)
        last = (layout.offsets[-1] - 1).clamp(min=0)
        return torch.minimum(layout.offsets[:-1, None] + place, last)

    return layout.keep("padded_rows", make)


def _pairs(layout: Layout, keys: Layout, columns: Tensor, mask: Mask, bias: RelativeBias) -> tuple[Pairs, Tensor]:
    """Return all pairs of the batch, and which rows attend to which columns [B, 1, n, m]; made once a batch."""

    def make() -> tuple[Pairs, Tensor]:
        before = keys.lengths - layout.lengths
        i = before[:, None] + torch.arange(layout.longest, device=columns.device)
        j = torch.arange(keys.longest, device=columns.device)
        rows = torch.minimum(keys.offsets[:-1, None] + i, (keys.offsets[-1] - 1).clamp(min=0))

        def both(of_rows: Tensor | None, of_columns: Tensor | None) -> tuple[Tensor, Tensor] | None:
            if of_rows is None or of_columns is None:
                return None
            return of_rows[rows][:, :, None], of_columns[columns][:, None]

        pairs = Pairs(
            places=(i[:, :, None], j),
            context=keys.context[:, None, None],
            history=keys.history[:, None, None],
            times=both(None if bias.time is None else query_times(keys, bias.query_time), keys.timestamps),
            segments=both(keys.segments, keys.segments),
            memory=both(keys.is_memory, keys.is_memory),
        )
        is_token = j < keys.lengths[:, None, None]
        return pairs, (pairs.visible(mask) & is_token)[:, None]

    return layout.keep(("padded_pairs", keys, mask, bias.time is not None, bias.query_time), make)


def _jagged(out: Tensor, layout: Layout, total: int) -> Tensor:
    """Return the rows of [B, n, H, d] that are tokens, [T, H, d]."""
    sample, place = sequence_ids(layout.offsets, total), positions_in_sequence(layout.offsets, total)
    return out[sample, place]
