"""The HSTU layer and its mask as the definition says, one token at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hstu.layers.hstu import HSTULayer
from hstu.layers.tokens import Tokens
from hstu.ops import Mask


def may_attend(i: int, j: int, length: int, context: int, candidates: int, mask: Mask) -> bool:
    """Whether token i of a sample may attend to token j."""
    history_end = length - candidates
    in_order = j <= i or (mask.context == "full" and i < context)
    if j >= history_end:  # to a candidate, itself and later ones of its group attend
        group = mask.candidate_group_size
        return j <= i and (i - history_end) // group == (j - history_end) // group and i >= history_end
    if mask.max_attn_len is not None and j >= context:
        in_window = min(i, history_end) - min(j, history_end) <= mask.max_attn_len
        return in_order and in_window
    return in_order


def norm(x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return out if weight is None or bias is None else out * weight + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def bucket(seconds: int, num_buckets: int) -> int:
    return min(int(math.log(max(1, abs(seconds))) / 0.301), num_buckets)


def naive_layer(layer: HSTULayer, x: Tensor, tokens: Tokens) -> Tensor:
    """``layer`` applied to ``x`` [T, D]; differentiable in the layer's parameters and ``x``."""
    c = layer.config
    normed = norm(x, c.norm_eps, layer.input_norm.weight, layer.input_norm.bias)
    projected = normed @ layer.uvqk.weight.T
    if layer.uvqk.bias is not None:
        projected = projected + layer.uvqk.bias
    v_width, qk_width = c.num_heads * c.value_channels, c.num_heads * c.qk_channels
    u, v, q, k = projected.split([v_width, v_width, qk_width, qk_width], dim=1)
    u = silu(u)
    if c.silu_on == "uvqk":
        v, q, k = silu(v), silu(q), silu(k)
    alpha = 1 / math.sqrt(c.qk_channels) if c.alpha is None else c.alpha
    rows = []
    layout = tokens.layout
    bounds, times = layout.offsets.tolist(), tokens.timestamps.tolist()
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        length, m = stop - start, int(layout.lengths[b] - layout.history[b])
        for i in range(length):
            is_candidate = i >= length - m
            after = i + 1 < length and not is_candidate and c.bias_query_time == "next"
            asked = times[start + i + 1] if after else times[start + i]
            heads = []
            for h in range(c.num_heads):
                qh, kh = (part[:, h * c.qk_channels : (h + 1) * c.qk_channels] for part in (q, k))
                vh = v[:, h * c.value_channels : (h + 1) * c.value_channels]
                out = torch.zeros(c.value_channels, dtype=x.dtype)
                for j in range(length):
                    if not may_attend(i, j, length, int(layout.context[b]), m, c.mask):
                        continue
                    score = alpha * (qh[start + i] * kh[start + j]).sum()
                    if layer.position_table is not None:
                        p_i, p_j = min(i, length - m), min(j, length - m)
                        score = score + layer.position_table[p_j - p_i + c.max_tokens - 1]
                    if layer.time_table is not None:
                        seconds = asked - times[start + j]
                        score = score + layer.time_table[bucket(seconds, c.time_bias_buckets)]
                    out = out + silu(score) * vh[start + j]
                heads.append(out / c.scaling_seqlen)
            rows.append(torch.cat(heads))
    o = torch.stack(rows) if rows else v
    gated = u * norm(o, c.norm_eps, layer.attention_norm.weight, layer.attention_norm.bias)
    if c.gate == "concat":
        gated = torch.cat([u, o, gated], dim=1)
    return gated @ layer.output.weight.T + layer.output.bias + x
