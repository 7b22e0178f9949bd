"""Softmax attention on jagged tensors: sequences of like length are padded together, under the one mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask


@dataclass(frozen=True, kw_only=True)
class PaddedRows:
    """Tokens of b sequences, padded to one length n.

    Attributes:
        tokens: [t] int64, rows of the jagged tensor.
        places: [t] int64, where they lie in the padded tensor [b * n, ..].
        shape: (b, n).
    """

    tokens: Tensor
    places: Tensor
    shape: tuple[int, int]

    def pad(self, values: Tensor) -> Tensor:
        """Return [b, n, ..], zero where there is no token."""
        batch, length = self.shape
        zeros = values.new_zeros(batch * length, *values.shape[1:])
        return zeros.index_copy(0, self.places, values[self.tokens]).unflatten(0, (batch, length))


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Sequences that are padded to one number of queries n and one of keys m.

    Attributes:
        queries: Their queries.
        keys: Their keys; the same object where they are the queries.
        visible: [b, n, m] bool. Padding attends to everything, and nobody attends to it.
    """

    queries: PaddedRows
    keys: PaddedRows
    visible: Tensor


def attention_buckets(layout: Layout, mask: Mask, keys: Layout) -> list[Bucket]:
    """Group sequences by length and lay out their masks, once for all layers of a model.

    Lengths of keys in a bucket differ by less than a factor of two, and so do those of queries. Reads the lengths
    back from the device.
    """
    kept = "softmax", mask, None if keys is layout else keys
    return layout.keep(kept, lambda: _buckets(layout, mask, keys))


def _buckets(layout: Layout, mask: Mask, keys: Layout) -> list[Bucket]:
    of_class: dict[tuple[int, int], list[int]] = {}
    for sample, (n, m) in enumerate(zip(layout.lengths.tolist(), keys.lengths.tolist(), strict=True)):
        if n:
            of_class.setdefault(((n - 1).bit_length(), (m - 1).bit_length()), []).append(sample)
    buckets = []
    for _, members in sorted(of_class.items()):
        chosen = torch.tensor(members, device=layout.offsets.device)
        padded = _pad(keys, chosen)
        queries = padded if keys is layout else _pad(layout, chosen)
        buckets.append(
            Bucket(queries=queries, keys=padded, visible=_visible(mask, chosen, queries, padded, layout, keys))
        )
    return buckets


def _pad(layout: Layout, chosen: Tensor) -> PaddedRows:
    lengths = layout.lengths[chosen]
    place = torch.arange(int(lengths.max()), device=chosen.device)
    real = place < lengths[:, None]
    return PaddedRows(
        tokens=(layout.offsets[chosen, None] + place)[real],
        places=real.flatten().nonzero().squeeze(1),
        shape=(real.shape[0], real.shape[1]),
    )


def _visible(
    mask: Mask, chosen: Tensor, queries: PaddedRows, padded: PaddedRows, layout: Layout, keys: Layout
) -> Tensor:
    (_, n), (_, m) = queries.shape, padded.shape
    num_queries, num_keys, context, history = (
        x[chosen, None, None] for x in (layout.lengths, keys.lengths, keys.context, keys.history)
    )
    row, j = torch.arange(n, device=chosen.device)[:, None], torch.arange(m, device=chosen.device)
    i = row + num_keys - num_queries  # the queries are the last of the keys' tokens
    flags: list[tuple[Tensor, Tensor] | None] = []
    for values in (keys.segments, keys.is_memory):
        own = None if values is None else padded.pad(values)
        at = i.squeeze(2).clamp(max=m - 1)
        flags.append(None if own is None else (own.gather(1, at.expand(-1, n))[:, :, None], own[:, None]))
    visible = mask.visible(i, j, context=context, history=history, segments=flags[0], memory=flags[1])
    return (visible & (j < num_keys)) | (row >= num_queries)


def softmax_attention_buckets(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask, *, alpha: float, keys: Layout
) -> Tensor:
    """Same as :func:`hstu.ops.attention.reference.softmax_attention_reference`."""
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    buckets = attention_buckets(layout, mask, keys)
    if not buckets:  # no queries: nothing to compute, but the graph reaches all three
        return q.new_zeros(0, heads, v.shape[2]) + 0.0 * (q.sum() + k.sum() + v.sum())
    parts = []
    for bucket in buckets:
        q_b = bucket.queries.pad(q).transpose(1, 2)
        k_b, v_b = (bucket.keys.pad(x).transpose(1, 2) for x in (k, v))
        if shared > 1:
            k_b, v_b = k_b.repeat_interleave(shared, 1), v_b.repeat_interleave(shared, 1)
        out = F.scaled_dot_product_attention(q_b, k_b, v_b, bucket.visible[:, None], scale=alpha)
        parts.append(out.transpose(1, 2).flatten(0, 1)[bucket.queries.places])
    order = torch.cat([bucket.queries.tokens for bucket in buckets])
    # Every row is written once: the empty tensor's content never shows.
    return q.new_empty(q.shape[0], heads, v.shape[-1]).index_copy(0, order, torch.cat(parts))
