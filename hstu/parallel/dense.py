"""Dense weights: replicated over the data ranks by Megatron-Core's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from hstu.config import OptimizerArgs
from hstu.parallel.cpu import cuda_means_cpu
from hstu.parallel.tensor import cut_of, whole_of


class DenseParallel:
    """Averages the gradients of ``module`` over ranks.

    The forward pass goes on calling the submodules themselves: Megatron's hooks sit on the parameters.

    Args:
        module: Every dense weight of the model, and none of the sharded tables: their slices would be
            flattened into Megatron's buffers too.
        args: Whether optimizer state is split over ranks, gradients are reduced during the backward pass, and which
            weights are frozen.

    Raises:
        ConfigError: for a prefix that no weight has.
    """

    def __init__(self, module: nn.Module, args: OptimizerArgs) -> None:
        names = [name for name, _ in module.named_parameters()]
        for field, prefixes in (("freeze", args.freeze), ("learning_rate_factors", args.learning_rate_factors)):
            for prefix in prefixes:
                if not any(name.startswith(prefix) for name in names):
                    first = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
                    raise args.error(field, f"no dense weight has a name that begins with {prefix!r}; they begin with "
                                     f"{first} (sharded tables are none)")  # fmt: skip
        for name, weight in module.named_parameters():
            if name.startswith(args.freeze):
                weight.requires_grad_(False)
        if args.freeze and not any(weight.requires_grad for weight in module.parameters()):
            raise args.error("freeze", "leaves no dense weight to learn")
        # Megatron's config describes a transformer; its wrapper reads only the parallel degrees.
        described = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
        with cuda_means_cpu():
            config = DistributedDataParallelConfig(
                use_distributed_optimizer=args.use_distributed_optimizer, overlap_grad_reduce=args.overlap_grad_reduce
            )
            self.ddp = DistributedDataParallel(described, config, module)
            self.ddp.broadcast_params()

    def state(self) -> dict[str, Tensor]:
        """Return every weight under its name, whole also where ranks hold parts of it."""
        return {name: whole_of(value).detach() for name, value in self._named()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take ``state`` as ``state()`` returned it."""
        for name, value in self._named():
            cut = cut_of(value)
            value.copy_(state[name] if cut is None else cut.own(state[name]))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters, and the buffers that are state: not those that whoever has the data sets."""
        yield from self.ddp.module.named_parameters()
        kept = self.ddp.module.state_dict().keys()
        yield from ((name, value) for name, value in self.ddp.module.named_buffers() if name in kept)

    def zero_grad(self) -> None:
        """Clear the gradient buffer before a step."""
        self.ddp.zero_grad_buffer()

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the weights that learn, and where their gradients are added up, which stays where it is."""
        return [(weight, weight.main_grad) for weight in self.ddp.module.parameters() if weight.requires_grad]

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        """Add the gradients of a backward pass inside to those before; ranks exchange them in the ``last`` one."""
        with nullcontext() if last else self.ddp.no_sync():
            yield

    def reduce_gradients(self) -> None:
        """Average gradients over ranks after the backward pass."""
        finalize_model_grads([self.ddp])
