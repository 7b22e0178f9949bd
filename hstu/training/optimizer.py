"""Both optimizers as one: Megatron-Core's for dense weights, TorchRec's fused one for the tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from torch import Tensor

from hstu.config import OptimizerArgs
from hstu.parallel import Parallelized
from hstu.parallel.cpu import cuda_means_cpu
from hstu.parallel.tensor import Cut, cut_of
from hstu.training.schedule import schedule_factor


@dataclass(frozen=True)
class _Part:
    """What this rank steps of a parameter: ``stepped`` is the ``range`` of it when flat, or all of it (None).

    Of a parameter that was cut, all this is about this rank's share.
    """

    name: str
    shape: torch.Size
    stepped: Tensor
    range: slice | None
    cut: Cut | None

    def of(self, whole: Tensor) -> Tensor:
        own = whole if self.cut is None else self.cut.own(whole)
        return own if self.range is None else own.flatten()[self.range]


class Optimizer:
    """Steps dense weights after the backward pass; sharded tables have stepped during it.

    ``adam`` with weight decay is Adam with an L2 penalty, ``adamw`` decouples it. Replicated tables are
    dense weights that follow the tables' learning rate.

    Args:
        parallel: The distributed model.
        args: The knobs.
        total_steps: Where the schedule ends.
    """

    def __init__(self, parallel: Parallelized, args: OptimizerArgs, total_steps: int) -> None:
        self.parallel, self.args, self.total_steps = parallel, args, total_steps
        config = OptimizerConfig(
            optimizer="sgd" if args.optimizer_str == "sgd" else "adam",
            decoupled_weight_decay=args.optimizer_str == "adamw",
            lr=args.learning_rate,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_eps,
            sgd_momentum=args.sgd_momentum,
            weight_decay=args.weight_decay,
            clip_grad=args.clip_grad,
            use_distributed_optimizer=args.use_distributed_optimizer,
        )
        with cuda_means_cpu():
            self.megatron = get_megatron_optimizer(config, [parallel.dense.ddp], config_overrides=self._groups())
        self.engine = self.megatron.chained_optimizers[0]
        self.dense = self.engine.optimizer
        for group in self.dense.param_groups:
            group["fused"] = True  # one kernel for all weights
        self.parts = self._find_parts()

    def _groups(self) -> dict[ParamKey, Any]:
        """Return which weights have another learning rate: replicated tables, and those with a factor.

        That it is a dict also turns off Megatron's own rule for weight decay, which no config shows.
        """
        args, members = self.args, dict[tuple[float, bool], list[str]]()
        for name, _ in self.parallel.dense.ddp.module.named_parameters():
            fitting = [prefix for prefix in args.learning_rate_factors if name.startswith(prefix)]
            factor = args.learning_rate_factors[max(fitting, key=len)] if fitting else 1.0
            members.setdefault((factor, name.startswith("replicated.")), []).append(f"module.{name}")
        return {
            ParamKey(name=tuple(names)): {
                "max_lr": factor * (args.sparse_learning_rate if sparse else args.learning_rate),
                "sparse": sparse,
            }
            for (factor, sparse), names in members.items()
            if sparse or factor != 1
        }

    def prepare(self, step: int) -> float:
        """Clear gradients and set the learning rates of ``step`` (from 0); return the dense one."""
        self.parallel.dense.zero_grad()
        # Megatron leaves .grad at the reduced gradient, on which the next backward pass would add.
        self.megatron.zero_grad()
        dense, sparse = (schedule_factor(self.args, step, self.total_steps, sparse=of) for of in (False, True))
        for group in self.dense.param_groups:
            group["lr"] = group["max_lr"] * (sparse if group.get("sparse") else dense)
        self.parallel.tables.set_learning_rate(self.args.sparse_learning_rate * sparse)
        self.parallel.tables.step = step + 1
        return self.args.learning_rate * dense

    @torch.no_grad()
    def step(self) -> Tensor:
        """Average gradients over ranks, clip them and step the dense weights; return their norm before clipping, [].

        Megatron's own step would have the host wait for the norm.
        """
        self.parallel.dense.reduce_gradients()
        with cuda_means_cpu():
            self.megatron.prepare_grads()
            norm = self._gradient_norm()
            if self.args.clip_grad > 0:
                torch.nn.utils.clip_grads_with_norm_(self.engine.get_parameters(), self.args.clip_grad, norm)
            self.megatron.step_with_ready_grads()
        return norm

    def _gradient_norm(self) -> Tensor:
        """Return the norm of the gradients of all dense weights, whichever ranks step them, []."""
        gradients = self.engine.get_main_grads_for_grad_norm()
        norm = torch.nn.utils.get_total_norm(gradients).to(self.parallel.mesh.device)
        if self.parallel.mesh.world_size == 1:
            return norm
        square = norm.square()
        torch.distributed.all_reduce(square, group=self.engine.get_grad_stats_parallel_group())
        return square.sqrt()

    def state(self) -> dict[str, Tensor]:
        """Return the dense optimizer's tensors as ``<parameter>.<name>``, whole, whatever the number of ranks.

        With the distributed optimizer each rank holds a part of them, and they are gathered.
        """
        return {f"{part.name}.{key}": self._whole(part, value) for part, key, value in self.moments()}

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Take ``state`` as ``state()`` returned it, after ``step`` steps."""
        for part, key, value in self.moments():
            value.copy_(part.of(state[f"{part.name}.{key}"]))
        for moments in self.dense.state.values():
            if "step" in moments:  # which Adam's bias correction needs; every parameter's is the run's
                moments["step"].fill_(step)

    def moments(self) -> Iterator[tuple[_Part, str, Tensor]]:
        """Yield the tensors that this rank holds beside each dense weight, with their part and name."""
        self._allocate()
        for part in self.parts:
            for key, value in self.dense.state[part.stepped].items():
                if key != "step":
                    yield part, key, value

    def _whole(self, part: _Part, value: Tensor) -> Tensor:
        if part.range is not None:
            flat = value.new_zeros(part.shape.numel())
            flat[part.range] = value
            value = self.parallel.mesh.tokens.sum(flat).view(part.shape)
        return value if part.cut is None else part.cut.whole(value)

    def _find_parts(self) -> list[_Part]:
        named = self.parallel.dense.ddp.module.named_parameters()
        names = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        if not self.args.use_distributed_optimizer:
            return [_Part(name, p.shape, p, None, cut_of(p)) for name, p in names]
        found = []
        for name, parameter in names:
            place = self.engine.model_param_group_index_map.get(parameter)
            if place is None:  # owned by other ranks altogether
                empty = parameter.detach().flatten()[:0]
                found.append(_Part(name, parameter.shape, empty, slice(0, 0), cut_of(parameter)))
                continue
            owned = self.engine._get_model_param_range_map(parameter)["param"]
            stepped = self.dense.param_groups[place[0]]["params"][place[1]]
            found.append(_Part(name, parameter.shape, stepped, slice(owned.start, owned.end), cut_of(parameter)))
        return found

    def _allocate(self) -> None:
        """Create the state that torch makes on the first step, so that a checkpoint can be loaded into it."""
        for part in self.parts:
            moments = self.dense.state[part.stepped]
            if moments:
                continue
            if not isinstance(self.dense, torch.optim.SGD):
                zeros = {name: torch.zeros_like(part.stepped) for name in ("exp_avg", "exp_avg_sq")}
                moments.update(step=torch.zeros((), device=part.stepped.device), **zeros)
            elif self.args.sgd_momentum:
                moments["momentum_buffer"] = torch.zeros_like(part.stepped)
