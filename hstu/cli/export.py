"""`python -m hstu.cli.export`: what other systems need of a run, as plain files in a new directory.

items.parquet (item, vector), users.parquet (user, vector after the whole history), both in original ids: the dot
product of two vectors is the score that evaluation ranks by (with a mixture of logits, the vectors are what the
similarity module combines: its vectors and its gate, side by side). dense.safetensors: every weight but the sharded
tables. items.faiss, with --faiss: an exact inner-product index, whose position i is row i of items.parquet.
export.json: what all this is. A ranking run has no vectors, only dense weights.

With --since STEP, of a run with dynamic tables: in place of vectors tables/<table>.parquet (original id, its number,
the last step in which it was trained, the weights of its row) for the rows that were trained after STEP, and
tables/<table>.evicted.parquet for the ids that lost their rows after STEP and have none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hstu.cli.command import open_trained, run_on_mesh
from hstu.cli.flags import Parser, underscore_flags
from hstu.cli.predict import add_run_flags, add_user_flags

if TYPE_CHECKING:
    from torch import Tensor

    from hstu.parallel import Mesh
    from hstu.training.trainer import Trainer

logger = logging.getLogger("hstu.cli")


def main(argv: list[str] | None = None) -> int:
    """Write the files; 2 for a user's mistake."""
    parser = Parser(
        prog="python -m hstu.cli.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist")
    parser.add_argument("--faiss", action="store_true", help="also write items.faiss; needs faiss-cpu")
    parser.add_argument("--since", type=int, metavar="STEP", help="only what changed after STEP; see above")
    add_user_flags(parser)
    args = parser.parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: export(args, mesh), f"; {args.output} is not written")


def export(args: argparse.Namespace, mesh: Mesh) -> None:
    """Write what ``args`` ask for on all ranks; rank 0 writes the files.

    Raises:
        ValueError: for an output that is there, a missing FAISS, and flags that do not fit the run.
    """
    import torch

    if args.faiss and importlib.util.find_spec("faiss") is None:
        raise ValueError('--faiss: FAISS is not installed; pip install "hstu[faiss]" (or faiss-cpu)')
    trainer, step = open_trained(args.run_dir, args.checkpoint, args.gin_bindings, mesh)
    retrieval = trainer.config.retrieval
    if args.faiss and (retrieval is None or retrieval.similarity == "mol"):
        raise ValueError("--faiss: needs a retrieval run that scores by dot product or cosine; leave it out")
    about = {"run": Path(args.run_dir).name, "task": trainer.config.task, "step": step}
    if args.since is not None:
        _check_since(args, trainer, step)
        about["since"] = args.since
    with _new_directory(args.output, mesh) as folder, torch.no_grad():
        if args.since is not None:
            _write_changes(args.since, trainer, mesh, folder, about)
        elif retrieval is not None:
            _write_vectors(args, trainer, mesh, folder, about)
        mesh.on_main(lambda: _write_weights(trainer, folder, about))
    logger.info("%s: %s", args.output, ", ".join(sorted(path.name for path in args.output.iterdir())))


def _check_since(args: argparse.Namespace, trainer: Trainer, step: int) -> None:
    """Raise ``ValueError`` if it is not known what changed since the step that ``args`` name."""
    if not trainer.config.dynamic_embedding.capacity:
        raise ValueError(
            "--since: needs a run with DynamicEmbeddingArgs.capacity, whose tables know when a row changed"
        )
    if not 0 <= args.since <= step:
        raise ValueError(f"--since = {args.since}: the checkpoint is of step {step}; use a step from 0 to that")
    if args.faiss:
        raise ValueError("--faiss: an index has all items; leave it or --since out")


def _write_changes(since: int, trainer: Trainer, mesh: Mesh, folder: Path, about: dict[str, Any]) -> None:
    import pyarrow as pa

    from hstu.inference.output import ParquetOutput, vector_column
    from hstu.parallel.dynamic import PARTS, DynamicTables

    tables = trainer.parallel.tables
    assert isinstance(tables, DynamicTables)
    for table, rows in tables.maps.items():
        held = [rows.held(part, since) for part in range(PARTS)]
        originals = pa.array(trainer.dataset.vocabulary(table.name))

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


def _write_vectors(args: argparse.Namespace, trainer: Trainer, mesh: Mesh, folder: Path, about: dict[str, Any]) -> None:
    import pyarrow as pa

    from hstu.inference import item_vectors, user_vectors
    from hstu.inference.output import ParquetOutput, vector_column
    from hstu.inference.prediction_requests import make_prediction_requests
    from hstu.models import RetrievalModel

    assert isinstance(trainer.model, RetrievalModel)
    requests = make_prediction_requests(argparse.Namespace(**vars(args), split="future", candidates=None), trainer)
    loader = replace(trainer.loaders["test"], dataset=requests.dataset, split=requests.split)
    index: list[Any] = []
    with ParquetOutput(folder / "items.parquet", mesh, about) as output:
        for first, vectors in item_vectors(trainer.model, loader, mesh):
            output.write({"item": requests.vocabulary.slice(first, len(vectors)), "vector": vector_column(vectors)})
            if args.faiss and mesh.is_main:
                import faiss

                index = index or [faiss.IndexFlatIP(vectors.shape[1])]
                index[0].add(vectors.cpu().numpy())
    if index:
        faiss.write_index(index[0], str(folder / "items.faiss"))
    with ParquetOutput(folder / "users.parquet", mesh, about) as output:
        for rows, vectors in user_vectors(trainer.model, loader, mesh):
            output.write({"user": requests.users.take(pa.array(rows.cpu().numpy())), "vector": vector_column(vectors)})
    if trainer.model.args.similarity == "mol":
        logger.info(
            "note: dot products of these vectors are not the scores of a mixture of logits: its similarity module, "
            "whose weights are in dense.safetensors, combines them; predict gives its rankings"
        )


def _write_weights(trainer: Trainer, folder: Path, about: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    dense = trainer.parallel.dense.ddp.module.state_dict()
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in dense.items()}
    save_file(weights, folder / "dense.safetensors", {name: str(value) for name, value in about.items()})
    if (retrieval := trainer.config.retrieval) is not None:
        about = about | {"similarity": retrieval.similarity, "filter_seen": retrieval.filter_seen}
    (folder / "export.json").write_text(json.dumps(about, indent=1) + "\n")


@contextmanager
def _new_directory(path: Path, mesh: Mesh) -> Iterator[Path]:
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


if __name__ == "__main__":
    sys.exit(main())
