"""Forward and backward of the pieces of a layer, in torch: the CPU's, and the interface of the GPU's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.ops.layer.options import LayerOptions

aten = torch.ops.aten
Affine = tuple[Tensor | None, Tensor | None]  # weight and bias of a norm, or their gradients
Moments = tuple[Tensor, Tensor]  # mean and reciprocal deviation of each row


class TorchKernels:
    """Pieces of the fused layer; :class:`hstu.ops.layer.triton.TritonKernels` replaces some of them."""

    def norm(self, x: Tensor, affine: Affine, eps: float, dtype: torch.dtype) -> tuple[Tensor, Moments]:
        """Layer norm over the last dimension, in ``dtype``."""
        n, *moments = torch.native_layer_norm(_wide(x), x.shape[-1:], *affine, eps)
        return n.to(dtype), (moments[0], moments[1])

    def norm_backward(
        self, grad: Tensor, x: Tensor, moments: Moments, affine: Affine, residual: Tensor
    ) -> tuple[Tensor, Affine]:
        """Gradients of x (plus ``residual``), weight and bias."""
        wanted = [True, *(parameter is not None for parameter in affine)]
        wide = _wide(x)
        dx, dw, db = aten.native_layer_norm_backward(grad.to(wide.dtype), wide, x.shape[-1:], *moments, *affine, wanted)
        return dx.add_(residual).to(x.dtype), (dw if wanted[1] else None, db if wanted[2] else None)

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

    def activate_backward(self, grad: Tensor, z: Tensor, silu_columns: int, sums: bool) -> tuple[Tensor, Tensor | None]:
        """Gradient of z, in the memory of ``grad``, and its sum over the rows if wanted."""
        part = grad[:, :silu_columns]
        aten.silu_backward.grad_input(part, z[:, :silu_columns], grad_input=part)
        return grad, grad.sum(0) if sums else None

    def gate(
        self, u: Tensor, o: Tensor, affine: Affine, options: LayerOptions, seed: Tensor | None
    ) -> tuple[Tensor, Moments]:
        """``dropout(u * norm(o))`` or of the concatenation; moments of o."""
        n, *moments = torch.native_layer_norm(_wide(o), o.shape[-1:], *affine, options.eps)
        gated = n.mul_(u).to(u.dtype)
        if options.gate == "concat":
            gated = torch.cat([u, o, gated], 1)
        if seed is not None:
            gated.mul_(self._keep(gated, options, seed))
        return gated, (moments[0], moments[1])

    def gate_backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor],
        moments: Moments,
        affine: Affine,
        options: LayerOptions,
        seed: Tensor | None,
        du: Tensor,
    ) -> tuple[Tensor, Affine]:
        """Write the gradient of u to ``du``; return those of o, weight and bias. ``inputs``: u and o."""
        if seed is not None:
            grad = grad * self._keep(grad, options, seed)
        u, o = inputs[0], _wide(inputs[1])
        width = o.shape[1]
        d_gated = grad[:, -width:]
        n = torch.native_layer_norm(o, o.shape[-1:], *affine, options.eps)[0].to(u.dtype)
        torch.mul(d_gated, n, out=du)
        residual = grad.new_zeros(())
        if options.gate == "concat":
            du += grad[:, :width]
            residual = grad[:, width : 2 * width]
        do, d_affine = self.norm_backward(d_gated * u, o, moments, affine, residual)
        return do.to(u.dtype), d_affine

    @staticmethod
    def _keep(like: Tensor, options: LayerOptions, seed: Tensor) -> Tensor:
        """Factors of the dropout, drawn again from the seed rather than kept."""
        generator = torch.Generator(like.device).manual_seed(int(seed))
        keep = torch.empty_like(like).bernoulli_(1.0 - options.dropout, generator=generator)
        return keep.div_(1.0 - options.dropout)


def _wide(x: Tensor) -> Tensor:
    """Norms are computed in float32, as their weights are, beside low-precision products and streams."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
