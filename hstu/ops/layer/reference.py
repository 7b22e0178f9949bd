"""The HSTU layer in plain torch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.reference import hstu_attention_reference
from hstu.ops.layer.options import LayerOptions, LayerWeights


def hstu_layer_reference(
    x: Tensor,
    layout: Layout,
    weights: LayerWeights,
    options: LayerOptions,
    mask: Mask,
    *,
    scaling_seqlen: float,
    alpha: float,
    bias: RelativeBias,
) -> Tensor:
    """See :func:`hstu.ops.layer.hstu_layer`."""
    n = F.layer_norm(
        x.to(torch.promote_types(x.dtype, torch.float32)),
        x.shape[-1:],
        weights.norm_weight,
        weights.norm_bias,
        options.eps,
    )
    z = F.linear(n.to(weights.uvqk.dtype), weights.uvqk, weights.uvqk_bias)
    active = options.silu_columns
    u, v, q, k = torch.cat([F.silu(z[:, :active]), z[:, active:]], 1).split(options.splits, 1)
    q, k, v = (part.unflatten(1, (options.num_heads, -1)) for part in (q, k, v))
    o = hstu_attention_reference(
        q, k, v, layout, mask, scaling_seqlen=scaling_seqlen, alpha=alpha, bias=bias, keys=layout
    ).flatten(1)
    wide = o.to(torch.promote_types(x.dtype, torch.float32))
    gated = u * F.layer_norm(wide, o.shape[-1:], weights.gate_norm_weight, weights.gate_norm_bias, options.eps)
    if options.gate == "concat":
        gated = torch.cat([u, o, gated], 1)
    gated = F.dropout(gated, options.dropout).to(weights.output.dtype)
    return F.linear(gated, weights.output, weights.output_bias).to(x.dtype) + x
