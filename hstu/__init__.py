"""HSTU generative recommenders: plain PyTorch modules on jagged tensors, trained on one process or many.

run = hstu.fit(events, user="user", item="item", time="time", run_dir="runs/shop")
run.recommend(k=10)
hstu.open_run("runs/shop").evaluate("test")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hstu.api import Run, fit, open_run
    from hstu.config.backbones import register_backbone
    from hstu.config.features import register_encoder
    from hstu.config.retrieval import register_loss
    from hstu.data.files.formats import register_reader

__version__ = "0.1.0"
__all__ = [
    "Run",
    "__version__",
    "fit",
    "open_run",
    "register_backbone",
    "register_encoder",
    "register_loss",
    "register_reader",
]

# Name: the module that has it, which is imported when the name is first asked for.
_LATER = {
    **dict.fromkeys(("Run", "fit", "open_run"), "hstu.api"),
    "register_backbone": "hstu.config.backbones",
    "register_encoder": "hstu.config.features",
    "register_loss": "hstu.config.retrieval",
    "register_reader": "hstu.data.files.formats",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'hstu' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LATER[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
