"""What commands share: errors in one line, and a trained run opened from its directory."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hstu.config import ConfigError, DatasetArgs, load_config, task_of
from hstu.interrupt import GRACE, Stopped, StopRequest

if TYPE_CHECKING:
    from hstu.data.column_cache import Check
    from hstu.data.reader import SequenceDataset
    from hstu.parallel import Mesh
    from hstu.training.run_directory import RunDirectory
    from hstu.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
logger = logging.getLogger("hstu.cli")


def run_on_mesh(action: Callable[[Mesh], None], unfinished: str = "") -> int:
    """Join the ranks and run ``action``.

    Args:
        action: What every rank does.
        unfinished: What to say of it when a signal ends it.

    Returns:
        The exit code: 2 for a user's mistake, in one line; 130 and 143 for Ctrl-C and SIGTERM.
    """
    with StopRequest(
        lambda: f"interrupted{unfinished}", grace=0.0
    ) as stop:  # while imports and other ranks are awaited
        from hstu.parallel import Mesh

        with Mesh.create() as mesh:
            stop.grace = GRACE
            return _run(action, mesh, unfinished)


def _run(action: Callable[[Mesh], None], mesh: Mesh, unfinished: str) -> int:
    from hstu.parallel.mistakes import is_first_to_tell, is_told
    from hstu.training.file_errors import describe, is_foreseeable
    from hstu.training.meter import TrainingError
    from hstu.training.run_directory import configure_logging

    try:
        configure_logging(None, is_main=mesh.is_main)
        action(mesh)
    except Stopped as stopped:
        if mesh.is_main and not stopped.told:
            print(f"interrupted{unfinished}", file=sys.stderr)
        return stopped.exit_code
    except (ValueError, TrainingError) as error:
        logger.debug("traceback", exc_info=True)
        if is_first_to_tell(str(error)):  # what all ranks find is printed once
            print(f"error{'' if mesh.is_main else f' on rank {mesh.rank}'}: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if is_told():
            logger.debug("traceback, after another rank's mistake", exc_info=True)
            return 1
        if isinstance(error, OSError) and is_foreseeable(error):
            print(f"error: {describe(error)}", file=sys.stderr)
            return 2
        print(f"rank {mesh.rank} of {mesh.world_size} failed:\n{traceback.format_exc()}", file=sys.stderr, end="")
        return 1
    return 0


def open_trained(run_dir: str | Path, choice: str, bindings: list[str], mesh: Mesh) -> tuple[Trainer, int]:
    """Load a checkpoint into the model that its run directory describes; returns its trainer and its step.

    Args:
        run_dir: A run directory.
        choice: latest, best, a step, or a path.
        bindings: Gin lines that win over the run's config.
        mesh: The ranks.

    Raises:
        ValueError: if there is no run, checkpoint or data set, or they do not fit together.
    """
    from hstu.training.checkpoint_files import find_checkpoint
    from hstu.training.run_directory import RunDirectory
    from hstu.training.trainer import Trainer

    run = RunDirectory(Path(run_dir).resolve())
    task = recorded_task(run)
    if task is None:
        raise ValueError(f"--run_dir = {str(run_dir)!r}: holds no run (no operative.gin); give the directory of one")
    # However it was trained: any number of ranks may ask it, each on samples of its own.
    degrees = [
        "ContextParallelArgs.context_parallel_size = 1",
        "TensorModelParallelArgs.tensor_model_parallel_size = 1",
        "TensorModelParallelArgs.sequence_parallel = False",
    ]
    config = load_config(task, [str(run.path / "operative.gin")], [*bindings, *degrees]).config
    checkpoint = mesh.on_main(lambda: find_checkpoint(run.checkpoints, choice))
    if checkpoint is None:
        raise ValueError(f"--run_dir = {str(run_dir)!r}: has no finished checkpoint {choice!r}; train first")
    dataset = open_dataset(find_dataset(config.dataset, run), mesh)
    require_vocabularies(checkpoint, dataset, mesh, resume=False)
    trainer = Trainer(config, dataset, mesh, run)
    step = trainer.checkpointer.load(checkpoint, optimizer=False).step
    logger.info("%s of %s, step %d", task, run.path, step)
    for note in trainer.notes:
        logger.info("%s", note)
    return trainer, step


def require_vocabularies(checkpoint: Path, dataset: SequenceDataset, mesh: Mesh, *, resume: bool) -> None:
    """Raise ``ValueError`` unless the ids of ``dataset`` are those of ``checkpoint``; before a model is built."""
    from hstu.training.checkpoint_files import read_marker
    from hstu.training.vocabularies import require_same_vocabularies

    here = dataset.vocabularies
    mesh.on_main(lambda: require_same_vocabularies(checkpoint, read_marker(checkpoint), here, resume=resume))


def recorded_task(run: RunDirectory) -> Literal["ranking", "retrieval"] | None:
    """Return the task of the run that is in ``run``; None if there is none."""
    path = run.path / "operative.gin"
    return task_of([str(path)]) if path.is_file() else None


def dataset_record(args: DatasetArgs, path: Path) -> dict[str, str | None]:
    """Return what a run directory keeps of its data set: what was asked for, and where it was."""
    return {"name": args.dataset_name, "given": args.dataset_path, "path": str(path)}


def find_dataset(args: DatasetArgs, run: RunDirectory) -> Path:
    """Return the directory of a preprocessed data set: the one that ``run`` was trained on, or the one named.

    Raises:
        ConfigError: if there is none, with the command that makes it.
    """
    name = args.dataset_name
    places = [Path.cwd() / "tmp_data" / name, ROOT / "tmp_data" / name]
    if args.dataset_path is not None:
        places = [Path(args.dataset_path), Path(args.dataset_path) / name]
    record = _trained_on(run.path / "environment.json")
    if (record.get("name"), record.get("given")) == (name, args.dataset_path):
        places.insert(0, Path(record["path"]))  # the working directory may be another one now
    for place in places:
        if (place / "schema.json").is_file():
            return place.resolve()
    where = " or ".join(dict.fromkeys(str(place) for place in places))
    raise ConfigError(
        "DatasetArgs.dataset_name",
        f"= {name!r}: no schema.json in {where}; make it with preprocessing/preprocessor.py --dataset_name {name}",
    )


def _trained_on(environment: Path) -> dict[str, Any]:
    """Return the ``dataset_record`` of a run; empty if there is none."""
    try:
        record = json.loads(environment.read_bytes()).get("dataset", {}) if environment.is_file() else {}
        if record:
            record["name"], Path(record["path"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{environment}: is damaged ({error}); remove it, and the data set is looked for in tmp_data"
        ) from None
    return record


def open_dataset(path: Path, mesh: Mesh, *, check: Check = "some") -> SequenceDataset:
    """Open a data set on every rank; rank 0 first, which writes its columns once for all, or checks them."""
    from hstu.data.reader import SequenceDataset

    mesh.on_main(lambda: SequenceDataset.open(path, check).num_users)
    return SequenceDataset.open(path, "none")
