"""A progress bar where somebody looks at one: a terminal, or a notebook in its own form."""

from __future__ import annotations

import sys
from typing import Any


def in_notebook() -> bool:
    """Return whether this interpreter is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    shown = shell and shell.get_ipython()
    return shown is not None and "IPKernelApp" in getattr(shown, "config", {})


def progress_bar(**options: Any) -> Any:
    """Return a bar of tqdm with ``options``; None where there is neither a terminal nor a notebook."""
    if in_notebook():
        from tqdm.auto import tqdm

        return tqdm(**options)
    if not sys.stdout.isatty():
        return None
    from tqdm import tqdm as plain

    return plain(**options)
