"""HSTU generative recommenders: plain PyTorch modules on jagged tensors, trained on one process or many.

run = hstu.fit(events, user="user", item="item", time="time", run_dir="runs/shop")
run.recommend(k=10)
hstu.open_run("runs/shop").evaluate("test")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hstu.api import Run, fit, open_run

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "fit", "open_run"]

# Name: the module that has it, which is imported when the name is first asked for.
_LATER = {name: "hstu.api" for name in ("Run", "fit", "open_run")}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'hstu' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
