"""Which data set a run directory belongs to: its record, where it is now, and whether its ids are those of the run."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any, Literal

from hstu.config import ConfigError, DatasetArgs, LoadedConfig, read_settings, task_of
from hstu.config.sizing import DataSize
from hstu.data.column_cache import Check
from hstu.data.reader import SequenceDataset
from hstu.data.schema import Schema
from hstu.parallel import Mesh
from hstu.training.checkpoint_files import read_marker
from hstu.training.init_from import find_source
from hstu.training.run_directory import RunDirectory
from hstu.training.vocabularies import require_same_vocabularies

ROOT = Path(__file__).resolve().parents[2]


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
    record = trained_on(run)
    if (record.get("name"), record.get("given")) == (name, args.dataset_path):
        places.insert(0, Path(record["path"]))  # the working directory may be another one now
    if args.dataset_path is None:
        places.insert(0, own_data(run.whole, name))  # wherever the run was moved to
    for place in places:
        if (place / "schema.json").is_file():
            return place.resolve()
    where = " or ".join(dict.fromkeys(str(place) for place in places[args.dataset_path is None :]))
    raise ConfigError(
        "DatasetArgs.dataset_name",
        f"= {name!r}: no schema.json in {where}; make it with preprocessing/preprocessor.py --dataset_name {name}",
    )


def sized(loaded: LoadedConfig, path: Path, world: int, run: Path | None = None) -> LoadedConfig:
    """Return a config with the values that the size of the data set at ``path`` decides, if it asks for them.

    Args:
        loaded: The config.
        path: The data set.
        world: Processes.
        run: The run that trains; it keeps the shape of weights that it has begun with, or that it is to start from.
    """
    retrieval = loaded.config.retrieval
    if retrieval is None or not retrieval.sized_by_data:
        return loaded
    schema = Schema.load(path)
    counts = {name: int(schema.counts.get(name, 0)) for name in ("users", "items", "events")}
    start = {} if run is None else _settings_at_start(run, loaded.config.trainer.init_from)
    shared = loaded.config.context_parallel.context_parallel_size
    shared *= loaded.config.tensor_model_parallel.tensor_model_parallel_size
    size = DataSize(**counts, has_times=schema.time is not None, ranks=max(world // shared, 1))
    return loaded.sized_by(size, start)


def _settings_at_start(run: Path, init_from: str | None) -> dict[str, Any]:
    """Return ``Class.field`` -> value of a run that has begun, or else of the one it starts from."""
    settings = run / "operative.gin"
    if not settings.is_file() and init_from is not None:
        settings = find_source(init_from, run).parents[1] / "operative.gin"
    if not settings.is_file():  # a checkpoint that lies in no run
        return {}
    return {key: ast.literal_eval(text) for key, text in read_settings(settings).items()}


def own_data(run: Path, name: str) -> Path:
    """Return where a run keeps a data set that was made for it alone, as ``hstu.fit`` makes them."""
    return run / "data" / name


def trained_on(run: RunDirectory) -> dict[str, Any]:
    """Return the ``dataset_record`` of a run, with the ``columns`` that it was made of if they are known; or nothing.

    Raises:
        ValueError: if it is damaged.
    """
    environment = run.path / "environment.json"
    try:
        record: dict[str, Any] = {}
        if environment.is_file():
            record = json.loads(environment.read_bytes()).get("dataset", {})
        if record:
            record["name"], Path(record["path"]), dict(record.get("columns", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{environment}: is damaged ({error}); remove it, and the data set is looked for in tmp_data"
        ) from None
    return record


def open_dataset(path: Path, mesh: Mesh, *, check: Check = "some") -> SequenceDataset:
    """Open a data set on every rank; rank 0 first, which writes its columns once for all, or checks them."""
    mesh.on_main(lambda: SequenceDataset.open(path, check).num_users)
    return SequenceDataset.open(path, "none")


def require_vocabularies(checkpoint: Path, dataset: SequenceDataset, mesh: Mesh, *, resume: bool) -> None:
    """Raise ``ValueError`` unless the ids of ``dataset`` are those of ``checkpoint``; before a model is built."""
    here = dataset.vocabularies
    mesh.on_main(lambda: require_same_vocabularies(checkpoint, read_marker(checkpoint), here, resume=resume))
