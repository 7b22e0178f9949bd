"""The bytes of a file: decompressed, in UTF-8, in blocks of whole rows, as often as they are asked for."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import lzma
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa

from hstu.data.files.formats import shorten

CHUNK = 1 << 24  # bytes; blocks of less than 32 MiB are given back to the allocator, not to the system
LONGEST_ROW = 1 << 26  # bytes
_SAMPLE = 1 << 12  # bytes that tell an encoding
_MAGIC = {
    b"\x1f\x8b": "gzip (end its name in .gz)",
    b"\x28\xb5\x2f\xfd": "zstd (end its name in .zst)",
    b"BZh": "bzip2 (end its name in .bz2)",
    b"\xfd7zXZ": "xz (end its name in .xz)",
    b"PK\x03\x04": "a zip archive (unpack it)",
    b"PAR1": "parquet (end its name in .parquet)",
}
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

T = TypeVar("T")


def find_parts(path: str | Path) -> list[Path]:
    """The files that a path stands for: itself, those of a directory, or those that match a pattern; in order.

    Files and directories whose names begin with a dot or an underscore are no parts.

    Raises:
        ValueError: If there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if path.is_dir():
        found, root = [part for part in path.rglob("*") if part.is_file()], path
        found = [part for part in found if not any(name[0] in "._" for name in part.relative_to(root).parts)]
    elif glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    else:
        reason = "is no file" if path.exists() else "cannot be read (No such file or directory)"
        raise ValueError(f"{path}: {reason}; give the path of a file, a directory of files, or a pattern")
    if not found:
        raise ValueError(f"{path}: stands for no file; give a directory or a pattern of files")
    return sorted(found)


@contextmanager
def readable(place: object) -> Iterator[None]:
    """Turn what reading a damaged file raises into a ValueError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{place}: cannot be read ({reason}); give the path of a whole, readable file") from error


@dataclass
class Source:
    """A text file.

    Args:
        path: The file.
        encoding: Its encoding; None: UTF-8, or UTF-16 where the first bytes show it.
        share: How much of it the last reading has read, in [0, 1].
    """

    path: Path
    encoding: str | None = None
    share: float = field(default=0.0, init=False)

    def first_line(self) -> str:
        """The first line, without its end; of a long one the beginning."""
        with readable(self.path):
            chunk = next(self._utf8(_SAMPLE), b"")
        lines = chunk.decode("utf-8", "replace").lstrip("\r\n").splitlines()
        return lines[0] if lines else ""

    def chunks(self) -> Iterator[bytes]:
        """The content in UTF-8, without a byte order mark, each piece read while the one before is in use."""
        with readable(self.path):
            yield from ahead(self._utf8(CHUNK))

    def rows(self, quoted: bool) -> Iterator[tuple[bytes, int]]:
        """Blocks of whole rows, each ended by a line feed, and the number of the first line of each.

        Args:
            quoted: Whether a line feed between double quotes ends no row.

        Raises:
            ValueError: For an unreadable file, a row of more than 64 MiB, or a quote that is never closed.
        """
        rest, line = b"", 1
        for chunk in self.chunks():
            content = rest + chunk
            end = _end_of_rows(content, quoted)
            if end == 0 and len(content) > LONGEST_ROW:
                self._refuse_endless(content, line, quoted)
            if end:
                yield content[:end], line
                line += content.count(b"\n", 0, end)
            rest = content[end:]
        if rest:
            rest += b"\n"
            if _end_of_rows(rest, quoted) != len(rest):
                self._refuse_endless(rest, line, quoted)
            yield rest, line

    def _refuse_endless(self, content: bytes, line: int, quoted: bool) -> None:
        if quoted and b'"' in content:
            odd = next(row for row in content.split(b"\n") if row.count(b'"') % 2)
            line += content.count(b"\n", 0, content.index(odd))
            raise ValueError(
                f"{self.path}: line {line}: the first with an odd number of double quotes, one of them never closed: "
                f"{shorten(odd.decode('utf-8', 'replace'))}; close it, or read quotes as characters with --quoting none"
            )
        raise ValueError(f"{self.path}: line {line} has more than {len(content):,} bytes; end rows with line feeds")

    def _utf8(self, size: int) -> Iterator[bytes]:
        size_of_all = max(1, self.path.stat().st_size)
        with self.path.open("rb") as raw:
            stream = _decompressed(self.path, raw)
            first = stream.read(size)
            encoding = (self.encoding or _encoding(first[:_SAMPLE], self.path)).lower().replace("_", "-")
            plain = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
            decoder = codecs.getincrementaldecoder(encoding)()
            self.share, chunk, start = 0.0, first.removeprefix(codecs.BOM_UTF8) if plain else first, True
            while chunk or start:
                start, following = False, stream.read(size)
                try:
                    yield chunk if plain else decoder.decode(chunk, not following).removeprefix("\ufeff").encode()
                except UnicodeError as error:
                    reason = str(error).splitlines()[0][:200]
                    raise ValueError(f"{self.path}: cannot be read ({reason}); name its --encoding") from None
                self.share = min(1.0, raw.tell() / size_of_all)
                chunk = following


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    if suffix in (".bz2", ".xz"):
        return bz2.BZ2File(raw) if suffix == ".bz2" else lzma.LZMAFile(raw)
    start = raw.read(8)
    for magic, what in _MAGIC.items():
        if start.startswith(magic):
            raise ValueError(f"{path}: is {what}")
    raw.seek(0)
    return raw


def _encoding(sample: bytes, path: Path) -> str:
    for mark, name in _BYTE_ORDER_MARKS.items():
        if sample.startswith(mark):
            return name
    # Text in UTF-8 has no zero bytes; in UTF-16 most characters of a header have one, on one side.
    even, odd, half = sample[0::2].count(0), sample[1::2].count(0), len(sample) // 2
    if max(even, odd) > 0.4 * half and min(even, odd) < 0.1 * half:
        return "utf-16-be" if even > odd else "utf-16-le"
    if sample.count(0) > 0.1 * len(sample) > 0:
        raise ValueError(f"{path}: is no text; name its format with --format or its encoding with --encoding")
    return "utf-8"


def _end_of_rows(content: bytes, quoted: bool) -> int:
    """Where the last whole row ends."""
    end = content.rfind(b"\n") + 1
    if not quoted or b'"' not in content:
        return end
    odd = content.count(b'"', 0, end) % 2
    while end and odd:
        before = content.rfind(b"\n", 0, end - 1) + 1
        odd ^= content.count(b'"', before, end) % 2
        end = before
    return end


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
