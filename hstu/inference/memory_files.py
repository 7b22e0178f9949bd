"""A directory of memory: a record of what it is of, and files of some users each, memory-mapped when they are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hstu.inference.opened import Opened
from hstu.training.checkpoint_files import MARKER

RECORD = "memory.json"
_AGAIN = "make it again in another directory with python -m hstu.cli.memory"
#: Tensors of a file with a row for each user: what is recalled, and what says which events it stands for.
_ROWS, _COVERED = ("keys_values", "times", "places", "lengths"), ("stop", "item", "time")
INDEX = {"user": pl.String, "part": pl.Int64, "row": pl.Int64, "stop": pl.Int64, "item": pl.Int64, "time": pl.Int64}


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """What the memory in a directory is of.

    Attributes:
        run: Name of the run.
        step: Of the checkpoint.
        checkpoint: Hash of what the checkpoint says of itself: of its weights and of the ids that they are of.
        split: Before which events: "future", "test" or "valid".
        dtype_str: As in the config.
        layers: Layers of the backbone.
        contexts: Context tokens of a user.
        tokens: Context and memory tokens of a user.
        key_shape: Heads and width of a layer's keys.
        value_shape: Of its values.
        version: Of the format.
    """

    run: str
    step: int
    checkpoint: str
    split: str
    dtype_str: str
    layers: int
    contexts: int
    tokens: int
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    version: int = 2

    @property
    def bytes_per_user(self) -> int:
        """Bytes of the keys and values of a user."""
        width = sum(torch.Size(shape).numel() for shape in (self.key_shape, self.value_shape))
        return self.layers * self.tokens * width * (2 if self.dtype_str == "bfloat16" else 4)


def checkpoint_hash(opened: Opened) -> str:
    """Return a hash of the marker of a checkpoint, which holds those of its files and vocabularies."""
    return hashlib.sha256((opened.checkpoint / MARKER).read_bytes()).hexdigest()


def read_record(directory: Path) -> MemoryRecord:
    """Return the record of a directory of memory.

    Raises:
        ValueError: if there is none, or it is damaged.
    """
    path = directory / RECORD
    if not path.is_file():
        raise ValueError(f"{directory}: holds no memory (no {RECORD}); make it with python -m hstu.cli.memory")
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        if set(found) != {field.name for field in fields(MemoryRecord)}:
            raise ValueError("other fields than this version writes")
        shapes = {name: tuple(found[name]) for name in ("key_shape", "value_shape")}
        return MemoryRecord(**(found | shapes))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is damaged ({error}); {_AGAIN}") from None


def write_record(directory: Path, record: MemoryRecord) -> None:
    """Write the record of a new directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with _atomic(directory / RECORD) as partial:
        partial.write_text(json.dumps(asdict(record), indent=1) + "\n")


def require_same(directory: Path, found: MemoryRecord, wanted: MemoryRecord) -> None:
    """Raise ``ValueError`` unless the memory in ``directory`` is that of ``wanted``."""
    for name, value in asdict(wanted).items():
        there = getattr(found, name)
        if name in ("run", "step") or tuple([there]) == tuple([value]):
            continue
        if name == "checkpoint":
            raise ValueError(f"{directory}: is the memory of run {found.run!r}, step {found.step}, not of "
                             f"{wanted.run!r}, step {wanted.step}, as it is now; {_AGAIN}")  # fmt: skip
        raise ValueError(f"{directory}: was made with {name} = {there!r}, not {value!r}; {_AGAIN}")


def part_files(directory: Path) -> list[Path]:
    """Return the files of users, in the order in which they were begun: of a user the last one counts."""
    return sorted(directory.glob("part-*.safetensors"))


def next_part(directory: Path) -> int:
    """Return the number of the next file."""
    files = part_files(directory)
    return int(files[-1].stem.removeprefix("part-")) + 1 if files else 0


def write_part(directory: Path, number: int, users: list[str], tensors: dict[str, Tensor]) -> None:
    """Write a file of ``users``, with a row of each of ``tensors`` for each, and sums; it is there whole or not at all.

    Raises:
        ValueError: if it cannot be written.
    """
    file = directory / f"part-{number:08d}.safetensors"
    tensors = {name: x.contiguous() for name, x in tensors.items()} | {"sums": _row_sums(tensors)}
    about = {"users": json.dumps(users), "index": _index_sum(users, tensors)}
    with _atomic(file) as partial:
        try:
            save_file(tensors, partial, about)
        except SafetensorError as error:  # as that of a full disk
            raise ValueError(f"{file}: cannot be written ({error}); the same command goes on once it can be") from None


def read_index(file: Path, number: int) -> pl.DataFrame:
    """Return the users of a file, and what their memory stands for.

    Raises:
        ValueError: if it is damaged.
    """
    with _opened(file) as part:
        about = part.metadata() or {}
        users, columns = json.loads(about.get("users", "[]")), {name: part.get_tensor(name) for name in _COVERED}
        if about.get("index") != _index_sum(users, columns):
            raise _damaged(file, "users and their events are not those that were written")
    place = {"part": [number] * len(users), "row": list(range(len(users)))}
    return pl.DataFrame({"user": users, **place, **{k: v.numpy() for k, v in columns.items()}}, schema=INDEX)


def open_part(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, of which only what is used is read.

    Raises:
        ValueError: if it is damaged.
    """
    with _opened(file) as part:
        return {name: part.get_tensor(name) for name in (*_ROWS, "sums")}


def take_rows(file: Path, part: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Return some rows of what ``open_part`` opened.

    Raises:
        ValueError: if they are not as they were written.
    """
    found = {name: part[name][rows] for name in _ROWS}
    wrong = (_row_sums(found) != part["sums"][rows]).any(1)
    if wrong.any():
        raise _damaged(file, f"row {int(rows[wrong][0])} has other contents than were written")
    return found


def _row_sums(tensors: dict[str, Tensor]) -> Tensor:
    """Return a hash of each row of ``_ROWS``, [rows, 16] uint8."""
    rows = [tensors[name].reshape(len(tensors[name]), -1).contiguous().view(torch.uint8).numpy() for name in _ROWS]
    sums = [hashlib.sha256(b"".join(map(bytes, row))).digest()[:16] for row in zip(*rows, strict=True)]
    return torch.frombuffer(bytearray(b"".join(sums)), dtype=torch.uint8).view(-1, 16)


def _index_sum(users: list[str], tensors: dict[str, Tensor]) -> str:
    covered = b"".join(tensors[name].contiguous().numpy().tobytes() for name in _COVERED)
    return hashlib.sha256(json.dumps(users).encode() + covered).hexdigest()


def _damaged(file: Path, what: object) -> ValueError:
    return ValueError(f"{file}: is damaged ({what}); remove it, and its users are made again")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as part:
            yield part
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _damaged(file, error) from None


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
