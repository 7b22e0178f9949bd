"""Python without a command line: train on a table of events, open a run, ask it. Exported as ``hstu.fit`` and so on."""

from __future__ import annotations

import dataclasses
import difflib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hstu.config import load_config, task_of
from hstu.data.checksums import file_sums
from hstu.data.interactions import ITEM, USER, InteractionSpec
from hstu.data.schema import SCHEMA_FILE, Schema
from hstu.data.table import preprocess_interactions
from hstu.inference.frames import kind_of, to_polars
from hstu.inference.report import report_at_end
from hstu.inference.run import Run, open_run
from hstu.interrupt import PoliteStop
from hstu.parallel import Mesh
from hstu.training import session
from hstu.training.checkpoint_files import find_checkpoint
from hstu.training.run_data import own_data
from hstu.training.run_directory import RunDirectory, configure_logging, kept_logging
from hstu.training.windows import last_window

if TYPE_CHECKING:
    from hstu.inference.frames import Frame

__all__ = ["Run", "fit", "open_run"]

_OPTIONS = {field.name for field in dataclasses.fields(InteractionSpec)} - {
    "name", "user_column", "item_column", "time_column", "action_column", "file", "users_file", "items_file",
} | {"formats"}  # fmt: skip


def fit(
    events: Frame | str | Path,
    *,
    run_dir: str | Path,
    config: str = "custom_retrieval.gin",
    user: str = USER,
    item: str = ITEM,
    time: str | None = None,
    action: str | None = None,
    users: Frame | str | Path | None = None,
    items: Frame | str | Path | None = None,
    task: Literal["ranking", "retrieval"] | None = None,
    resume: session.Resume = "auto",
    init_from: str | Path | None = None,
    verbose: bool = True,
    **options: Any,
) -> Run:
    """Train on a table of events, and return the run with the checkpoint that validation chose.

    A data set is made of the events in ``run_dir/data``, and everything that the training command writes is in
    ``run_dir``: the commands go on with it, and so does a second call with the same arguments, after Ctrl-C say, which
    saves the state and raises ``KeyboardInterrupt``. Many runs can be trained and open in one interpreter, one after
    the other.

    On several processes, a script that calls this is started by ``torchrun --nproc_per_node N script.py``: every rank
    calls it with the same arguments. A notebook has one process; for more, train there with the command or a script
    and open the run here.

    Args:
        events: One row per event: a DataFrame of pandas or Polars, a file, a directory of parts or a pattern, or the
            directory of a data set that the preprocessor made.
        run_dir: Where results go; names the data set too.
        config: A gin file: a path, or the name of a shipped one.
        user: Column of users, likewise ``item``.
        item: Column of items.
        time: Column of times; None: a user's events are in the order of the rows.
        action: Column of actions, which ranking predicts; several are separated by commas.
        users: One row per user, further columns become features.
        items: One row per item, further columns become categories.
        task: None: the one whose Args ``config`` sets.
        resume: Whether to go on with a run that is in ``run_dir`` ("auto"), never to, or only to ("must").
        init_from: A run or checkpoint whose weights a new run starts from.
        verbose: Print what the training command prints.
        **options: Fields of the config by their full names, as ``**{"TrainerArgs.max_epochs": 3}``, and fields of
            ``hstu.data.interactions.InteractionSpec``, as ``duplicates="drop"``: where a message names a flag such as
            ``--duplicates``, it means these; ``formats`` says how files are read, see ``preprocess_interactions``.

    Raises:
        ValueError: in one line, for what is wrong with the events, the config, or the run directory.
        TypeError: for an argument that does not exist.
        TrainingError: if training cannot go on: its loss is not finite, say.
        KeyboardInterrupt: after Ctrl-C, with the state saved.
    """
    bindings = {name: value for name, value in options.items() if "." in name}
    _require_known(options.keys() - bindings.keys())
    mesh, run = Mesh.of_process(), RunDirectory(Path(run_dir).resolve())
    if task is None:
        task = task_of([config], _lines(bindings))
    load_config(task, [config], [f"DatasetArgs.dataset_name = {run.path.name!r}", *_lines(bindings)])  # or raise early
    kind = kind_of(events) or "pandas"
    with kept_logging(), PoliteStop(), torch.random.fork_rng():
        configure_logging(None, is_main=mesh.is_main, quiet=not verbose)
        columns: dict[str, str | None] = {"user": user, "item": item, "time": time, "action": action}
        given = {name: value for name, value in options.items() if name in _OPTIONS}
        if isinstance(events, (str, Path)) and (Path(events) / SCHEMA_FILE).is_file():
            path, columns = Path(events).resolve(), {}
            bindings |= {"DatasetArgs.dataset_name": Schema.load(path).name, "DatasetArgs.dataset_path": str(path)}
        else:
            name = run.path.name
            tables = {"interactions": events, "users": users, "items": items}
            roles = {f"{role}_column": column for role, column in columns.items()}
            mesh.on_main(lambda: _make_data(run, name, tables, roles | given, resume))
            bindings |= {"DatasetArgs.dataset_name": name}
        order = session.Order(
            task=task,
            config=config,
            bindings=_lines(bindings),
            resume=resume,
            init_from=None if init_from is None else str(init_from),
            command=sys.argv,
            columns=columns,
            quiet=not verbose,
        )
        session.train(order, mesh, run)
        report_at_end(run.path, mesh)
    best = mesh.on_main(lambda: find_checkpoint(last_window(run.path) / "checkpoints", "best"))
    return open_run(run.path, "latest" if best is None else "best", frames=kind)


