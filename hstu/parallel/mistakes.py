"""Which rank prints a mistake that several may have found. No collective operations: other ranks may be anywhere."""

from __future__ import annotations

import hashlib
import time

import torch.distributed as dist


def is_first_to_tell(mistake: str) -> bool:
    """Return whether this rank is to print ``mistake``: one that has it is, rank 0 if it has it soon."""
    if dist.get_world_size() == 1:  # whose mesh may outlive many commands
        return True
    store, key = _told(), hashlib.sha256(mistake.encode()).hexdigest()
    deadline = time.monotonic() + (0 if dist.get_rank() == 0 else 3)
    try:
        store.set("any", "")
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return bool(store.add(key, 1) == 1)
    except RuntimeError:  # the store is gone
        return True


def is_told() -> bool:
    """Return whether a rank has ended with a mistake, which the others then notice by its absence."""
    try:
        return dist.get_world_size() > 1 and bool(_told().check(["any"]))
    except RuntimeError:
        return False


def _told() -> dist.Store:
    return dist.PrefixStore("told", dist.distributed_c10d._get_default_store())
