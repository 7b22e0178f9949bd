"""Checks shared by the operations: shapes always, values where reading them costs no device sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_debug = False


@contextmanager
def debug_checks(enabled: bool = True) -> Iterator[None]:
    """Check the values of offsets and lengths on an accelerator too, within this context (it syncs)."""
    global _debug
    before, _debug = _debug, enabled
    try:
        yield
    finally:
        _debug = before


def values_readable(tensor: torch.Tensor) -> bool:
    """Whether the values of ``tensor`` may be inspected: on the CPU always, elsewhere in debug mode."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or (_debug and tensor.device.type != "meta")


def check_offsets(name: str, offsets: torch.Tensor, total: int | None) -> None:
    """Raise ``ValueError`` unless ``offsets`` is ``[B + 1]`` int64, from 0 to ``total``, never decreasing.

    ``total`` = None: to any number.
    """
    if offsets.dim() != 1 or offsets.numel() == 0 or offsets.dtype != torch.int64:
        raise ValueError(f"{name} must be a [B + 1] int64 tensor, got shape {list(offsets.shape)} of {offsets.dtype}")
    if not values_readable(offsets):
        return
    if int(offsets[0]) != 0 or total not in (None, int(offsets[-1])):
        wanted = "" if total is None else f" {total}"
        raise ValueError(
            f"{name} must run from 0 to the number of tokens{wanted}, got {int(offsets[0])} .. {int(offsets[-1])}"
        )
    if bool((offsets[1:] < offsets[:-1]).any()):
        where = int((offsets[1:] < offsets[:-1]).nonzero()[0])
        raise ValueError(f"{name} must not decrease, but it does after entry {where}: check the lengths")
