"""A driver without a device: Triton compiles for the GPU that is named, and a launch does nothing.

    with null_driver(90) as compiled:
        hstu_attention(...)  # on CPU tensors; ``compiled`` gathers the files of each kernel that was compiled

Serves to look at kernels, and at the time that a call takes on the host, where there is no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from hstu.ops.attention.triton import config

_DEVICES = itertools.count(1000)


class _Utils:
    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32}


class NullDriver:
    """The part of Triton's driver that a launch asks."""

    def __init__(self, arch: int) -> None:
        self.target, self.utils = GPUTarget("cuda", arch, 32), _Utils()
        self.device = next(_DEVICES)  # a kernel keeps what was compiled for each, whatever its architecture

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


@contextmanager
def null_driver(arch: int) -> Iterator[list[dict[str, str]]]:
    """Launch on CPU tensors as if they were on a device of compute capability ``arch / 10``."""
    compiled: list[dict[str, str]] = []

    def loaded(module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        compiled.append(files)

    hooks = triton.knobs.runtime
    before = driver._active
    with mock.patch.object(config, "capability", lambda device: arch):
        driver.set_active(NullDriver(arch))
        hooks.kernel_load_start_hook.add(loaded) if hasattr(hooks.kernel_load_start_hook, "add") else setattr(
            hooks, "kernel_load_start_hook", loaded
        )
        try:
            yield compiled
        finally:
            driver._active = before
