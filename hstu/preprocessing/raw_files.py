"""Find the raw files of a published data set, or download them; nothing is ever unpacked to disk."""

from __future__ import annotations

import hashlib
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pooch


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What a published data set is downloaded as.

    Args:
        file_name: Name of the zip or tar archive, or of the only file.
        url: Where it is published.
        checksum: Its known one, as "md5:..." or "sha256:...".
        root: Directory of the raw files within the archive.
    """

    file_name: str
    url: str
    checksum: str
    root: str = ""


@dataclass(frozen=True)
class OpenFile:
    """A raw file that is being read.

    Args:
        name: Its name without its place.
        place: What messages call it.
        stream: Its content.
        share: How much of all raw files has been read, in [0, 1].
    """

    name: str
    place: str
    stream: BinaryIO
    share: Callable[[], float]


@dataclass(frozen=True)
class RawFiles:
    """Where the raw files of a data set are: in a directory, or in an archive.

    Args:
        path: The directory or the archive.
        names: The files, in the order to read them in.
        optional: Those that may be missing.
    """

    path: Path
    names: tuple[str, ...]
    optional: frozenset[str] = frozenset()

    def __str__(self) -> str:
        required = [name for name in self.names if name not in self.optional]
        return str(self.path / required[0]) if self.path.is_dir() else str(self.path)

    def open(self) -> Iterator[OpenFile]:
        """The files, one after the other; those of a tar archive in its order.

        Raises:
            ValueError: If the archive is damaged or a file is missing.
        """
        if self.path.is_dir():
            return self._open_plain()
        with readable(self.path):
            return self._open_zip() if zipfile.is_zipfile(self.path) else self._open_tar()

    def _open_plain(self) -> Iterator[OpenFile]:
        paths = [path for name in self.names if (path := self.path / name).is_file()]
        total, before = sum(path.stat().st_size for path in paths), 0
        for path in paths:
            with readable(path), path.open("rb") as stream:
                yield OpenFile(path.name, str(path), stream, _share(stream, before, total))
            before += path.stat().st_size

    def _open_zip(self) -> Iterator[OpenFile]:
        with readable(self.path), zipfile.ZipFile(self.path) as archive:
            known = {PurePosixPath(info.filename).name: info for info in reversed(archive.infolist())}
            self._require(known.keys())
            members = [known[name] for name in self.names if name in known]
            total, before = sum(info.file_size for info in members), 0
            for info in members:
                with archive.open(info) as stream:
                    place = f"{self.path}/{info.filename}"
                    yield OpenFile(PurePosixPath(info.filename).name, place, stream, _share(stream, before, total))  # type: ignore[arg-type]
                before += info.file_size

    def _open_tar(self) -> Iterator[OpenFile]:
        size, found = self.path.stat().st_size, set()
        with readable(self.path), self.path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isreg() and name in self.names and name not in found:
                    found.add(name)
                    stream = archive.extractfile(member)
                    yield OpenFile(name, f"{self.path}/{member.name}", stream, _share(raw, 0, size))  # type: ignore[arg-type]
                if len(found) == len(self.names):
                    return
        self._require(found)

    def _require(self, present: object) -> None:
        missing = [name for name in self.names if name not in self.optional and name not in present]  # type: ignore[operator]
        if missing:
            raise ValueError(f"{self.path}: holds no {missing[0]}; replace it by the published archive")


def _share(stream: BinaryIO, before: int, total: int) -> Callable[[], float]:
    return lambda: (before + stream.tell()) / max(1, total)


@contextmanager
def readable(place: object) -> Iterator[None]:
    """Turn whatever a damaged file raises when it is read into a ValueError that names it."""
    try:
        yield
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        tarfile.TarError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{place}: cannot be read ({error}); replace it by the published file") from error


def find(
    names: tuple[str, ...], optional: frozenset[str], archive: Archive, directories: list[Path]
) -> RawFiles | None:
    """Look for the files in the directories, in order: plain, where unpacking puts them, or in the archive."""
    required = [name for name in names if name not in optional]
    for directory in directories:
        for place in (directory, directory / archive.root):
            if all((place / name).is_file() for name in required):
                return RawFiles(place, names, optional)
        if (directory / archive.file_name).is_file():
            return RawFiles(directory / archive.file_name, names, optional)
    return None


def obtain(
    names: tuple[str, ...],
    optional: frozenset[str],
    archive: Archive,
    directories: list[Path],
    download_to: Path,
    *,
    check: bool = True,
) -> RawFiles:
    """Find the raw files, else download the archive into ``download_to``, checked by its checksum.

    Args:
        names: Files, in the order to read them in.
        optional: Those that may be missing.
        archive: What they are published as.
        directories: Where to look, in order.
        download_to: Where the archive goes.
        check: Whether to compare the checksum of an archive that is there already.

    Raises:
        ValueError: If there is neither the files nor a way to download them; says which file to put where.
    """
    if found := find(names, optional, archive, directories):
        if check and found.path.is_file():
            _check(found.path, archive.checksum)
        return found
    created = not download_to.exists()
    try:
        pooch.retrieve(archive.url, archive.checksum, fname=archive.file_name, path=download_to, progressbar=True)
    except Exception as error:  # whatever the network, the server or the disk does, the way out is the same
        if created:
            with suppress(OSError):
                download_to.rmdir()
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        wanted = " and ".join(name for name in names if name not in optional)
        choice = wanted if archive.file_name == wanted else f"{wanted} or {archive.file_name}"
        raise ValueError(
            f"{wanted} is not there and {archive.url} cannot be downloaded ({cause}); "
            f"put {choice} into {download_to}, or name its directory with --raw_dir"
        ) from error
    found = find(names, optional, archive, [download_to])
    assert found is not None  # it was downloaded to where this looks
    return found


def _check(path: Path, checksum: str) -> None:
    kind, _, published = checksum.partition(":")
    with readable(path), path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != published:
        raise ValueError(
            f"{path}: its {kind} is {found}, the published file has {published}; remove it to download it again, "
            "or use it as it is with --check_counts=false"
        )
