"""A step of training with the GPU replaced: what would be launched there, and what the host would wait for, is counted.

Tensors stay in host memory; attention, layers and rows take the kernels' way, whose launches do nothing
(``benchmarks/null_driver.py``). Lookups and steps of sharded tables are TorchRec's and FBGEMM's and are not counted.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hstu.layers import hstu as layers
from hstu.layers import preprocess
from hstu.ops import Layout
from hstu.ops.jagged import reference
from hstu.ops.jagged import rows as jagged
from hstu.parallel.embedding import HeldRows
from hstu.training import step
from hstu.training.trainer import Trainer
from tests.launch import ROOT

#: They allocate or describe.
_FREE = {"lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor"}
#: Their results, or the sizes of these, are read by the host.
_ON_HOST = (" hstu_layer", " take")  # numbers that were drawn or counted there
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal"}


class Counted(TorchDispatchMode):
    """Counts operators that launch, by name and by the line of ``hstu`` that asks for them, and lines that wait.

    Of the host's own work, which a clock would not tell the same twice: all ``operators``, and ``calls`` of functions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.waits: list[str] = []
        self.operators = self.calls = self.lookups = 0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not self.paused and not name.startswith("_record_function"):
            chosen = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
            by_mask = any(x is not None and x.dtype == torch.bool for x in chosen)
            if by_mask or (name in _WAITS and not _place().endswith(_ON_HOST)):
                self.waits.append(f"{name} {_place()}")
            self.operators += 1
            if not views and name not in _FREE:
                self.launches[name] += 1
                self.places[_place()] += 1
        return func(*args, **(kwargs or {}))

    def profile(self, frame: Any, event: str, _: Any) -> None:
        """Count a call of a function of the package, for ``sys.setprofile``."""
        self.calls += event == "call" and not self.paused and "/hstu/" in frame.f_code.co_filename

    def kernel(self, *_: Any, **__: Any) -> None:
        """Count a launch of a kernel of ours."""
        if self.paused:
            return
        self.launches["triton"] += 1
        self.places[_place()] += 1


def _place() -> str:
    own = [f for f in traceback.extract_stack() if "/hstu/" in f.filename]
    return f"{own[-1].filename.rsplit('/hstu/')[-1]}:{own[-1].lineno} {own[-1].name}" if own else "autograd"


@contextlib.contextmanager
def counted(run: Trainer) -> Iterator[Counted]:
    """Let ``run`` take its steps inside as on a GPU, and count what they launch."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import null_driver

    sys.path.pop(0)
    count = Counted()
    for layer in run.model.modules():
        if isinstance(layer, layers.HSTULayer):
            layer.config = replace(layer.config, backend="triton")
    longest = run.model.preprocess.max_tokens

    def laid_out(offsets: torch.Tensor, *, max_seqlen: int | None = None, **fields: Any) -> Layout:
        return Layout(offsets, max_seqlen=None if count.paused else longest, **fields)

    def paused(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, count.paused = count.paused, True
            try:
                return function(*args, **kwargs)
            finally:
                count.paused = before

        return call

    def located(offsets: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        count.kernel()
        return plain(offsets, total)

    def located_plainly(offsets: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
        owner = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff(), output_size=total)
        return owner, torch.arange(total) - offsets[owner]

    plain = paused(located_plainly)

    class Driver(null_driver.NullDriver):
        def launcher_cls(self, source: Any, metadata: Any) -> Any:
            return count.kernel

    tables, answer = run.parallel.tables, paused(run.parallel.tables.forward)

    def looked_up(*features: Any) -> Any:
        count.lookups += 1
        return answer(*features)

    modules = [m for name, m in sys.modules.items() if name.startswith("hstu.") and hasattr(m, "values_readable")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(null_driver, "NullDriver", Driver))
        stack.enter_context(null_driver.null_driver(90))
        for module in modules:
            stack.enter_context(mock.patch.object(module, "values_readable", lambda tensor: False))
        stack.enter_context(mock.patch.object(layers.HSTULayer, "_is_fused", lambda self, x: True))
        stack.enter_context(mock.patch.object(jagged, "_has_kernel", lambda device: True))
        stack.enter_context(mock.patch.object(preprocess, "Layout", laid_out))
        stack.enter_context(mock.patch.object(step._Check, "read", lambda check: None))  # of what no kernel has written
        # What is counted in host memory, and drawn there, is no launch.
        stack.enter_context(mock.patch.object(step, "batch_flops", paused(step.batch_flops)))
        stack.enter_context(mock.patch.object(jagged, "located", located))
        stack.enter_context(mock.patch.object(reference, "located", located))
        stack.enter_context(mock.patch.object(HeldRows, "step", paused(HeldRows.step)))
        stack.enter_context(mock.patch.object(tables, "forward", looked_up))
        stack.enter_context(count)
        stack.callback(sys.setprofile, sys.getprofile())
        sys.setprofile(count.profile)
        yield count
