"""One HSTU layer as one operation, with its memory in hand."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.checks import check_arguments
from hstu.ops.attention.cpu.run import CpuAttention
from hstu.ops.attention.mask import Mask
from hstu.ops.layer.fused import Attention, FusedLayer, LayerCall
from hstu.ops.layer.kernels import TorchKernels
from hstu.ops.layer.options import LayerOptions, LayerWeights
from hstu.ops.layer.reference import hstu_layer_reference

__all__ = ["LayerOptions", "LayerWeights", "hstu_layer"]

BACKENDS = ("auto", "reference", "cpu", "triton")


def hstu_layer(
    x: Tensor,
    offsets: Tensor,
    weights: LayerWeights,
    options: LayerOptions,
    *,
    backend: str = "auto",
    **attention: Any,
) -> Tensor:
    """``x + W_o gate(u, norm(o)) + b_o``, o the attention of ``[u | v | q | k] = silu(W norm(x) + b)``.

    From "Actions Speak Louder than Words" (Zhai et al., ICML 2024), section 3. Differentiable in x, the
    weights and the tables of the relative bias.

    Args:
        x: ``[T, D]``, of the dtype of the norms' weights; that of the products may be narrower.
        offsets: ``[B + 1]`` int64.
        weights: of the layer.
        options: shape, form, and what the backward computes again instead of keeping it.
        backend: ``"auto"`` (by device), ``"reference"`` (plain torch), ``"cpu"`` or ``"triton"``.
        attention: keyword arguments of :func:`hstu.ops.hstu_attention`: ``max_seqlen``, ``scaling_seqlen``,
            masks and ``bias``.

    Returns:
        ``[T, D]``.

    Raises:
        ValueError: shapes that do not fit the options, an unknown backend, or what the attention refuses.
    """
    _check(x, weights, options)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        on_gpu = x.is_cuda and x.dtype != torch.float64 and find_spec("triton") is not None
        backend = "cpu" if x.device.type == "cpu" else "triton" if on_gpu else "reference"
    if backend == "reference":
        return hstu_layer_reference(x, offsets, weights, options, {**attention, "backend": "reference"})
    bias = attention.get("bias") or RelativeBias()
    call = _prepare(x, weights.uvqk.dtype, offsets, options, bias, backend, dict(attention))
    return FusedLayer.apply(x, call, *weights.tensors(), bias.position, bias.time)


def _prepare(
    x: Tensor,
    products: torch.dtype,
    offsets: Tensor,
    options: LayerOptions,
    bias: RelativeBias,
    backend: str,
    attention: dict[str, Any],
) -> LayerCall:
    attention.pop("bias", None)
    max_seqlen, scaling_seqlen = attention.pop("max_seqlen"), attention.pop("scaling_seqlen")
    alpha = attention.pop("alpha", None)
    alpha = 1.0 / math.sqrt(options.qk_width) if alpha is None else alpha
    context = attention.pop("context_attention", "causal")
    if context not in ("causal", "full"):
        raise ValueError(f"context_attention is {context!r}: choose 'causal' or 'full'")
    mask = Mask(context_full=context == "full", **attention)
    one, shape = x.new_empty((), dtype=products), (x.shape[0], options.num_heads)
    qk, v = (one.expand(*shape, width) for width in (options.qk_width, options.v_width))
    check_arguments(qk, qk, v, offsets, max_seqlen, scaling_seqlen, mask, bias)
    kernels: TorchKernels = TorchKernels()
    attend: Attention
    if backend == "triton":
        from hstu.ops.attention.triton.launch import AttentionCall, TritonAttention
        from hstu.ops.layer.triton import TritonKernels

        kernels = TritonKernels()
        prepared = AttentionCall.prepare(qk, v, offsets, max_seqlen, scaling_seqlen, alpha, mask, bias)
        attend = TritonAttention(prepared)
    else:
        attend = CpuAttention(offsets, options.num_heads, scaling_seqlen, alpha, mask, bias)
    return LayerCall(options, kernels, attend, int(torch.randint(2**31 - 1, ())))


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
        dtype = x.dtype if "norm" in name else weights.uvqk.dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device:
            raise ValueError(
                f"weights.{name} must be {list(shape)} of {dtype} on {x.device}, "
                f"got {list(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
