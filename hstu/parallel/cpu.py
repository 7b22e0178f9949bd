"""Megatron-Core on a machine without CUDA: where it hard-codes the device, the CPU takes its place.

With CUDA present everything here does nothing, so the same code runs on both. Megatron-Core 0.16.1 asks
for ``device="cuda"``, ``torch.cuda.current_device()`` and parameters of type ``torch.cuda.*Tensor`` in
its gradient buffers and optimizers; nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class _CudaMeansCpu(TorchFunctionMode):
    """Answers every request for CUDA with the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], torch.dtype) and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@contextmanager
def cuda_means_cpu() -> Iterator[None]:
    """Run Megatron-Core code inside this; forward and backward passes stay outside."""
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: _CPU),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        _CudaMeansCpu(),
    ):
        yield


def let_cuda_mean_cpu() -> None:
    """Let Megatron-Core's sequence parallelism, also in the backward pass, put its buffers on the CPU for good."""
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
