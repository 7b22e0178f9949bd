"""A step of training with the GPU replaced: what would be launched there, and what the host would wait for, is counted.

Tensors stay in host memory; attention, layers and rows take the kernels' way, whose launches do nothing
(``benchmarks/null_driver.py``). Of the lookups and steps of sharded tables, which are TorchRec's and FBGEMM's, only
the waits are counted.
"""

from __future__ import annotations

import contextlib
import numbers
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hstu import ops
from hstu.layers import hstu as layers
from hstu.layers import preprocess
from hstu.models import losses
from hstu.ops import Layout, loops, softmax_attention
from hstu.ops.jagged import reference
from hstu.ops.jagged import rows as jagged
from hstu.ops.row_sets import PARTS
from hstu.parallel.dynamic import DynamicTables
from hstu.parallel.embedding import HeldRows
from hstu.parallel.fused_adam import HostAdamTables
from hstu.parallel.row_map import RowMap
from hstu.training import step
from hstu.training.trainer import Trainer
from tests.launch import ROOT

#: They allocate or describe.
_FREE = {"lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "scalar_tensor"}
#: Numbers that were drawn or counted in host memory.
_ON_HOST = (" take",)
#: Operators whose results, or the sizes of these, are read by the host.
_READ = {
    "_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim", "_unique", "_unique2",
}  # fmt: skip
#: Methods that hand out values; of a tensor in host memory they are no operators.
_HANDED_OUT = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu", Tensor.__array__: "__array__"}


class Counted(TorchDispatchMode):
    """Counts operators that launch, by name and by the line of ``hstu`` that asks for them, and lines that wait.

    Of the host's own work, which a clock would not tell the same twice: all ``operators``, and ``calls`` of functions.

    Attributes:
        launches: Operators and kernels.
        places: The lines that ask for them.
        waits: What would wait for the device, and the lines that ask for it.
        lookups: Times that rows of tables were asked for.
        paused: Whether launches are left out.
        on_host: Whether all that is done now is done in host memory.
        said: Every launch with all that the host says: numbers, and shapes of tensors; None: it is not written down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.waits: list[str] = []
        self.operators = self.calls = self.lookups = 0
        self.paused = self.on_host = False
        self.said: list[Any] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READ or _has_mask(name, args) or (name == "repeat_interleave" and not _is_sized(args, kwargs)):
            self.wait(name)
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (self.paused or self.on_host or name.startswith("_record_function")):
            self.operators += 1
            if not views and name not in _FREE:
                self.launches[name] += 1
                self.places[_place()] += 1
            self._note(func, args, kwargs)
        return func(*args, **(kwargs or {}))

    def profile(self, frame: Any, event: str, _: Any) -> None:
        """Count a call of a function of the package, for ``sys.setprofile``."""
        left_out = self.paused or self.on_host
        self.calls += event == "call" and not left_out and "/hstu/" in frame.f_code.co_filename

    def _note(self, what: Any, *given: Any) -> None:
        if self.said is not None:
            flat = [
                (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else getattr(x, "base", x)
                for x in tree_flatten(given)[0]
            ]
            self.said.append((str(what), [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in flat]))

    def kernel(self, *given: Any, **__: Any) -> None:
        """Count a launch of a kernel of ours."""
        if self.paused or self.on_host:
            return
        self._note("triton", given[:3], given[9:])  # the grid and the arguments; between them is what was compiled
        self.launches["triton"] += 1
        self.places[_place()] += 1

    def wait(self, what: str) -> None:
        """Count a wait for ``what``."""
        if not self.on_host and not (place := _place()).endswith(_ON_HOST):
            self.waits.append(f"{what} {place}")


class Asked(TorchFunctionMode):
    """Counts the waits that are no operators, or others than on a device, of tensors in host memory.

    Args:
        count: Where.
    """

    def __init__(self, count: Counted) -> None:
        super().__init__()
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _HANDED_OUT:
            self.count.wait(_HANDED_OUT[func])
        elif func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            self.count.wait("tensor")  # a list is copied to the device
        elif func is Tensor.to and not kwargs.get("non_blocking") and _names_device(*args[1:], *kwargs.values()):
            if not _place().startswith("parallel/cpu.py"):  # Megatron-Core's, of what is there already
                self.count.wait("to")
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            by_tensor = any(isinstance(x, Tensor) and x.dtype != torch.bool for x in index)
            # Rows of a list are copied to the device, and so is a number that is written to rows of a tensor.
            if any(isinstance(x, list) for x in index):
                self.count.wait("index")
            elif func is Tensor.__setitem__ and by_tensor and isinstance(args[2], numbers.Number):
                self.count.wait("index_put")
        return func(*args, **kwargs)


def _has_mask(name: str, args: Any) -> bool:
    """Return whether rows are chosen by a mask, whose number the host has to know."""
    chosen = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
    if not any(x is not None and x.dtype == torch.bool for x in chosen):
        return False
    return not (name.startswith("index_put") and args[2].numel() == 1)  # then the others are kept


def _is_sized(args: Any, kwargs: Any) -> bool:
    """Return whether the host knows the size of what ``repeat_interleave`` makes."""
    return bool(kwargs) and kwargs.get("output_size") is not None or not isinstance(args[-1], Tensor)


def _names_device(*arguments: Any) -> bool:
    """Return whether one of the arguments of ``Tensor.to`` is a device, or a tensor that has one."""
    return any(isinstance(x, (torch.device, Tensor, str)) for x in arguments)


def _place() -> str:
    """Return the innermost line of ``hstu`` that is running, and that of TorchRec where this one has called it."""
    found = []
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        path = frame.f_code.co_filename
        for package in ("torchrec", "hstu"):
            if f"/{package}/" in path and (package == "hstu" or not found):
                found.append(f"{path.rsplit(f'/{package}/')[-1]}:{line} {frame.f_code.co_name}")
        if "/hstu/" in path:
            return " < ".join(found)
    return "autograd"


@contextlib.contextmanager
def counted(run: Trainer) -> Iterator[Counted]:
    """Let ``run`` take its steps inside as on a GPU, and count what they launch and wait for."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import null_driver

    sys.path.pop(0)
    count = Counted()

    class Driver(null_driver.NullDriver):
        def launcher_cls(self, source: Any, metadata: Any) -> Any:
            return count.kernel

    for layer in run.model.modules():
        if isinstance(layer, layers.HSTULayer):
            layer.config = replace(layer.config, backend="triton")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(null_driver, "NullDriver", Driver))
        stack.enter_context(null_driver.null_driver(90))
        for owner, name, value in (*_as_on_gpu(run, count), *_apart(run, count)):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(Asked(count))
        stack.enter_context(count)
        stack.callback(sys.setprofile, sys.getprofile())
        sys.setprofile(count.profile)
        yield count


