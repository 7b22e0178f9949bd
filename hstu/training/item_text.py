"""Vectors of a frozen language model: each text is read once by one rank, and kept on disk beside the data set."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu.data.checksums import block_sums, find_damage
from hstu.models.item_text import ItemText
from hstu.parallel import Mesh
from hstu.training.watchdog import beat

logger = logging.getLogger(__name__)

_PREFIX = ".text-"  # of what is kept; behind it what tells its contents from others
_ROWS = 4096  # texts read by a rank in one go; the same whatever the ranks, so that vectors are
_MOMENTS = 1 << 16  # rows summed at once


def make_vectors(text: ItemText, folder: Path, mesh: Mesh) -> None:
    """Give ``text`` the vectors of its frozen model: those in ``folder``, or new ones, which are kept there.

    Args:
        text: The texts, read.
        folder: The data set, on a disk that all ranks share.
        mesh: The ranks.
    """
    content = mesh.on_main(lambda: text.content(of_run=False))
    path = folder / f"{_PREFIX}{content}.npy"
    problem = mesh.on_main(lambda: _problem(path, text))
    if problem is not None:
        if path.is_file():
            logger.warning("%s %s; it is made again", path, problem)
        logger.info("reading %s texts of items, once", f"{text.num_texts:,}")
        vectors = _computed(text, path, mesh)
    else:
        vectors = np.load(path, mmap_mode="c")  # which a tensor may share
    text.give(torch.from_numpy(np.asarray(vectors)), *mesh.on_main(lambda: _moments(vectors)))


def _problem(path: Path, text: ItemText) -> str | None:
    """Return why the file cannot be used; None if it can."""
    sums = _sums(path)
    if not sums.is_file():
        return "has no sums beside it"
    try:
        damage = find_damage(path, json.loads(sums.read_bytes()), whole=False)
        if damage is None and np.load(path, mmap_mode="r").shape[0] != text.num_texts:
            return "is of other texts"
    except (ValueError, KeyError, OSError) as error:
        return f"is damaged ({error})"
    return damage


def _sums(path: Path) -> Path:
    return path.with_suffix(".json")


def _computed(text: ItemText, path: Path, mesh: Mesh) -> np.ndarray:
    """Compute all vectors, a share on each rank, and keep them in ``path`` if it can be written; returns them."""
    shape = text.num_texts, text.frozen[0].width
    text.frozen[0].to(mesh.device)
    partial: Path | str = mesh.on_main(lambda: _begin(path, shape))
    if isinstance(partial, str):
        logger.warning("%s cannot be written (%s): texts are read again for each run", path.parent, partial)
        whole = np.zeros(shape, np.float32)
        _together(mesh, lambda: _fill(text, mesh, whole))
        return mesh.world.sum(torch.from_numpy(whole)).numpy()
    try:
        _together(mesh, lambda: _fill(text, mesh, np.lib.format.open_memmap(partial, "r+")))
        mesh.on_main(lambda: _publish(partial, path))
    finally:
        if mesh.is_main:
            partial.unlink(missing_ok=True)
    return np.load(path, mmap_mode="c")  # which a tensor may share


def _begin(path: Path, shape: tuple[int, int]) -> Path | str:
    """Return a new file for the vectors, or why there can be none."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".partial{_PREFIX}", suffix=".npy", dir=path.parent)
        os.close(handle)
        np.lib.format.open_memmap(name, "w+", np.float32, shape=shape)
    except OSError as error:
        return str(error.strerror)
    return Path(name)


def _together(mesh: Mesh, work: Callable[[], None]) -> None:
    """Run ``work`` on every rank; if one fails, all do."""
    failure: Exception | None = None
    try:
        work()
    except Exception as error:
        failure = error
    if mesh.world.any(failure is not None):
        raise failure or RuntimeError("another rank could not read the texts of items")


def _fill(text: ItemText, mesh: Mesh, vectors: np.ndarray) -> None:
    """Write the rows of this rank's share of the texts."""
    for number, start in enumerate(range(0, text.num_texts, _ROWS)):
        if number % mesh.world_size == mesh.rank:
            texts = torch.arange(start, min(start + _ROWS, text.num_texts))
            with torch.no_grad():
                vectors[start : start + _ROWS] = text.embed(texts).float().cpu().numpy()
            beat()
    if isinstance(vectors, np.memmap):
        vectors.flush()


def _publish(partial: Path, path: Path) -> None:
    """Give the file its name, once its sums are beside it."""
    sums = _sums(path)
    sums.write_text(json.dumps(block_sums(partial)))
    for file in (partial, sums):
        file.chmod(0o644)
    os.replace(partial, path)


def _moments(vectors: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the mean of the vectors, [H], and how far from it their numbers are, as a root of the mean square."""
    total, squares = np.zeros(vectors.shape[1]), 0.0
    for start in range(0, len(vectors), _MOMENTS):
        total += vectors[start : start + _MOMENTS].sum(0, dtype=np.float64)
    mean = total / len(vectors)
    for start in range(0, len(vectors), _MOMENTS):
        squares += float(np.square(vectors[start : start + _MOMENTS] - mean).sum())
    deviation = (squares / vectors.size) ** 0.5
    return torch.from_numpy(mean), torch.tensor(deviation if deviation > 0 else 1.0)


def starting_rows(text: ItemText, width: int, std: float, mesh: Mesh) -> Tensor:
    """Return rows of items made of the vectors of their texts, [items, at most width] float32.

    They are the first principal components of these, scaled as random rows are.

    Args:
        text: With its vectors.
        width: Of the rows.
        std: Of the numbers in random rows.
        mesh: The ranks.
    """
    assert text.vectors is not None
    parts, mean = text.vectors.split(_MOMENTS), text.mean.double().cpu()

    def principal() -> Tensor:
        scatter = torch.zeros(mean.numel(), mean.numel(), dtype=torch.float64)
        for part in parts:
            centred = part.double() - mean
            scatter += centred.T @ centred
        return torch.linalg.eigh(scatter).eigenvectors.flip(1)[:, :width]

    axes: Tensor = mesh.on_main(principal)  # whose signs are free
    rows = torch.cat([((part.double() - mean) @ axes).float() for part in parts])
    rows = rows[text.numbers.cpu()]
    return rows * (std / rows.std().clamp(min=1e-12))
