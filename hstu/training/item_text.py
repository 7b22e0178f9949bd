"""What is kept of language models: vectors of frozen ones beside the data set; in a run all but the weights."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu.config import Config
from hstu.data.checksums import block_sums, find_damage
from hstu.layers.text_model import TOKENIZERS
from hstu.models.item_text import KEPT, ItemText
from hstu.parallel import Mesh
from hstu.training.watchdog import beat

logger = logging.getLogger(__name__)

_PREFIX = ".text-"  # of what is kept; behind it what tells its contents from others
_ROWS = 4096  # texts read by a rank in one go; the same whatever the ranks, so that vectors are
_MOMENTS = 1 << 16  # rows summed at once
_FOLDER = "text_model"  # of a run
_FILES = (*TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def make_vectors(text: ItemText, folder: Path, mesh: Mesh) -> None:
    """Give ``text`` the vectors of its frozen model: those in ``folder``, or new ones, which are kept there.

    Args:
        text: The texts, read.
        folder: The data set, on a disk that all ranks share.
        mesh: The ranks.

    Raises:
        ConfigError: if the model is gone, and there are no vectors of these texts.
    """
    content = mesh.on_main(lambda: text.content(of_run=False))
    path = folder / f"{_PREFIX}{content}.npy"
    problem = mesh.on_main(lambda: _problem(path, text))
    if problem is not None and text.kept is not None:
        there = f"{path} {problem}" if path.is_file() else f"there are no vectors of these texts ({path})"
        raise replace(text.args, model=text.kept["model"]).error("model", f"is gone, and {there}; put it back")
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


def keep_text_model(text: ItemText, content: str, run: Path) -> None:
    """Keep in the directory of a run what it needs of its language model beside weights: configuration and tokenizer.

    Args:
        text: The texts.
        content: Which model it is.
        run: The directory.

    Raises:
        ValueError: if it cannot be written, or the model is one of which a run has kept this.
    """
    if text.kept is not None:
        raise text.args.error("model", "a run keeps this without weights; name the directory of the model, which was "
                              f"{text.kept['model']}")  # fmt: skip
    assert text.args.model is not None
    source, folder, partial = Path(text.args.model), run / _FOLDER, run / f".{_FOLDER}.partial"
    config = source if source.is_file() else source / "config.json"
    record = json.dumps({"content": content, "model": str(source.resolve())})
    if (folder / KEPT).is_file() and (folder / KEPT).read_text() == record:
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        shutil.copyfile(config, partial / "config.json")
        for file in (config.parent / name for name in _FILES):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        (partial / KEPT).write_text(record)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def with_kept_model(config: Config, run: Path) -> Config:
    """Return ``config`` for who only asks a run: with what it keeps of its language model, where that is gone."""
    args, folder = config.item_text, run / _FOLDER
    if not args.is_vector or Path(args.model or "").exists() or not (folder / KEPT).is_file():
        return config
    logger.info("ItemTextArgs.model = %r is gone: %s", args.model,
                "vectors of its texts are kept" if args.freeze else "its weights are in the checkpoint")  # fmt: skip
    return replace(config, item_text=replace(args, model=str(folder)))


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
