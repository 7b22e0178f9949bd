"""Both optimizers as one: Megatron-Core's for dense weights, TorchRec's fused one for the tables."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, ParamKey, get_megatron_optimizer
from torch import Tensor

from hstu.config import OptimizerArgs
from hstu.parallel import Parallelized
from hstu.parallel.cpu import cuda_means_cpu
from hstu.training.schedule import schedule_factor


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
        self.sparse_rate = args.sparse_learning_rate or args.learning_rate
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
        )
        # An explicit dict also turns off Megatron's own rule for weight decay, which no config shows.
        overrides: dict[ParamKey, Any] = {ParamKey(name="*replicated.*"): {"max_lr": self.sparse_rate}}
        with cuda_means_cpu():
            self.megatron = get_megatron_optimizer(config, [parallel.dense.ddp], config_overrides=overrides)
        self.dense = self.megatron.chained_optimizers[0].optimizer

    def prepare(self, step: int) -> float:
        """Clear gradients and set the learning rates of ``step`` (from 0); return the dense one."""
        self.parallel.dense.zero_grad()
        # Megatron leaves .grad at the reduced gradient, on which the next backward pass would add.
        self.megatron.zero_grad()
        factor = schedule_factor(self.args, step, self.total_steps)
        for group in self.dense.param_groups:
            group["lr"] = group["max_lr"] * factor
        self.parallel.tables.set_learning_rate(self.sparse_rate * factor)
        return self.args.learning_rate * factor

    def step(self) -> None:
        """Average gradients over ranks, clip them and step the dense weights."""
        self.parallel.dense.reduce_gradients()
        with cuda_means_cpu():
            self.megatron.step()

    def state(self) -> dict[str, Tensor]:
        """Return the dense optimizer's tensors as ``<parameter>.<name>``, whatever the number of ranks."""
        names = {parameter: name for name, parameter in self.parallel.dense.ddp.module.named_parameters()}
        self._allocate()
        return {
            f"{names[parameter]}.{key}": value
            for parameter, state in self.dense.state.items()
            for key, value in state.items()
            if key != "step"
        }

    def set_step(self, step: int) -> None:
        """Set the steps taken, which Adam's bias correction needs; they are the run's."""
        self._allocate()
        for state in self.dense.state.values():
            if "step" in state:
                state["step"].fill_(step)

    def _allocate(self) -> None:
        """Create the state that torch makes on the first step, so that a checkpoint can be loaded into it."""
        for group in self.dense.param_groups:
            for parameter in group["params"]:
                if self.dense.state[parameter]:
                    continue
                if isinstance(self.dense, torch.optim.SGD):
                    if group["momentum"]:
                        self.dense.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                else:
                    self.dense.state[parameter].update(
                        step=torch.tensor(0.0),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )
