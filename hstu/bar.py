"""A progress bar where somebody looks at one: a terminal, or a notebook in its own form."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import Any


def in_notebook() -> bool:
    """Return whether this interpreter is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    shown = shell and shell.get_ipython()
    return shown is not None and "IPKernelApp" in getattr(shown, "config", {})


def progress_bar(**options: Any) -> Any:
    """Return a bar of tqdm with ``options``; None without a terminal or notebook, or where warnings alone are shown."""
    handlers = logging.getLogger("hstu").handlers
    quiet = any(handler.level > logging.INFO for handler in handlers if not isinstance(handler, logging.FileHandler))
    if quiet or not (in_notebook() or sys.stdout.isatty()):
        return None
    if in_notebook() and find_spec("ipywidgets"):
        from tqdm.notebook import tqdm

        return tqdm(**options)
    from tqdm import tqdm as plain

    return plain(**options)
