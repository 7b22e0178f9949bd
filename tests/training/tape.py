"""CUDA graphs without a GPU: operators are written down with all that the host said to them, and done again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hstu import ops
from hstu.layers import preprocess
from hstu.models import losses
from hstu.models.encoder import Encoder
from hstu.ops import Layout

#: Operators that tell the host a value, or a size that depends on values.
READ = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}


class Tape(TorchDispatchMode):
    """Writes operators down with their arguments, be they tensors in memory or numbers of the host.

    A replay does what a graph does on a device: the same operators, with the same numbers of the host, on what stands
    in the memory of their tensors by then. Whatever else depends on the batch is that of the one that was recorded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func.overloadpacket.__name__ not in READ, f"{func} reads a value"
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, _tensors(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Do it again, with results where they were."""
        for func, args, kwargs, results in self.steps:
            for new, old in zip(_tensors(func(*args, **kwargs)), results, strict=True):
                if new.data_ptr() != old.data_ptr():  # else it is a view, or was written to
                    old.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]


class TapeRecorder:
    """A recorder of ``hstu.training.graphs`` for tensors in host memory.

    Attributes:
        recorded: Operators of each recording.
        replays: Number of them.
    """

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replays = 0

    def aside(self, run: Callable[[], None]) -> None:
        """Run with random numbers that are drawn again afterwards."""
        with torch.random.fork_rng(devices=[]):
            run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return a replay of ``run``."""
        with torch.random.fork_rng(devices=[]), Tape() as tape:  # a graph that is recorded draws nothing
            run()
        self.recorded.append(len(tape.steps))

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


def compute_by_shapes(model: Encoder, patch: pytest.MonkeyPatch) -> None:
    """Let ``model`` take the ways of a GPU in host memory: plans by shapes, nothing that looks at values."""
    longest = model.preprocess.max_tokens

    def laid_out(offsets: Tensor, *, max_seqlen: int | None = None, **fields: Any) -> Layout:
        return Layout(offsets, max_seqlen=longest, **fields)

    for module in [module for name, module in sys.modules.items() if name.startswith("hstu.")]:
        if hasattr(module, "values_readable"):
            patch.setattr(module, "values_readable", lambda tensor: False)
    patch.setattr(preprocess, "Layout", laid_out)
    patch.setattr(losses, "pool_cross_entropy", _with("chunked", ops.pool_cross_entropy))
    for layer in model.modules():
        if not isinstance(layer, nn.ModuleList) and callable(attention := getattr(layer, "attention", None)):
            patch.setattr(layer, "attention", _with("padded", attention))


def _with(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **{**kwargs, "backend": backend})

    return call
