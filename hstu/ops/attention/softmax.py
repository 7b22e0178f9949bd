"""Softmax attention on jagged tensors: sequences of like length are padded together, under the one mask."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.mask import Mask, visible
from hstu.ops.jagged import positions_in_sequence, sequence_ids


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sequences that are padded to one length n.

    Attributes:
        tokens: [t] int64, rows of the jagged tensor.
        places: [t] int64, where they lie in the padded tensor [b * n, ..].
        shape: (b, n).
        seen: [b, n, n] bool. Padding reads itself, and nobody reads it.
    """

    tokens: Tensor
    places: Tensor
    shape: tuple[int, int]
    seen: Tensor

    def pad(self, values: Tensor) -> Tensor:
        """Return [b, n, ..], zero where there is no token."""
        batch, length = self.shape
        zeros = values.new_zeros(batch * length, *values.shape[1:])
        return zeros.index_copy(0, self.places, values[self.tokens]).unflatten(0, (batch, length))


def attention_buckets(offsets: Tensor, mask: Mask) -> list[Bucket]:
    """Group sequences by length and lay out their masks, once for all layers of a model.

    Lengths of a bucket differ by less than a factor of two. Reads the lengths back from the device.

    Args:
        offsets: [B + 1] int64.
        mask: Who reads whom; segments and memory tokens are not supported.
    """
    assert mask.segments is None and mask.is_memory is None
    lengths, device = offsets.diff(), offsets.device
    total = int(offsets[-1])
    sequence, place = sequence_ids(offsets, total), positions_in_sequence(offsets, total)
    none = torch.zeros_like(lengths)
    context = none if mask.num_context is None else mask.num_context
    history = lengths if mask.num_candidates is None else lengths - mask.num_candidates
    of_class: dict[int, list[int]] = {}
    for index, length in enumerate(lengths.tolist()):
        if length:
            of_class.setdefault((length - 1).bit_length(), []).append(index)
    buckets = []
    for _, members in sorted(of_class.items()):
        chosen = torch.tensor(members, device=device)
        width = int(lengths[chosen].max())
        row_of = torch.full_like(lengths, -1).index_copy(0, chosen, torch.arange(len(members), device=device))
        tokens = (row_of[sequence] >= 0).nonzero().squeeze(1)
        buckets.append(
            Bucket(
                tokens=tokens,
                places=row_of[sequence[tokens]] * width + place[tokens],
                shape=(len(members), width),
                seen=_seen(mask, width, lengths[chosen], context[chosen], history[chosen]),
            )
        )
    return buckets


def _seen(mask: Mask, width: int, length: Tensor, context: Tensor, history: Tensor) -> Tensor:
    place = torch.arange(width, device=length.device)
    i, j = place[:, None], place[None, :]
    length, context, history = (x[:, None, None] for x in (length, context, history))
    seen = visible(mask, i, j, context=context, history=history)
    return (seen & (i < length) & (j < length)) | (i == j)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, buckets: list[Bucket]) -> Tensor:
    """``o_i = sum_j softmax_j(<q_i, k_j> / sqrt(d)) v_j`` over the tokens j that i may read; differentiable.

    Args:
        q: [T, H, d].
        k: [T, G, d]; G divides H, and H / G consecutive query heads share a key and value head.
        v: [T, G, d_v].
        buckets: Of the sequences, from :func:`attention_buckets`.

    Returns:
        [T, H, d_v] in the dtype of q.
    """
    heads, groups = q.shape[1], k.shape[1]
    assert heads % groups == 0 and v.shape[1] == groups, (heads, groups)
    if not buckets:  # no tokens: nothing to compute, but the graph reaches all three
        return v.repeat_interleave(heads // groups, 1) + 0.0 * (q.sum() + k.sum())
    parts = []
    for bucket in buckets:
        padded = [bucket.pad(x).transpose(1, 2) for x in (q, k, v)]
        q_b, k_b, v_b = (x if x.shape[1] == heads else x.repeat_interleave(heads // groups, 1) for x in padded)
        out = F.scaled_dot_product_attention(q_b, k_b, v_b, bucket.seen[:, None], scale=1 / math.sqrt(q.shape[-1]))
        parts.append(out.transpose(1, 2).flatten(0, 1)[bucket.places])
    order = torch.cat([bucket.tokens for bucket in buckets])
    # Every row is written once: the empty tensor's content never shows.
    return q.new_empty(q.shape[0], heads, v.shape[-1]).index_copy(0, order, torch.cat(parts))
