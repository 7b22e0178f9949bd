"""Attention on jagged tensors: HSTU's with every mask and the relative bias inside, and softmax attention."""

from __future__ import annotations

import logging
import math
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.checks import check_hstu, check_softmax
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.reference import hstu_attention_reference, softmax_attention_reference

__all__ = ["Layout", "Mask", "RelativeBias", "choose_backend", "hstu_attention", "softmax_attention"]

BACKENDS = ("auto", "reference", "padded", "cpu", "triton")
logger = logging.getLogger(__name__)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mask: Mask = Mask(),  # noqa: B008 - frozen
    *,
    scaling_seqlen: float,
    alpha: float | None = None,
    bias: RelativeBias | None = None,
    keys: Layout | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pointwise attention ``o_i = 1/S sum_j M_ij silu(alpha <q_i, k_j> + r_ij) v_j`` within each sequence.

    From "Actions Speak Louder than Words" (Zhai et al., ICML 2024), section 3. Differentiable in q, k, v
    and both bias tables. T tokens of B sequences, no padding, H heads.

    Args:
        q: ``[T, H, d_qk]``, float32, bfloat16, float16 or float64; head widths up to 256.
        k: ``[T, H, d_qk]``; with ``keys``, of the tokens of that layout.
        v: ``[T, H, d_v]``, likewise.
        layout: of q: made once a batch, so that layers plan nothing.
        mask: M, who attends to whom.
        scaling_seqlen: S, a constant of the model.
        alpha: factor on the scores; ``1 / sqrt(d_qk)`` when None.
        bias: relative bias of the layer, shared by its heads.
        keys: layout of k and v where they are longer than q: row r of a sample of n queries and m keys stands
            at place ``m - n + r`` (a cache in front). It describes all tokens. Default: the layout of q.
        backend: ``"auto"`` (by device), ``"reference"`` (dense, the definition), ``"padded"`` (the definition, all
            samples at once: what ``torch.export`` gets), ``"cpu"`` or ``"triton"``.

    Returns:
        ``[T, H, d_v]`` in the dtype of v.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. Values on an accelerator are looked at
            only inside :func:`hstu.ops.debug_checks`.
    """
    keys, bias = keys or layout, bias or RelativeBias()
    check_hstu(q, k, v, layout, keys, scaling_seqlen, bias)
    alpha = 1.0 / math.sqrt(q.shape[-1]) if alpha is None else alpha
    backend = choose_backend("hstu_attention", backend, q)
    if backend == "triton":
        from hstu.ops.attention.triton.hstu import hstu_attention_triton as run
    elif backend == "cpu":
        from hstu.ops.attention.cpu.run import hstu_attention_cpu as run
    elif backend == "padded":
        from hstu.ops.attention.padded import hstu_attention_padded as run
    else:
        run = hstu_attention_reference
    return run(q, k, v, layout, mask, scaling_seqlen=scaling_seqlen, alpha=alpha, bias=bias, keys=keys)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mask: Mask = Mask(),  # noqa: B008 - frozen
    *,
    alpha: float | None = None,
    keys: Layout | None = None,
    backend: str = "auto",
) -> Tensor:
    """``o_i = sum_j softmax_j(alpha <q_i, k_j>) v_j`` over the tokens j that i attends to; differentiable.

    Args:
        q: ``[T, H, d_qk]``.
        k: ``[T, G, d_qk]``; G divides H, and H / G consecutive query heads share a key and value head.
        v: ``[T, G, d_v]``.
        layout: of q, as in :func:`hstu_attention`; so are the other arguments.
        mask: who attends to whom.
        alpha: factor on the scores; ``1 / sqrt(d_qk)`` when None.
        keys: layout of k and v where they are longer than q.
        backend: ``"auto"`` (by device), ``"reference"``, ``"padded"``, ``"cpu"`` or ``"triton"``.

    Returns:
        ``[T, H, d_v]`` in the dtype of q.

    Raises:
        ValueError: see :func:`hstu_attention`.
    """
    keys = keys or layout
    check_softmax(q, k, v, layout, keys)
    alpha = 1.0 / math.sqrt(q.shape[-1]) if alpha is None else alpha
    backend = choose_backend("softmax_attention", backend, q)
    if backend == "triton":
        from hstu.ops.attention.triton.softmax import softmax_attention_triton as run
    elif backend == "cpu":
        from hstu.ops.attention.softmax import softmax_attention_buckets as run
    elif backend == "padded":
        from hstu.ops.attention.padded import softmax_attention_padded as run
    else:
        run = softmax_attention_reference
    return run(q, k, v, layout, mask, alpha=alpha, keys=keys)


def choose_backend(operation: str, backend: str, x: Tensor) -> str:
    """Return the backend of ``operation`` for the device and dtype of ``x``, telling once which and why.

    Raises:
        ValueError: an unknown backend, or one that does not run on this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "cpu" and x.device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs CPU tensors, q is on {x.device}: use backend='auto'")
    if backend != "auto":
        return backend
    if torch.compiler.is_exporting():
        return "padded"
    if x.device.type == "cpu":
        backend, reason = "cpu", "CPU tensors"
    elif x.device.type != "cuda" or x.dtype == torch.float64:
        backend, reason = "reference", f"no kernel for {x.dtype} on {x.device.type}"
    elif find_spec("triton") is None:
        backend, reason = "reference", "triton is not installed"
    else:
        backend, reason = "triton", "CUDA tensors"
    _announce(operation, backend, reason)
    return backend


@cache
def _announce(operation: str, backend: str, reason: str) -> None:
    logger.info("%s: backend %r (%s)", operation, backend, reason)
