"""Sums of files: made as they are written, checked when they are read."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 1 << 20  # bytes of a file that have a sum of their own
_SAMPLED = 8  # blocks of a file that are checked at every start
_DIGITS = 16  # of the sum of a block, in hexadecimal


def file_sums(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return name -> size in bytes and SHA-256 of ``paths``, several read at once."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # a sum is made without the interpreter's lock
        paths = list(paths)
        return {path.name: found for path, found in zip(paths, pool.map(_file_sum, paths), strict=True)}


def _file_sum(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"bytes": status.st_size, "sha256": _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns)}


@functools.lru_cache(maxsize=1024)  # one process asks several times for the same checkpoint
def _sha256(path: Path, inode: int, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_sum(record: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class SummedFile:
    """A new file whose blocks are summed up as they are written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by ``finish``
        self._sums: list[str] = []
        self._hash, self._room, self._size = hashlib.sha256(), BLOCK, 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self._file.write(data)
        view = memoryview(data).cast("B")
        self._size += len(view)
        while len(view):
            part, view = view[: self._room], view[self._room :]
            self._hash.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._next_block()

    def _next_block(self) -> None:
        self._sums.append(self._hash.hexdigest()[:_DIGITS])
        self._hash, self._room = hashlib.sha256(), BLOCK

    def finish(self) -> dict[str, Any]:
        """Put the file on disk; returns what ``find_damage`` compares it with."""
        self._file.flush()
        os.fsync(self._file.fileno())  # a power failure may not leave holes behind
        self._file.close()
        if self._room < BLOCK:
            self._next_block()
        return {"bytes": self._size, "blocks": self._sums}


def block_sums(path: Path) -> dict[str, Any]:
    """Return what ``find_damage`` compares a file with, made of one that is there."""
    with open(path, "rb") as file:
        sums = [hashlib.sha256(block).hexdigest()[:_DIGITS] for block in iter(lambda: file.read(BLOCK), b"")]
    return {"bytes": path.stat().st_size, "blocks": sums}


def find_damage(path: Path, known: dict[str, Any], *, whole: bool) -> str | None:
    """Return what is wrong with a file, if anything is: its size and all of its blocks, or a random sample of them."""
    try:
        size, sums = path.stat().st_size, known["blocks"]
        if size != known["bytes"]:
            return f"has {size} bytes instead of {known['bytes']}"
        chosen = range(len(sums)) if whole else random.SystemRandom().sample(range(len(sums)), min(_SAMPLED, len(sums)))
        with open(path, "rb") as file:
            for number in chosen:
                file.seek(number * BLOCK)
                if hashlib.sha256(file.read(BLOCK)).hexdigest()[:_DIGITS] != sums[number]:
                    return f"has other contents than were written, near byte {number * BLOCK}"
    except FileNotFoundError:
        return "is missing"
    return None


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file of a data set, whose pages have sums of their own.

    Raises:
        ValueError: If it is damaged, also when it is read.
    """
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not readable as parquet ({reason}); run the preprocessor again") from error
