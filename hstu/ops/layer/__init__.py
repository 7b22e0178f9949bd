"""One HSTU layer as one operation, with its memory in hand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hstu.ops.attention import choose_backend
from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.checks import check_hstu
from hstu.ops.attention.cpu.run import CpuAttention
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.layer.fused import Attention, FusedLayer, LayerCall
from hstu.ops.layer.kernels import TorchKernels
from hstu.ops.layer.options import LayerOptions, LayerWeights
from hstu.ops.layer.reference import hstu_layer_reference

__all__ = ["LayerOptions", "LayerWeights", "hstu_layer"]


def hstu_layer(
    x: Tensor,
    layout: Layout,
    weights: LayerWeights,
    options: LayerOptions,
    mask: Mask = Mask(),  # noqa: B008 - frozen
    *,
    scaling_seqlen: float,
    alpha: float | None = None,
    bias: RelativeBias | None = None,
    backend: str = "auto",
) -> Tensor:
    """``x + W_o gate(u, norm(o)) + b_o``, o the attention of ``[u | v | q | k] = silu(W norm(x) + b)``.

    From "Actions Speak Louder than Words" (Zhai et al., ICML 2024), section 3. Differentiable in x, the
    weights and the tables of the relative bias.

    Args:
        x: ``[T, D]``. The norms' weights are of its dtype, or of float32 where that is wider; those of the products may
            be narrower.
        layout: of the batch.
        weights: of the layer.
        options: shape, form, and what the backward computes again instead of keeping it.
        mask: who attends to whom.
        scaling_seqlen: as in :func:`hstu.ops.hstu_attention`; so are ``alpha`` and ``bias``.
        alpha: see ``scaling_seqlen``.
        bias: see ``scaling_seqlen``.
        backend: ``"auto"`` (by device), ``"reference"`` (plain torch), ``"cpu"`` or ``"triton"``.

    Returns:
        ``[T, D]``.

    Raises:
        ValueError: shapes that do not fit the options, an unknown backend, or what the attention refuses.
    """
    _check(x, weights, options)
    bias = bias or RelativeBias()
    alpha = 1.0 / math.sqrt(options.qk_width) if alpha is None else alpha
    one, shape = x.new_empty((), dtype=weights.uvqk.dtype), (x.shape[0], options.num_heads)
    qk, v = (one.expand(*shape, width) for width in (options.qk_width, options.v_width))
    check_hstu(qk, qk, v, layout, layout, scaling_seqlen, bias)
    backend = choose_backend("hstu_layer", backend, x)
    if backend == "reference":
        return hstu_layer_reference(
            x, layout, weights, options, mask, scaling_seqlen=scaling_seqlen, alpha=alpha, bias=bias
        )
    kernels: TorchKernels = TorchKernels()
    attention: Attention
    if backend == "triton":
        from hstu.ops.attention.triton.hstu import TritonAttention
        from hstu.ops.layer.triton import TritonKernels

        kernels = TritonKernels()
        attention = TritonAttention(layout, mask, scaling_seqlen=scaling_seqlen, alpha=alpha, bias=bias, keys=layout)
    else:
        attention = CpuAttention(
            layout,
            mask,
            heads=options.num_heads,
            scaling_seqlen=scaling_seqlen,
            alpha=alpha,
            bias=bias,
            keys=layout,
        )
    # Drawn where it is used: nothing waits for it, and a CUDA graph that is replayed draws anew.
    seed = torch.randint(2**31 - 1, (1,), device=x.device) if options.dropout else None
    call = LayerCall(options, kernels, attention, seed)
    return FusedLayer.apply(x, call, *weights.tensors(), bias.position, bias.time)


def _check(x: Tensor, weights: LayerWeights, options: LayerOptions) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [T, D], got {list(x.shape)}")
    hidden, gated, projected = x.shape[1], options.splits[0], sum(options.splits)
    expected = {
        "uvqk": (projected, hidden),
        "uvqk_bias": (projected,),
        "output": (hidden, options.gated_width),
        "output_bias": (hidden,),
        "norm_weight": (hidden,),
        "norm_bias": (hidden,),
        "gate_norm_weight": (gated,),
        "gate_norm_bias": (gated,),
    }
    for name, shape in expected.items():
        tensor = getattr(weights, name)
        if tensor is None:
            continue
        dtype = torch.promote_types(x.dtype, torch.float32) if "norm" in name else weights.uvqk.dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"weights.{name} must be {list(shape)} of {dtype} on {x.device}, "
                f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