def _as_on_gpu(run: Trainer, count: Counted) -> Iterator[tuple[Any, str, Any]]:
    """Yield what makes a step take the kernels' way: a module or an object, a name, and what is to stand there."""
    longest = run.model.preprocess.max_tokens

    def laid_out(offsets: Tensor, *, max_seqlen: int | None = None, **fields: Any) -> Layout:
        return Layout(offsets, max_seqlen=None if count.on_host else longest, **fields)

    def located_plainly(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
        owner = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff(), output_size=total)
        return owner, torch.arange(total) - offsets[owner]

    plain = _marked(located_plainly, count, "paused")

    def located(offsets: Tensor, total: int) -> Any:
        count.kernel()
        return plain(offsets, total)

    def pool_cross_entropy(*args: Any, columns: Tensor | None = None, **kwargs: Any) -> Any:
        backend = "auto" if columns is None else "triton"
        return ops.pool_cross_entropy(*args, columns=columns, backend=backend, **kwargs)

    for module in [module for name, module in sys.modules.items() if name.startswith("hstu.")]:
        if hasattr(module, "values_readable"):
            yield module, "values_readable", lambda tensor: False
        if hasattr(module, "host_to_device"):
            yield module, "host_to_device", lambda values, device: values
    for layer in run.model.modules():
        if getattr(layer, "attention", None) is softmax_attention:
            yield layer, "attention", partial(softmax_attention, backend="triton")
    if isinstance(tables := run.parallel.tables, DynamicTables):
        for rows in tables.maps.values():
            own = rows.map
            parts = own.parts, torch.device("cpu")
            yield rows, "map", RowMap(own.usable + PARTS, own.args, *parts, fixed_shapes=True)
    yield loops, "_torch_only", True
    yield layers.HSTULayer, "_is_fused", lambda self, x: True
    yield losses, "pool_cross_entropy", pool_cross_entropy
    yield preprocess, "Layout", laid_out
    yield jagged, "_has_kernel", lambda device: True
    yield jagged, "located", located
    yield reference, "located", located


def _apart(run: Trainer, count: Counted) -> Iterator[tuple[Any, str, Any]]:
    """Yield in the same way what is no launch, and of it what is done in host memory, or on a CPU alone."""
    tables = run.parallel.tables
    answer = tables.found

    def found(*answers: Any) -> Any:
        count.lookups += 1
        return answer(*answers)

    yield tables, "found", found
    yield step._Check, "read", lambda check: None  # of what no kernel has written
    for owner, name in ((HeldRows, "step"), (tables, "forward")):
        yield owner, name, _marked(getattr(owner, name), count, "paused")
    on_host = (
        (step, "batch_flops"),
        (run.model, "training_batch"),
        (HostAdamTables, "forward"),
        (HostAdamTables, "adam_step"),
    )
    for owner, name in on_host:
        yield owner, name, _marked(getattr(owner, name), count, "on_host")


def _marked(function: Any, count: Counted, mark: str) -> Any:
    """Return ``function``, during which ``mark`` of ``count`` is true."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before = getattr(count, mark)
        setattr(count, mark, True)
        try:
            return function(*args, **kwargs)
        finally:
            setattr(count, mark, before)

    return call
