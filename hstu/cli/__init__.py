"""What the commands call. Each module here is one command."""

import sys as _sys
from types import TracebackType as _TracebackType

_show = _sys.excepthook


def _without_traceback(kind: type[BaseException], error: BaseException, trace: _TracebackType | None) -> None:
    """Say in a word that Ctrl-C came while modules were imported; the interpreter then ends with that signal."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=_sys.stderr)
    else:
        _show(kind, error, trace)


_sys.excepthook = _without_traceback
