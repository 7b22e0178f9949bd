"""Exact work of the operations, for given lengths and masks: feeds MFU, the cost model and the tests.

A multiplication and an addition count as two floating-point operations; only products are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.ops.attention.mask import Mask, visible
from hstu.ops.jagged import lengths_to_offsets, positions_in_sequence, sequence_ids


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


def visible_pairs(lengths: Tensor, mask: Mask) -> Tensor:
    """Number of pairs (i, j) with j visible to i, for each sample.

    Args:
        lengths: ``[B]`` integer, on the CPU.
        mask: options and per-batch tensors as in :func:`hstu.ops.hstu_attention`.

    Returns:
        ``[B]`` int64. Takes time proportional to the tokens, and to their squares with segments or memory.
    """
    lengths = lengths.long()
    zeros = torch.zeros_like(lengths)
    context = zeros if mask.num_context is None else mask.num_context
    history = lengths if mask.num_candidates is None else lengths - mask.num_candidates
    if mask.segments is not None or mask.is_memory is not None:
        return _enumerated_pairs(lengths, context, history, mask)
    offsets, total = lengths_to_offsets(lengths), int(lengths.sum())
    sample = sequence_ids(offsets, total)
    i, c, h = positions_in_sequence(offsets, total), context[sample], history[sample]
    position = torch.minimum(i, h)
    hidden = torch.zeros_like(i)
    if mask.max_attn_len is not None:
        # Of the columns before the window only the context is seen.
        before = (position - mask.max_attn_len).clamp(min=0)
        hidden = before - torch.minimum(before, c)
    ahead = torch.full_like(i, not mask.causal, dtype=torch.bool)
    if mask.context_full:
        ahead |= i < c
    of_history = torch.where(ahead, h, i + 1) - hidden
    of_candidate = h - hidden + (i - h) % mask.candidate_group_size + 1
    pairs = torch.where(i < h, of_history, of_candidate)
    return torch.zeros_like(lengths).index_add_(0, sample, pairs)


def _enumerated_pairs(lengths: Tensor, context: Tensor, history: Tensor, mask: Mask) -> Tensor:
    counts, start = [], 0
    for length, c, h in zip(lengths.tolist(), context.tolist(), history.tolist(), strict=True):
        place, rows = torch.arange(length), slice(start, start + length)
        segments = None if mask.segments is None else mask.segments[rows]
        memory = None if mask.is_memory is None else mask.is_memory[rows]
        count = 0
        for block in place.split(1024):
            seen = visible(
                mask,
                block[:, None],
                place[None, :],
                context=c,
                history=h,
                segments=None if segments is None else (segments[block, None], segments[None, :]),
                memory=None if memory is None else (memory[block, None], memory[None, :]),
            )
            count += int(seen.sum())
        counts.append(count)
        start += length
    return torch.tensor(counts, dtype=torch.int64)


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
