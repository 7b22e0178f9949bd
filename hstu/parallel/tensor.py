"""Tensor parallelism: heads and feed-forward widths split over ranks by Megatron-Core's linear layers.

"Megatron-LM" (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053); sequence parallelism after Korthikanti et al.
2022 (https://arxiv.org/abs/2205.05198). A model is built whole and then cut, so that initial weights do not depend
on the degree; checkpoints hold whole weights, so that any degree can load them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from hstu.config import TensorModelParallelArgs
from hstu.layers.dropout import Dropout, dropout
from hstu.layers.tensor_plan import Columns, Heads, OfAllHeads, PerToken, Rows
from hstu.layers.tokens import Tokens
from hstu.parallel.cpu import let_cuda_mean_cpu
from hstu.parallel.mesh import Group


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a tensor is cut: along ``dim`` it consists of ``parts``, and each rank has an equal share of each part.

    Attributes:
        dim: Dimension.
        parts: Whole sizes along it, such as those of u, v, q and k.
        group: The ranks.
    """

    dim: int
    parts: tuple[int, ...]
    group: Group

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's share of ``whole``."""
        shares = [part.chunk(self.group.size, self.dim)[self.group.rank] for part in whole.split(self.parts, self.dim)]
        return torch.cat(shares, self.dim)

    def whole(self, own: Tensor) -> Tensor:
        """Join the shares of all ranks."""
        shares = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.group.size)]
        dist.all_gather(shares, own.contiguous(), group=self.group.group)
        sizes = [part // self.group.size for part in self.parts]
        split = [share.split(sizes, self.dim) for share in shares]
        return torch.cat([own for part in zip(*split, strict=True) for own in part], self.dim)


def cut_of(parameter: Tensor) -> Cut | None:
    """Return how ``parameter`` was cut, or None if it is whole."""
    return getattr(parameter, "cut", None)


def whole_of(parameter: Tensor) -> Tensor:
    """Return ``parameter`` itself, or the shares of all ranks joined."""
    cut = cut_of(parameter)
    return parameter if cut is None else cut.whole(parameter.detach())


class TensorParallel:
    """Cuts the layers of a backbone, in place, for the ranks of ``group``."""

    def __init__(self, group: Group, args: TensorModelParallelArgs, device: torch.device) -> None:
        self.group, self.sequence_parallel = group, args.sequence_parallel
        self.config = ModelParallelConfig(
            tensor_model_parallel_size=group.size,
            sequence_parallel=args.sequence_parallel,
            use_cpu_initialization=True,
            perform_initialization=False,
        )
        if args.sequence_parallel and device.type == "cpu":
            let_cuda_mean_cpu()

    def split(self, backbone: nn.Module) -> nn.Module:
        """Return ``backbone``, whose layers have a share of the heads; ``check_degrees`` has allowed it."""
        layers = backbone.layers
        assert isinstance(layers, nn.ModuleList)
        for owner in (backbone, *layers):
            for name, part in owner.tensor_plan().items():
                self._carry_out(owner, name, part)
        return SequenceParallel(backbone, self.group) if self.sequence_parallel else backbone

    def _carry_out(self, owner: nn.Module, name: str, part: Columns | Rows | Heads | OfAllHeads | PerToken) -> None:
        if isinstance(part, OfAllHeads):
            parameter = getattr(owner, name)
            if parameter is not None:
                self._sum_gradient(parameter)
            return
        module = owner.get_submodule(name)
        if isinstance(part, Columns):
            self._columns(owner, name, part.parts)
        elif isinstance(part, Rows):
            self._rows(owner, name, part.parts)
        elif isinstance(part, Heads) and isinstance(module, Dropout):
            owner.add_module(name, _SharedDropout(module.p, Cut(dim=1, parts=part.parts, group=self.group)))
        elif isinstance(part, Heads):
            assert isinstance(module, nn.LayerNorm)
            owner.add_module(name, _HeadsNorm(module, self.group))
        elif self.sequence_parallel and isinstance(module, Dropout):
            owner.add_module(name, _SharedDropout(module.p, Cut(dim=0, parts=(), group=self.group)))
        elif self.sequence_parallel:
            for parameter in module.parameters():
                self._sum_gradient(parameter)

    def _columns(self, layer: nn.Module, name: str, parts: Sequence[int]) -> None:
        """Give each rank a share of the outputs of a linear layer."""
        whole = layer.get_submodule(name)
        assert isinstance(whole, nn.Linear)
        made = _ColumnLinear(*self._shape(whole), **self._options(whole), gather_output=False)
        self._fill(made.weight, whole.weight, Cut(dim=0, parts=tuple(parts), group=self.group))
        if whole.bias is not None:
            self._fill(made.bias, whole.bias, Cut(dim=0, parts=tuple(parts), group=self.group))
        layer.add_module(name, made.to(whole.weight.device))

    def _rows(self, layer: nn.Module, name: str, parts: Sequence[int]) -> None:
        """Give each rank a share of the inputs of a linear layer."""
        whole = layer.get_submodule(name)
        assert isinstance(whole, nn.Linear)
        made = _RowLinear(*self._shape(whole), **self._options(whole), input_is_parallel=True, skip_bias_add=False)
        self._fill(made.weight, whole.weight, Cut(dim=1, parts=tuple(parts), group=self.group))
        if whole.bias is not None:
            with torch.no_grad():
                made.bias.copy_(whole.bias)
            if self.sequence_parallel:
                self._sum_gradient(made.bias)
        layer.add_module(name, made.to(whole.weight.device))

    def _shape(self, linear: nn.Linear) -> tuple[int, int]:
        return linear.in_features, linear.out_features

    def _options(self, linear: nn.Linear) -> dict[str, Any]:
        return dict(config=self.config, init_method=nn.init.zeros_, bias=linear.bias is not None)

    def _fill(self, parameter: nn.Parameter, whole: Tensor, cut: Cut) -> None:
        assert not any(part % self.group.size for part in cut.parts), "refused by check_degrees"
        with torch.no_grad():
            parameter.copy_(cut.own(whole))
        _mark(parameter, cut)

    def _sum_gradient(self, parameter: nn.Parameter) -> None:
        def total(gradient: Tensor) -> Tensor:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=self.group.group)
            return gradient

        parameter.register_hook(total)


