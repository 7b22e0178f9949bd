"""HSTU and softmax attention, dense and one sample at a time: the definitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    asked = None if bias.time is None else query_times(keys, bias.query_time)
    for b, (context, history) in enumerate(zip(keys.context.tolist(), keys.history.tolist(), strict=True)):
        n, columns = queries[b + 1] - queries[b], slice(stops[b], stops[b + 1])
        m = columns.stop - columns.start
        rows = slice(columns.stop - n, columns.stop)  # the queries are the last n of the keys' tokens
        j = torch.arange(m, device=q.device)
        pairs = Pairs(
            places=(j[m - n :, None], j),
            context=context,
            history=history,
            times=None if asked is None or keys.timestamps is None else (asked[rows, None], keys.timestamps[columns]),
            segments=None if keys.segments is None else (keys.segments[rows, None], keys.segments[columns]),
            memory=None if keys.is_memory is None else (keys.is_memory[rows, None], keys.is_memory[columns]),
        )
        scores = pairs.scores(q[queries[b] : queries[b + 1]], k[columns], alpha, bias)
        yield columns, scores, pairs.visible(mask)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Rows and the columns that they may attend to; those of a sample, or of samples of one length.

    Attributes:
        places: of the rows ``[.., n, 1]`` and the columns ``[.., m]`` in their sample, broadcast against each other.
        context: context tokens of the sample.
        history: place of its first candidate.
        times: seconds of rows, as they ask, and of columns; so are ``segments`` and ``memory``, None where not known.
        segments: see ``times``.
        memory: see ``times``.
    """

    places: tuple[Tensor, Tensor]
    context: int | Tensor
    history: int | Tensor
    times: tuple[Tensor, Tensor] | None
    segments: tuple[Tensor, Tensor] | None
    memory: tuple[Tensor, Tensor] | None

    def scores(self, q: Tensor, k: Tensor, alpha: float, bias: RelativeBias) -> Tensor:
        """Return ``alpha <q_i, k_j> + r_ij`` of queries ``[.., n, H, d]`` and keys ``[.., m, H, d]``: [.., H, n, m]."""
        scores = torch.einsum("...ihd,...jhd->...hij", q, k) * alpha
        if bias.position is not None:
            p_i, p_j = (positions(place, self.history) for place in self.places)
            scores = scores + bias.position[p_j - p_i + (bias.position.numel() - 1) // 2].unsqueeze(-3)
        if bias.time is not None:
            assert self.times is not None
            difference = self.times[0] - self.times[1]
            scores = scores + bias.time[time_bucket(difference, bias.time.numel() - 1)].unsqueeze(-3)
        return scores

    def visible(self, mask: Mask) -> Tensor:
        """Return who attends to whom, [.., n, m] bool."""
        known = dict(context=self.context, history=self.history, segments=self.segments, memory=self.memory)
        return mask.visible(*self.places, **known)  # type: ignore[arg-type]
