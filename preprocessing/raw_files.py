"""Find the raw files of a published data set, or download them."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pooch


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A published zip file.

    Args:
        name: Name of the data set; the zip is ``<name>.zip``.
        url: Where it is published.
        md5: The published checksum.
    """

    name: str
    url: str
    md5: str

    @property
    def file_name(self) -> str:
        """Name of the zip file."""
        return f"{self.name}.zip"


@dataclass(frozen=True)
class RawFile:
    """A raw file, on its own or as a member of a zip.

    Args:
        path: The file, or the zip.
        member: Name within the zip, None for a file on its own.
    """

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        """Name of the file, without its place."""
        return Path(self.member or self.path).name

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}/{self.member}"

    def read(self) -> bytes:
        """Content of the file; nothing is unpacked to disk.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            if self.member is None:
                return self.path.read_bytes()
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.member)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{self}: cannot be read ({error}); replace it by the published file") from error


def find(name: str, archive: Archive, directories: Iterable[Path]) -> RawFile | None:
    """Look for the file ``name`` in the directories, in order: plain, one folder deeper, or in the zip."""
    for directory in directories:
        for path in (directory / name, directory / archive.name / name):
            if path.is_file():
                return RawFile(path)
        zip_path = directory / archive.file_name
        if zip_path.is_file() and (member := _member(zip_path, name)):
            return RawFile(zip_path, member)
    return None


def obtain(name: str, archive: Archive, directories: list[Path], download_to: Path) -> RawFile:
    """Find the file ``name``, else download the archive into ``download_to``, checked by its md5.

    Raises:
        ValueError: If there is neither the file nor a way to download it; says which file to put where.
    """
    if found := find(name, archive, directories):
        return found
    created = not download_to.exists()
    try:
        path = pooch.retrieve(
            archive.url, f"md5:{archive.md5}", fname=archive.file_name, path=download_to, progressbar=True
        )
    except Exception as error:  # whatever the network, the server or the disk does, the way out is the same
        if created:
            with suppress(OSError):
                download_to.rmdir()
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        raise ValueError(
            f"{archive.name}: {name} is not there and {archive.url} cannot be downloaded ({cause}); "
            f"put {name} or {archive.file_name} into {download_to}, or name its directory with --raw_dir"
        ) from error
    found = find(name, archive, [Path(path).parent])
    if found is None:
        raise ValueError(f"{path}: holds no {name}; put {name} into {download_to}")
    return found


def sha256(content: bytes) -> str:
    """Checksum for the schema."""
    return hashlib.sha256(content).hexdigest()


def _member(zip_path: Path, name: str) -> str | None:
    try:
        with zipfile.ZipFile(zip_path) as archive:
            return next((member for member in archive.namelist() if Path(member).name == name), None)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{zip_path}: cannot be read as a zip ({error}); replace or remove it") from error
