"""Tests that run Triton kernels in its interpreter; ``test_interpreted.py`` starts them in a process of their own.

The interpreter is chosen when triton is imported, for the whole process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unwritten outputs are NaN, so that a kernel that forgets a row is found out."""
    import torch

    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    yield
    torch.use_deterministic_algorithms(False)
