"""Attention on jagged tensors: HSTU's with every mask and the relative bias inside, and softmax attention."""

from __future__ import annotations

import logging
import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.checks import check_arguments
from hstu.ops.attention.cpu.run import hstu_attention_cpu
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.reference import hstu_attention_reference
from hstu.ops.attention.softmax import Bucket, attention_buckets, softmax_attention

__all__ = ["Bucket", "Mask", "RelativeBias", "attention_buckets", "hstu_attention", "softmax_attention"]

BACKENDS = ("auto", "reference", "cpu", "triton")
logger = logging.getLogger(__name__)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_seqlen: int,
    scaling_seqlen: float,
    alpha: float | None = None,
    causal: bool = True,
    num_context: Tensor | None = None,
    num_candidates: Tensor | None = None,
    candidate_group_size: int = 1,
    context_attention: str = "causal",
    max_attn_len: int | None = None,
    segments: Tensor | None = None,
    is_memory: Tensor | None = None,
    bias: RelativeBias | None = None,
    backend: str = "auto",
) -> Tensor:
    """Pointwise attention ``o_i = 1/S sum_j M_ij silu(alpha <q_i, k_j> + r_ij) v_j`` within each sequence.

    From "Actions Speak Louder than Words" (Zhai et al., ICML 2024), section 3. Differentiable in q, k, v
    and both bias tables. T tokens of B sequences, no padding, H heads. Token i reads token j when

    * ``j <= i`` (always, if not ``causal``; context tokens too, if ``context_attention = "full"``), and
    * j is memory or context, or in i's segment, and
    * j is no candidate, or i is the same candidate or a later one of its group, and
    * ``p_i - p_j <= max_attn_len``, or j is context or memory, or i is memory; ``p_i`` is the place in the
      sequence, for all candidates the one after the last token before them.

    Args:
        q: ``[T, H, d_qk]``, float32, bfloat16, float16 or float64; head widths up to 256.
        k: ``[T, H, d_qk]``.
        v: ``[T, H, d_v]``.
        offsets: ``[B + 1]`` int64, from 0 to T.
        max_seqlen: a bound on the longest sequence; sizes grids, never changes the result.
        scaling_seqlen: S, a constant of the model.
        alpha: factor on the scores; ``1 / sqrt(d_qk)`` when None.
        causal: read only tokens at or before one's own place.
        num_context: ``[B]`` int64, leading context tokens of each sequence.
        num_candidates: ``[B]`` int64, trailing candidates of each sequence.
        candidate_group_size: candidates in consecutive groups of this size read earlier ones of the group.
        context_attention: ``"causal"`` or ``"full"`` (context tokens also read the history).
        max_attn_len: window, in positions; None for no limit.
        segments: ``[T]`` int32.
        is_memory: ``[T]`` bool, tokens that every later segment may read.
        bias: relative bias of the layer, shared by its heads.
        backend: ``"auto"`` (by device), ``"reference"`` (dense, the definition), ``"cpu"`` or ``"triton"``.

    Returns:
        ``[T, H, d_v]`` in the dtype of v.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. Values on an accelerator are looked at
            only inside :func:`hstu.ops.debug_checks`.
    """
    if context_attention not in ("causal", "full"):
        raise ValueError(f"context_attention is {context_attention!r}: choose 'causal' or 'full'")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    mask = Mask(
        causal=causal,
        context_full=context_attention == "full",
        candidate_group_size=candidate_group_size,
        max_attn_len=max_attn_len,
        num_context=num_context,
        num_candidates=num_candidates,
        segments=segments,
        is_memory=is_memory,
    )
    check_arguments(q, k, v, offsets, max_seqlen, scaling_seqlen, mask, bias)
    alpha = 1.0 / math.sqrt(q.shape[-1]) if alpha is None else alpha
    if backend == "auto":
        backend = _choose(q)
    common: dict[str, Any] = {"scaling_seqlen": scaling_seqlen, "alpha": alpha, "mask": mask, "bias": bias}
    if backend == "triton":
        from hstu.ops.attention.triton.launch import hstu_attention_triton

        return hstu_attention_triton(q, k, v, offsets, max_seqlen=max_seqlen, **common)
    if backend == "cpu" and q.device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs CPU tensors, q is on {q.device}: use backend='auto'")
    run = hstu_attention_cpu if backend == "cpu" else hstu_attention_reference
    return run(q, k, v, offsets, **common)


def _choose(q: Tensor) -> str:
    """Backend for the device and dtype of q."""
    if q.device.type == "cpu":
        backend, reason = "cpu", "CPU tensors"
    elif q.device.type != "cuda" or q.dtype == torch.float64:
        backend, reason = "reference", f"no kernel for {q.dtype} on {q.device.type}"
    elif find_spec("triton") is None:
        backend, reason = "reference", "triton is not installed"
    else:
        backend, reason = "triton", "CUDA tensors"
    _announce(backend, reason)
    return backend


@cache
def _announce(backend: str, reason: str) -> None:
    logger.info("hstu_attention: backend %r (%s)", backend, reason)
