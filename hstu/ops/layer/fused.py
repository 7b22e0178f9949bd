"""The HSTU layer as one autograd function: what the backward can compute again is not kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.layer.kernels import TorchKernels
from hstu.ops.layer.options import LayerOptions


class Attention(Protocol):
    """Forward and backward of the attention on one device."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None) -> Tensor:
        """Return the output ``[T, H, d_v]``."""

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor | None, Tensor | None],
        into: tuple[Tensor, Tensor, Tensor],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of q, k and v to ``into``; return those of the tables."""


@dataclass(frozen=True)
class LayerCall:
    """What a call needs besides its differentiable tensors; ``seed`` [1] int64, of its dropout, None without."""

    options: LayerOptions
    kernels: TorchKernels
    attention: Attention
    seed: Tensor | None

    def split(self, uvqk: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Views u ``[T, H d_v]``, and v, q, k ``[T, H, d]``."""
        u, v, q, k = uvqk.split(self.options.splits, 1)
        heads = self.options.num_heads
        return u, *(x.unflatten(1, (heads, x.shape[1] // heads)) for x in (v, q, k))


class FusedLayer(torch.autograd.Function):
    """``x + W_o gate(u, norm(attention(v, q, k)))`` with ``[u | v | q | k] = silu(W norm(x) + b)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: LayerCall, *rest: Tensor | None) -> Tensor:
        """``rest`` holds the weights in the order of ``LayerWeights.tensors`` and the two bias tables."""
        norm_w, norm_b, uvqk_w, uvqk_b, gate_w, gate_b, out_w, out_b, position, time = rest
        assert uvqk_w is not None and out_w is not None
        options, kernels = call.options, call.kernels
        n, moments = kernels.norm(x, (norm_w, norm_b), options.eps, uvqk_w.dtype)
        z, active = kernels.project(n, uvqk_w, uvqk_b, options.silu_columns)
        u, v, q, k = call.split(active)
        o = call.attention.forward(q, k, v, position, time).flatten(1)
        gated, o_moments = kernels.gate(u, o, (gate_w, gate_b), options, call.seed)
        out = F.linear(gated, out_w, out_b).to(x.dtype).add_(x)
        ctx.save_for_backward(
            x,
            *rest,
            None if options.recompute_norm else n,
            *moments,
            z,
            None if options.recompute_silu else active,
            o,
            *o_moments,
            None if options.recompute_gate else gated,
        )
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """All gradients; those of u, v, q and k are written side by side into one tensor."""
        call: LayerCall = ctx.call
        options, kernels = call.options, call.kernels
        saved = ctx.saved_tensors  # asked for once, as where the forward pass is computed again they are made then
        x, norm_w, norm_b, uvqk_w, uvqk_b, gate_w, gate_b, out_w, out_b, position, time = saved[:11]
        n, mean, deviation, z, active, o, o_mean, o_deviation, gated = saved[11:]
        norm, gate_norm = (norm_w, norm_b), (gate_w, gate_b)
        active = kernels.activate(z, options.silu_columns) if active is None else active
        u, v, q, k = call.split(active)
        if gated is None:
            gated = kernels.gate(u, o, gate_norm, options, call.seed)[0]
        grad = grad.contiguous()
        low = grad.to(gated.dtype)
        d_out_w, d_out_b = low.T @ gated, None if out_b is None else grad.sum(0)
        d_active = torch.empty_like(active)
        du, dv, dq, dk = call.split(d_active)
        do, d_gate_norm = kernels.gate_backward(
            low @ out_w, (u, o), (o_mean, o_deviation), gate_norm, options, call.seed, du
        )
        d_tables = call.attention.backward(
            do.view(v.shape), (q, k, v), (position, time), (dq, dk, dv), tuple(ctx.needs_input_grad[10:12])
        )
        dz, d_uvqk_b = kernels.activate_backward(d_active, z, options.silu_columns, uvqk_b is not None)
        n = kernels.norm(x, norm, options.eps, dz.dtype)[0] if n is None else n
        d_uvqk_w = dz.T @ n
        dx, d_norm = kernels.norm_backward(dz @ uvqk_w, x, (mean, deviation), norm, grad)
        return (dx, None, *d_norm, d_uvqk_w, d_uvqk_b, *d_gate_norm, d_out_w, d_out_b, *d_tables)
