"""What other systems need of a run, as plain files in a new directory; ``hstu.cli.export`` says what they hold."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hstu.inference.opened import Opened
from hstu.inference.output import ParquetOutput, vector_column
from hstu.inference.prediction_requests import RequestSpec, make_prediction_requests
from hstu.inference.recommend import item_vectors, user_vectors
from hstu.inference.torch_export import require_compiler, write_torch_export
from hstu.models import RetrievalModel
from hstu.ops.row_sets import PARTS
from hstu.parallel import Mesh
from hstu.parallel.dynamic import DynamicTables
from hstu.training.checkpoint_files import first_line

logger = logging.getLogger(__name__)

Format = Literal["files", "torch-export"]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write.

    Attributes:
        users: Whose vectors, and after which events; see ``RequestSpec``.
        faiss: Also an exact inner-product index of the items.
        since: Of dynamic tables, only what changed after this step, in place of vectors.
        format: "files", or "torch-export": programs, tables and a reader that answers without this package.
        compiled: Also compile the programs ahead of time, for processors of this kind.
    """

    users: RequestSpec = RequestSpec()
    faiss: bool = False
    since: int | None = None
    format: Format = "files"
    compiled: bool = False

    def check(self) -> None:
        """Raise ``ValueError`` for what excludes each other, or is not installed; before a run is opened."""
        if self.format not in get_args(Format):
            raise ValueError(f"--format = {self.format!r}: must be one of {', '.join(get_args(Format))}")
        programs = self.format == "torch-export"
        if programs and (self.faiss or self.since is not None or self.users != RequestSpec()):
            raise ValueError(
                "--format torch-export: has no vectors of users, no index and no changes; leave out --faiss, --since "
                "and what chooses users"
            )
        if self.compiled and not programs:
            raise ValueError("--compile: is for --format torch-export; add that")
        if self.compiled:
            require_compiler()
        if self.faiss:
            require_faiss()


def require_faiss() -> None:
    """Raise ``ValueError`` if FAISS is not installed."""
    if importlib.util.find_spec("faiss") is None:
        raise ValueError('--faiss: FAISS is not installed; pip install "hstu[faiss]" (or faiss-cpu)')


def export(opened: Opened, output: Path, options: ExportOptions) -> None:
    """Write what ``options`` ask for on all ranks; rank 0 writes the files.

    Raises:
        ValueError: for an output that is there, a missing FAISS, and options that do not fit the run.
    """
    mesh, retrieval, about = opened.assembly.mesh, opened.config.retrieval, dict(opened.about)
    options.check()
    if options.faiss and (retrieval is None or retrieval.similarity == "mol"):
        raise ValueError("--faiss: needs a retrieval run that scores by dot product or cosine; leave it out")
    if options.since is not None:
        _check_since(options, opened)
        about["since"] = options.since
    with new_directory(output, mesh) as folder, torch.no_grad():
        if options.format == "torch-export":
            write_torch_export(opened, folder, mesh, compiled=options.compiled)
        elif options.since is not None:
            _write_changes(options.since, opened, mesh, folder, about)
        elif retrieval is not None:
            _write_vectors(options, opened, mesh, folder, about)
        if options.format == "files":
            mesh.on_main(lambda: _write_weights(opened, folder, about))
    logger.info("%s: %s", output, ", ".join(sorted(path.name for path in output.iterdir())))


def _check_since(options: ExportOptions, opened: Opened) -> None:
    """Raise ``ValueError`` if it is not known what changed since the step that ``options`` name."""
    step = opened.step
    assert options.since is not None
    if not opened.config.dynamic_embedding.capacity:
        raise ValueError(
            "--since: needs a run with DynamicEmbeddingArgs.capacity, whose tables know when a row changed"
        )
    if not 0 <= options.since <= step:
        raise ValueError(f"--since = {options.since}: the checkpoint is of step {step}; use a step from 0 to that")
    if options.faiss:
        raise ValueError("--faiss: an index has all items; leave it or --since out")


