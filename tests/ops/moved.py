"""Problems of tests, made in host memory, on the device that is to compute them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch


def moved(value: Any, device: str) -> Any:
    """Return ``value`` with every tensor in it on ``device``; what is there once stays one object."""
    return value if device == "cpu" else _moved(value, device, {})


def _moved(value: Any, device: str, known: dict[int, Any]) -> Any:
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, torch.Tensor):
        found: Any = value.detach().to(device)
    elif isinstance(value, (list, tuple)):
        found = type(value)(_moved(part, device, known) for part in value)
    elif isinstance(value, dict):
        found = {key: _moved(part, device, known) for key, part in value.items()}
    elif is_dataclass(value) and not isinstance(value, type):
        own = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        found = type(value)(**{name: _moved(part, device, known) for name, part in own.items()})
    else:
        found = value
    known[id(value)] = found
    return found