def _mark(parameter: nn.Parameter, cut: Cut) -> None:
    parameter.cut = cut  # type: ignore[attr-defined]
    # Megatron-Core counts what is not marked once for all ranks in the norm of the gradient.
    parameter.tensor_model_parallel, parameter.partition_dim = True, cut.dim  # type: ignore[attr-defined]


class _AutocastLinear:
    """Megatron-Core's products know autocast on CUDA alone."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input, weight = input.to(dtype), weight.to(dtype)
            options["bias"] = None if options.get("bias") is None else options["bias"].to(dtype)
        with torch.autocast(kind, enabled=False):
            out: Tensor = super()._forward_impl(input=input, weight=weight, **options)  # type: ignore[misc]
        return out


class _ColumnLinear(_AutocastLinear, ColumnParallelLinear):
    """Each rank computes its share of the outputs; of all tokens, also from a part of them."""

    tokens: int | None = None  #: Set by ``SequenceParallel``: those beyond it are padding.

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)[0]
        return out if self.tokens is None else out[: self.tokens]


class _RowLinear(_AutocastLinear, RowParallelLinear):
    """Each rank has its share of the inputs; the sum is whole, of all tokens or of a part of them."""

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            x = F.pad(x, (0, 0, 0, -x.shape[0] % self.tp_group.size()))
        out: Tensor = super().forward(x)[0]
        return out


class _HeadsNorm(nn.Module):
    """Layer norm over all heads of a token, of which each rank has a share."""

    def __init__(self, norm: nn.LayerNorm, group: Group) -> None:
        super().__init__()
        (self.width,), self.eps, self.group = norm.normalized_shape, norm.eps, group
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        cut = Cut(dim=0, parts=(self.width,), group=group)
        for name in ("weight", "bias"):
            whole = getattr(norm, name)
            parameter = None if whole is None else nn.Parameter(cut.own(whole.detach()).clone())
            self.register_parameter(name, parameter)
            if parameter is not None:
                _mark(parameter, cut)

    def forward(self, x: Tensor) -> Tensor:
        """Map [t, width / ranks] to the same shape, in float32 under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            centred = x - self._mean(x)
            normed = centred * (self._mean(centred.square()) + self.eps).rsqrt()
            out: Tensor = normed if self.weight is None or self.bias is None else normed * self.weight + self.bias
            return out

    def _mean(self, x: Tensor) -> Tensor:
        mean: Tensor = _Sum.apply(x.sum(1, keepdim=True), self.group.group) / self.width
        return mean


class _Sum(torch.autograd.Function):
    """Sum over ranks, each of which goes on with it alone: their gradients add up too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        dist.all_reduce(x, group=group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _SharedDropout(nn.Module):
    """Dropout of a part of a tensor, cut from one mask for the whole: ranks have the same random state."""

    def __init__(self, p: float, cut: Cut) -> None:
        super().__init__()
        self.p, self.cut = p, cut

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of ``x`` [t, width], cut along its first or second dimension."""
        if not self.training or self.p == 0:
            return x
        shape = list(x.shape)
        shape[self.cut.dim] *= self.cut.group.size
        kept = dropout(x.new_ones(shape), self.p, True)
        return x * replace(self.cut, parts=self.cut.parts or (shape[0],)).own(kept)


class SequenceParallel(nn.Module):
    """Runs a backbone whose layers keep only a part of the tokens between their products.

    Args:
        backbone: With layers cut by heads.
        group: The ranks.
    """

    def __init__(self, backbone: nn.Module, group: Group) -> None:
        super().__init__()
        self.layers, self.group = backbone.layers, group
        self.final_norm = getattr(backbone, "final_norm", None)
        # Not a submodule: its weights are named once.
        self.run = backbone.forward
        self.columns = [module for module in backbone.modules() if isinstance(module, _ColumnLinear)]

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [t, D] to hidden states [t, D]; all ranks have the same values."""
        total = tokens.values.shape[0]
        for column in self.columns:
            column.tokens = total
        padded = F.pad(tokens.values, (0, 0, 0, -total % self.group.size))
        part = scatter_to_sequence_parallel_region(padded, group=self.group.group)
        hidden = gather_from_sequence_parallel_region(
            self.run(tokens.with_values(part)), tensor_parallel_output_grad=False, group=self.group.group
        )
        return hidden[:total]
