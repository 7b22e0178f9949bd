"""What the devices can do: GPUs by their makers' data sheets, for MFU and for planning; CPUs by their flags."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace

import torch

from hstu.config import Config
from hstu.environment import cpu_flags

logger = logging.getLogger(__name__)

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last is Arm's


@dataclass(frozen=True)
class Peak:
    """Floating-point operations a second of matrix products without sparsity.

    Attributes:
        bfloat16: With tensor cores and sums in float32; None where they do not take bfloat16.
        float32: Without tensor cores, as torch computes unless asked for TF32.
    """

    bfloat16: float | None
    float32: float

    def of(self, dtype: str) -> float | None:
        """Return that of ``NetworkArgs.dtype_str``."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


#: By words of the device's name; of several that fit, the one with most words.
PEAKS = {
    "b200": Peak(2250e12, 75e12),
    "gb200": Peak(2500e12, 80e12),
    "h200": Peak(989e12, 67e12),
    "gh200": Peak(989e12, 67e12),
    "h100": Peak(989e12, 67e12),
    "h100 pcie": Peak(756e12, 51e12),
    "h100 nvl": Peak(835e12, 60e12),
    "a100": Peak(312e12, 19.5e12),
    "a40": Peak(149.7e12, 37.4e12),
    "a30": Peak(165e12, 10.3e12),
    "a10": Peak(125e12, 31.2e12),
    "l40s": Peak(362e12, 91.6e12),
    "l40": Peak(181e12, 90.5e12),
    "l4": Peak(121e12, 30.3e12),
    "v100": Peak(None, 15.7e12),
    "v100 pcie": Peak(None, 14e12),
    "t4": Peak(None, 8.1e12),
    "rtx 5090": Peak(209.5e12, 104.8e12),
    "rtx 4090": Peak(165.2e12, 82.6e12),
    "rtx 4080": Peak(97.5e12, 48.7e12),
    "rtx 3090": Peak(71e12, 35.6e12),
    "rtx 3090 ti": Peak(80e12, 40e12),
    "rtx 6000 ada": Peak(364.2e12, 91.1e12),
    "rtx a6000": Peak(154.8e12, 38.7e12),
}
_OTHER = {"laptop", "mobile", "max", "d", "super", "mig"}  # other boards under the name, or a part of one


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


def _gpu(name: str, memory: float, *rates: float) -> Gpu:
    peak = PEAKS[name]
    assert peak.bfloat16 is not None
    return Gpu(memory, peak.bfloat16, peak.float32, *rates)


GPUS = {
    "h100": _gpu("h100", 80e9, 3.35e12, 450e9, 50e9),
    "h200": _gpu("h200", 141e9, 4.8e12, 450e9, 50e9),
    "b200": _gpu("b200", 180e9, 7.7e12, 900e9, 50e9),
}


def peak_of(device: str) -> Peak | None:
    """Return the peak of a GPU by the name that CUDA gives it; None if it is not known."""
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    fitting = [name for name in PEAKS if set(name.split()) <= words]
    if not fitting or words & _OTHER:
        return None
    return PEAKS[max(fitting, key=lambda name: len(name.split()))]


def present_peak(dtype: str) -> float | None:
    """Return the floating-point operations a second of the GPU that this process computes on, in ``dtype``.

    None, which is said, if they are not known; None for a CPU.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = peak_of(name)
    if peak is None or peak.of(dtype) is None:
        logger.info("no MFU: the peak of %s in %s is not known", name, dtype)
        return None
    return peak.of(dtype)


def on_device(config: Config, device: torch.device) -> tuple[Config, tuple[str, ...]]:
    """Return the config as ``device`` computes it, and a line for what is not as it was asked for.

    A CPU without bfloat16 units emulates them, ten times slower than it computes in float32.
    """
    flags = cpu_flags()
    if device.type != "cpu" or config.network.dtype_str != "bfloat16" or not flags or flags & _BFLOAT16_FLAGS:
        return config, ()
    note = "note: NetworkArgs.dtype_str = 'bfloat16' is computed in float32: this CPU has no units for bfloat16"
    return replace(config, network=replace(config.network, dtype_str="float32", residual_dtype_str="float32")), (note,)