def _lines(bindings: dict[str, Any]) -> list[str]:
    return [f"{name} = {value!r}" for name, value in bindings.items()]


def _require_known(names: set[str]) -> None:
    for name in sorted(names - _OPTIONS):
        close = difflib.get_close_matches(name, [*_OPTIONS, "user", "item", "time", "action", "verbose"], n=1)
        hint = f"did you mean {close[0]!r}?" if close else "fields of the config are written 'Class.field'"
        raise TypeError(f"fit() has no argument {name!r}; {hint}")


def _make_data(
    run: RunDirectory, name: str, tables: dict[str, Any], spec: dict[str, Any], resume: session.Resume
) -> None:
    """Make the data set of a run, or see that the one that it was trained on is the same.

    Raises:
        ValueError: for bad input, and for other events than those that the run in the directory has.
    """
    begun, place = run.has_run(), own_data(run.path, name)
    if begun and resume == "never":
        raise ValueError(f"--run-dir = {str(run.path)!r}: holds a run, and --resume=never; choose another directory")
    if not begun and resume == "must":
        raise ValueError(f"--run-dir = {str(run.path)!r}: has no finished checkpoint 'latest'; train first")
    given = {
        role: table if isinstance(table, (str, Path)) or table is None else to_polars(table, role)
        for role, table in tables.items()
    }
    target = place.parent if not begun else run.path / ".data.new"
    try:
        preprocess_interactions(
            given.pop("interactions"), data_dir=target, users=given["users"], items=given["items"], name=name, **spec
        )
        if begun and _contents(target / name) != _contents(place):
            raise ValueError(
                f"--run-dir = {str(run.path)!r}: holds a run on other events, or on none of its own; choose another "
                "directory, with init_from to start from the weights of this one"
            )
    finally:
        if begun:
            shutil.rmtree(target, ignore_errors=True)


def _contents(data: Path) -> dict[str, Any]:
    """Return the checksums of the files of a data set."""
    files = [path for path in data.rglob("*") if path.is_file()]
    names = {str(path.relative_to(data)): path for path in files}
    return {name: file_sums([path]) for name, path in sorted(names.items()) if not name.startswith(".")}
