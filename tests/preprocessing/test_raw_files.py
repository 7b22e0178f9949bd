"""Downloads, from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hstu.cli.preprocess import DATASETS
from hstu.preprocessing.raw_files import Archive, obtain


def read(archive: Archive, target: Path) -> bytes:
    found = obtain(("x.txt",), frozenset(), archive, [target], target)
    return b"".join(file.stream.read() for file in found.open())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["md5", "sha256"])
def archive(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Archive]:
    """A zip with a file x.txt, published by a local server."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("toy/x.txt", "content")
    site = tmp_path / "site"
    site.mkdir()
    (site / "toy.zip").write_bytes(content.getvalue())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/toy.zip"
    kind, digest = request.param, hashlib.new(request.param, content.getvalue()).hexdigest()
    yield Archive(file_name="toy.zip", url=url, checksum=f"{kind}:{digest}", root="toy")
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_absent_file_is_downloaded_once(archive: Archive, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    target = tmp_path / "raw" / "toy"
    assert read(archive, target) == b"content"
    assert "100%" in capfd.readouterr().err  # the progress bar
    (tmp_path / "site" / "toy.zip").unlink()
    assert read(archive, target) == b"content"


def test_a_wrong_checksum_is_refused_and_nothing_stays(archive: Archive, tmp_path: Path) -> None:
    other = replace(archive, checksum=archive.checksum.partition(":")[0] + ":" + "0" * 32)
    target = tmp_path / "raw" / "toy"
    with pytest.raises(ValueError, match="cannot be downloaded .*hash.* does not match"):
        read(other, target)
    assert not target.exists()


def test_all_published_files_come_encrypted_and_with_a_checksum() -> None:
    for name, known in DATASETS.items():
        kind, _, digest = known.archive.checksum.partition(":")
        assert known.archive.url.startswith("https://"), name
        assert len(digest) == {"md5": 32, "sha256": 64}[kind] and int(digest, 16), name


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/toy.zip", None])
def test_without_the_file_the_error_says_what_to_put_where(archive: Archive, tmp_path: Path, url: str | None) -> None:
    url = url or archive.url.replace("toy.zip", "gone.zip")  # nobody listens, or 404
    target = tmp_path / "raw" / "toy"
    with pytest.raises(ValueError) as error:
        read(replace(archive, url=url), target)
    assert f"put x.txt or toy.zip into {target}, or name its directory with --raw_dir" in str(error.value)
    assert "\n" not in str(error.value) and not target.exists()