def _write_changes(since: int, opened: Opened, mesh: Mesh, folder: Path, about: dict[str, Any]) -> None:
    tables = opened.assembly.parallel.tables
    assert isinstance(tables, DynamicTables)
    for table, rows in tables.maps.items():
        held = [rows.held(part, since) for part in range(PARTS)]
        originals = pa.array(opened.dataset.vocabulary(table.name))

        def named(numbers: Tensor, originals: pa.Array = originals) -> dict[str, pa.Array]:
            values = numbers.numpy()  # one beyond the vocabulary is that of unknown values
            known = pa.array(values, mask=(values < 0) | (values >= len(originals)))
            return {"id": originals.take(known), "number": pa.array(values)}

        with ParquetOutput(folder / "tables" / f"{table.name}.parquet", mesh, about) as output:
            for part in held:
                weights, _ = tables.read(table, part.rows)
                output.write(
                    named(part.ids) | {"step": pa.array(part.steps.numpy()), "weights": vector_column(weights)}
                )
        with ParquetOutput(folder / "tables" / f"{table.name}.evicted.parquet", mesh, about) as output:
            for part in held:
                output.write(named(part.evicted))


def _write_vectors(options: ExportOptions, opened: Opened, mesh: Mesh, folder: Path, about: dict[str, Any]) -> None:
    assert isinstance(opened.model, RetrievalModel)
    requests = make_prediction_requests(options.users, opened)
    loader = replace(opened.loader, dataset=requests.dataset, split=requests.split)
    index: list[Any] = []
    with ParquetOutput(folder / "items.parquet", mesh, about) as output:
        for first, vectors in item_vectors(opened.model, loader, mesh):
            output.write({"item": requests.vocabulary.slice(first, len(vectors)), "vector": vector_column(vectors)})
            if options.faiss and mesh.is_main:
                import faiss

                index = index or [faiss.IndexFlatIP(vectors.shape[1])]
                index[0].add(vectors.cpu().numpy())
    if index:
        _write(folder / "items.faiss", lambda path: faiss.write_index(index[0], str(path)))
    with ParquetOutput(folder / "users.parquet", mesh, about) as output:
        for rows, vectors in user_vectors(opened.model, loader, mesh):
            output.write({"user": requests.users.take(pa.array(rows.cpu().numpy())), "vector": vector_column(vectors)})
    if opened.model.args.similarity == "mol":
        logger.info(
            "note: dot products of these vectors are not the scores of a mixture of logits: its similarity module, "
            "whose weights are in dense.safetensors, combines them; predict gives its rankings"
        )


def _write_weights(opened: Opened, folder: Path, about: dict[str, Any]) -> None:
    dense = opened.assembly.parallel.dense.ddp.module.state_dict()
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in dense.items()}
    words = {name: str(value) for name, value in about.items()}
    _write(folder / "dense.safetensors", lambda path: save_file(weights, path, words))
    if (retrieval := opened.config.retrieval) is not None:
        about = about | {"similarity": retrieval.similarity, "filter_seen": retrieval.filter_seen}
    _write(folder / "export.json", lambda path: path.write_text(json.dumps(about, indent=1) + "\n"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write``; both libraries have errors of their own for a system that refuses a file."""
    try:
        write(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({first_line(error)}); choose another --output") from error


@contextmanager
def new_directory(path: Path, mesh: Mesh) -> Iterator[Path]:
    """Yield a directory beside ``path`` that becomes it at the end; nothing is left of it after a failure."""
    path = path.absolute()
    partial = path.with_name(f".{path.name}.partial")

    def prepare() -> None:
        if path.exists():
            raise ValueError(f"--output = {str(path)!r}: is there already; remove it or choose another")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"--output = {str(path)!r}: cannot be written ({error.strerror}); choose another"
            ) from None

    mesh.on_main(prepare)
    try:
        yield partial
        mesh.on_main(lambda: os.replace(partial, path))
    except BaseException:
        if mesh.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
