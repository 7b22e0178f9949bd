"""From host memory to a device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def host_to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values`` from host memory on ``device``; the host does not wait until they are there."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
