"""Forward and backward of the pieces of a layer, in torch: the CPU's, and the interface of the GPU's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.layer.options import LayerOptions

aten = torch.ops.aten


class TorchKernels:
    """Pieces of the fused layer; :class:`hstu.ops.layer.triton.TritonKernels` replaces some of them."""

    def norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Layer norm over the last dimension: output in ``dtype``, mean and reciprocal deviation."""
        n, mean, deviation = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        return n.to(dtype), mean, deviation

    def norm_backward(
        self,
        grad: Tensor,
        x: Tensor,
        mean: Tensor,
        deviation: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x (plus ``residual``), weight and bias."""
        wanted = [True, weight is not None, bias is not None]
        grad = grad.to(x.dtype)
        dx, dw, db = aten.native_layer_norm_backward(grad, x, x.shape[-1:], mean, deviation, weight, bias, wanted)
        return dx.add_(residual), dw if wanted[1] else None, db if wanted[2] else None

    def project(self, n: Tensor, weight: Tensor, bias: Tensor | None, silu_columns: int) -> tuple[Tensor, Tensor]:
        """``z = n W^T + b``, and z with SiLU on its leading columns."""
        z = F.linear(n, weight, bias)
        return z, self.activate(z, silu_columns)

    def activate(self, z: Tensor, silu_columns: int) -> Tensor:
        """SiLU on the leading columns."""
        if silu_columns == z.shape[1]:
            return F.silu(z)
        active = z.clone()
        F.silu(active[:, :silu_columns], inplace=True)
        return active

    def activate_backward(self, grad: Tensor, z: Tensor, silu_columns: int) -> Tensor:
        """Gradient of z, in the memory of ``grad``."""
        part = grad[:, :silu_columns]
        aten.silu_backward.grad_input(part, z[:, :silu_columns], grad_input=part)
        return grad

    def gate(
        self, u: Tensor, o: Tensor, weight: Tensor | None, bias: Tensor | None, options: LayerOptions, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``dropout(u * norm(o))`` or of the concatenation; mean and reciprocal deviation of o."""
        n, mean, deviation = torch.native_layer_norm(_wide(o), o.shape[-1:], weight, bias, options.eps)
        gated = n.mul_(u).to(u.dtype)
        if options.gate == "concat":
            gated = torch.cat([u, o, gated], 1)
        if options.dropout:
            gated.mul_(self._keep(gated, options, seed))
        return gated, mean, deviation

    def gate_backward(
        self,
        grad: Tensor,
        u: Tensor,
        o: Tensor,
        mean: Tensor,
        deviation: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: LayerOptions,
        seed: int,
        du: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Write the gradient of u to ``du``; return those of o, weight and bias."""
        if options.dropout:
            grad = grad * self._keep(grad, options, seed)
        width, o = o.shape[1], _wide(o)
        d_gated = grad[:, -width:]
        n = torch.native_layer_norm(o, o.shape[-1:], weight, bias, options.eps)[0].to(u.dtype)
        torch.mul(d_gated, n, out=du)
        residual = grad.new_zeros(())
        if options.gate == "concat":
            du += grad[:, :width]
            residual = grad[:, width : 2 * width]
        do, dw, db = self.norm_backward(d_gated * u, o, mean, deviation, weight, bias, residual)
        return do.to(u.dtype), dw, db

    @staticmethod
    def _keep(like: Tensor, options: LayerOptions, seed: int) -> Tensor:
        """Factors of the dropout, drawn again from the seed rather than kept."""
        generator = torch.Generator(like.device).manual_seed(seed)
        keep = torch.empty_like(like).bernoulli_(1.0 - options.dropout, generator=generator)
        return keep.div_(1.0 - options.dropout)


def _wide(o: Tensor) -> Tensor:
    """The norm's weights stay in float32 beside low-precision products."""
    return o.to(torch.promote_types(o.dtype, torch.float32))
