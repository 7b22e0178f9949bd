"""Exact work of the operations, for given lengths and masks: feeds MFU, the cost model and the tests.

A multiplication and an addition count as two floating-point operations; only products are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.jagged import sequences_and_positions


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward and of a backward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)


def visible_pairs(layout: Layout, mask: Mask) -> Tensor:
    """Number of pairs (i, j) of which i attends to j, for each sample.

    Args:
        layout: of the batch, on the CPU.
        mask: who attends to whom.

    Returns:
        ``[B]`` int64. Takes time proportional to the tokens, and to their squares with segments or memory that do
        not ascend, or with a mask that is not causal.
    """
    total = int(layout.offsets[-1])
    sample, place = sequences_and_positions(layout.offsets, total)
    if layout.segments is None and layout.is_memory is None:
        pairs = mask.count(place, context=layout.context[sample], history=layout.history[sample])
    elif not mask.causal or mask.context == "full" or not _segments_ascend(layout, sample):
        return torch.tensor([_enumerate(layout, mask, sample) for sample in range(layout.num_samples)]).long()
    else:
        pairs = _count_by_segment(layout, mask, sample, place)
    return torch.zeros_like(layout.lengths).index_add_(0, sample, pairs)


def _segments_ascend(layout: Layout, sample: Tensor) -> bool:
    segments = layout.segments
    return segments is None or not bool(((segments.diff() < 0) & (sample.diff() == 0)).any())


def _count_by_segment(layout: Layout, mask: Mask, sample: Tensor, place: Tensor) -> Tensor:
    """Return how many tokens each token attends to, ``[T]`` int64, where the mask is causal and segments ascend."""
    context, history, first = layout.context[sample], layout.history[sample], layout.offsets[sample]
    memory = torch.zeros_like(place, dtype=torch.bool) if layout.is_memory is None else layout.is_memory
    zero = place.new_zeros(1)
    memory_before = torch.cat([zero, (memory & (place >= context)).cumsum(0)])
    plain_before = torch.cat([zero, (~memory & (place >= context) & (place < history)).cumsum(0)])
    segment = torch.zeros_like(place) if layout.segments is None else layout.segments.long()
    runs = sample * (int(segment.max()) + 1 if segment.numel() else 1) + segment
    low, stop = torch.searchsorted(runs, runs), first + torch.minimum(place + 1, history)
    if mask.max_attn_len is not None:
        window = first + (torch.minimum(place, history) - mask.max_attn_len).clamp(min=0)
        low = torch.where(memory, low, torch.maximum(low, window))
    own = plain_before[stop] - plain_before[torch.minimum(low, stop)]
    always = torch.minimum(place + 1, context) + memory_before[stop] - memory_before[first]
    of_group = torch.where(place < history, 0, (place - history) % mask.candidate_group_size + 1)
    return own + always + of_group


def _enumerate(layout: Layout, mask: Mask, sample: int) -> int:
    tokens = slice(*layout.offsets[sample : sample + 2].tolist())
    place, count = torch.arange(tokens.stop - tokens.start), 0
    flags = [None if values is None else values[tokens] for values in (layout.segments, layout.is_memory)]
    for rows in place.split(1024):
        own = [None if values is None else (values[rows, None], values[None, :]) for values in flags]
        context, history = layout.context[sample], layout.history[sample]
        visible = mask.visible(
            rows[:, None], place[None, :], context=context, history=history, segments=own[0], memory=own[1]
        )
        count += int(visible.sum())
    return count


def attention_flops(pairs: int, heads: int, qk_width: int, v_width: int) -> Flops:
    """Work of the attention on so many visible pairs: 2 products forward, 5 backward (q k^T once more)."""
    return Flops(2 * pairs * heads * (qk_width + v_width), 2 * pairs * heads * (3 * qk_width + 2 * v_width))


def linear_flops(tokens: int, inputs: int, outputs: int) -> Flops:
    """Work of ``x W``: one product forward, two backward."""
    forward = 2 * tokens * inputs * outputs
    return Flops(forward, 2 * forward)


def layer_flops(
    tokens: int, pairs: int, hidden: int, heads: int, qk_width: int, v_width: int, *, concat_gate: bool = False
) -> Flops:
    """Work of an HSTU layer: the u, v, q, k product, the attention and the output product."""
    gated = heads * v_width * (3 if concat_gate else 1)
    projections = linear_flops(tokens, hidden, 2 * heads * (qk_width + v_width))
    return projections + attention_flops(pairs, heads, qk_width, v_width) + linear_flops(tokens, gated, hidden)


def cross_entropy_flops(tokens: int, pool: int, width: int) -> Flops:
    """Work of the softmax over a pool: one product forward; the scores again and two products backward."""
    forward = 2 * tokens * pool * width
    return Flops(forward, 3 * forward)
