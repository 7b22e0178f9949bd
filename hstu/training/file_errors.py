"""What to say when the system refuses a file."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, or ask for more",
    errno.EFBIG: "choose a file system that takes larger files",
    errno.ENOENT: "was its directory removed?",
    errno.EEXIST: "choose another place",  # a file where there should be a directory
    errno.EISDIR: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.EACCES: "choose a place that you may write",
    errno.EPERM: "choose a place that you may write",
    errno.EROFS: "choose a place that can be written",
    errno.EIO: "the disk may be broken",
    errno.ESTALE: "the file system may be gone",
}


def is_foreseeable(error: OSError) -> bool:
    """Return whether the fault is that of a disk or a directory, not of this program."""
    return error.errno in _REMEDIES


def describe(error: OSError) -> str:
    """Return file, fault and remedy in one line."""
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.filename or 'a file'}: {error.strerror or error}" + ("" if remedy is None else f"; {remedy}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors the name of the file, which those of writing to an open one lack."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
