"""What GPUs can do, by their makers' data sheets: for MFU and for planning."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight, and its share of the network.

    Attributes:
        memory: Bytes.
        bfloat16: Floating-point operations a second of dense matrix products.
        float32: Likewise, without tensor cores.
        memory_rate: Bytes a second.
        node_rate: Bytes a second to the other GPUs of its node, one way (NVLink).
        network_rate: Bytes a second to other nodes, one way (a 400 Gb/s adapter each).
    """

    memory: float
    bfloat16: float
    float32: float
    memory_rate: float
    node_rate: float
    network_rate: float

    def peak(self, dtype: str) -> float:
        """Return the floating-point operations a second of ``NetworkArgs.dtype_str``."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


GPUS = {
    "h100": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu(180e9, 2250e12, 75e12, 7.7e12, 900e9, 50e9),
}


def present_gpu() -> Gpu | None:
    """Return the GPU that this process computes on; None for a CPU or a GPU that is not listed."""
    if not torch.cuda.is_available():
        return None
    words = torch.cuda.get_device_name().lower().split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)
