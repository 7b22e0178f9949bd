"""Train in a run directory, or score one of its checkpoints: what the entrypoints and ``hstu.fit`` call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hstu import environment
from hstu.config import ConfigError, LoadedConfig, load_config
from hstu.data.reader import SequenceDataset
from hstu.data.splits import each_window
from hstu.parallel import Mesh
from hstu.quiet import warn_only
from hstu.training.card import write_card
from hstu.training.checkpoint_files import find_checkpoint, no_checkpoint
from hstu.training.init_from import find_source
from hstu.training.item_text import with_kept_model
from hstu.training.logging import check_loggers, format_metrics
from hstu.training.run_data import (
    dataset_record,
    find_dataset,
    open_dataset,
    recorded_task,
    require_vocabularies,
    sized,
)
from hstu.training.run_directory import RunDirectory, configure_logging
from hstu.training.trainer import Trainer
from hstu.training.windows import last_window, window_path, write_windows

logger = logging.getLogger(__name__)

Resume = Literal["auto", "never", "must"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be done in a run directory.

    Attributes:
        task: Which model.
        config: A gin file: a path, or the name of one in configs/; None: the one that the run was trained with.
        bindings: Lines that win over the file.
        resume: Whether training goes on from the run directory: if it can, never, or it must.
        checkpoint: latest, best, a step, or a path; None: the latest to train, the best to score.
        init_from: A run or checkpoint that a new run starts from.
        command: For the record.
        columns: For the record: role -> the column of the table that the data set was made of.
        quiet: Whether the terminal gets warnings alone.
    """

    task: Literal["ranking", "retrieval"]
    config: str | None = None
    bindings: Sequence[str] = ()
    resume: Resume = "auto"
    checkpoint: str | None = None
    init_from: str | None = None
    command: Sequence[str] = ()
    columns: dict[str, str | None] = field(default_factory=dict)
    quiet: bool = False


def train(order: Order, mesh: Mesh, run: RunDirectory) -> None:
    """Train to the end, or go on with what was begun in ``run``, and score the best checkpoint on the test split.

    Raises:
        ValueError: for what the order, the data set and the run directory do not allow.
        Stopped: if a signal asked for it; the state is saved.
        TrainingError: if training cannot go on.
    """
    try:
        _train(order, mesh, run)
    finally:
        run.unlock()


def _train(order: Order, mesh: Mesh, run: RunDirectory) -> None:
    loaded, path = _load(order, mesh, run, training=True)
    started = mesh.world.broadcast(run.has_run())
    restarted = mesh.on_main(run.has_begun)  # which has obeyed --resume and --checkpoint before
    if started and order.resume == "never" and not restarted:
        raise ValueError(f"--run-dir = {str(run.path)!r}: holds a run, and --resume=never; choose another directory")
    check_loggers(loaded.config.trainer.loggers)
    killed = mesh.on_main(run.lock)  # then a whole look at what the machine may not have written
    dataset = open_dataset(path, mesh, check="all" if killed else "some")
    if loaded.config.dataset.goes_over_windows:
        if order.checkpoint is not None:
            raise ValueError("--checkpoint: a run over windows goes on in the one where it was stopped; leave it out")
        _train_windows(order, loaded, dataset, mesh, run, must=order.resume == "must")
        return
    checkpoint = mesh.on_main(lambda: find_checkpoint(run.checkpoints, "latest")) if restarted else None
    checkpoint = checkpoint or _chosen(
        order.checkpoint or "latest", mesh, run, must=order.resume == "must" or order.checkpoint is not None
    )
    _train_one(order, loaded, dataset, mesh, run, checkpoint)


def _train_windows(
    order: Order, loaded: LoadedConfig, dataset: SequenceDataset, mesh: Mesh, run: RunDirectory, *, must: bool
) -> None:
    """Train on one window after another, each in a run directory of its own below ``run``."""
    config, windows = loaded.config, each_window(loaded.config.dataset, dataset)
    if must and not mesh.on_main(run.has_run):
        raise ValueError(f"--run-dir = {str(run.path)!r}: has no run to go on with; train first")
    mesh.on_main(run.create)
    mesh.on_main(run.lock)
    record = environment.describe() | {
        "command": list(order.command),
        "dataset": dataset_record(config.dataset, dataset.path),
    }
    mesh.on_main(lambda: run.describe(loaded, record))
    mesh.on_main(run.begin)
    init_from, records = config.trainer.init_from, list[dict[str, Any]]()
    # Not what stands in the directories of windows: one that is half done may have been scored.
    done: dict[int, dict[str, Any]] = mesh.on_main(lambda: {record["window"]: record for record in run.records()})
    for window, args in windows.items():
        if isinstance(args, str):
            logger.info("window %d is left out: %s", window, args)
            continue
        own = RunDirectory(window_path(run.path, window))
        result = done.get(window)
        if result is None:
            logger.info("window %d of %d to %d", window, min(windows), max(windows))
            trainer = replace(config.trainer, init_from=init_from)
            part = replace(loaded, config=replace(config, dataset=args, trainer=trainer))
            checkpoint = _chosen("latest", mesh, own, must=False)
            try:
                result = _train_one(order, replace(part, given=part.operative), dataset, mesh, own, checkpoint)
            finally:
                own.unlock()
        records.append(result)
        mesh.on_main(lambda: write_windows(run, config.dataset, dataset, records))
        if config.dataset.carry_over:
            init_from = str(own.path)
    logger.info("windows: %s", run.path / "windows.csv")


def _train_one(
    order: Order,
    loaded: LoadedConfig,
    dataset: SequenceDataset,
    mesh: Mesh,
    run: RunDirectory,
    checkpoint: Path | None,
) -> dict[str, Any]:
    """Train in ``run``, from ``checkpoint`` on if there is one; returns the test record."""
    if checkpoint is not None:
        require_vocabularies(checkpoint, dataset, mesh, resume=True)
    init_from = loaded.config.trainer.init_from
    source = None
    if init_from is not None and checkpoint is None:
        source = mesh.on_main(lambda: find_source(init_from, run.path))
    trainer = Trainer(loaded.config, dataset, mesh, run)
    try:
        if checkpoint is not None:
            trainer.resume(checkpoint)
        elif source is not None:
            trainer.start_from(source)
        _describe(order, loaded, dataset.path, trainer)
        if checkpoint is not None:
            logger.info("resumed from %s at step %d", checkpoint, trainer.progress.step)
            if init_from is not None:
                logger.info(
                    "TrainerArgs.init_from = %r: not used again, for the run has a checkpoint of its own", init_from
                )
        record = trainer.train()
        _write_card(trainer, record)
        return record
    finally:
        trainer.checkpointer.close()


def _describe(order: Order, loaded: LoadedConfig, data: Path, trainer: Trainer) -> None:
    """Make the run directory, and say in it what is trained."""
    mesh, run = trainer.mesh, trainer.run
    mesh.on_main(run.create)
    mesh.on_main(run.lock)
    configure_logging(run.path / "train.log", is_main=mesh.is_main, quiet=order.quiet)
    for note in loaded.notes:
        logger.info("note: %s", note)
    columns = {"columns": order.columns} if order.columns else {}
    record = {"command": list(order.command), "dataset": dataset_record(loaded.config.dataset, data) | columns}
    record["started_from"] = trainer.started_from or mesh.world.broadcast(run.started_from())
    loaded = replace(loaded, config=trainer.config)  # with the values that the data set decides
    mesh.on_main(lambda: run.describe(loaded, environment.describe() | record))


def score(order: Order, mesh: Mesh, run: RunDirectory) -> None:
    """Score a checkpoint on the validation and the test split; the test record is written if ``run`` can be.

    Raises:
        ValueError: as :func:`train`.
    """
    run = RunDirectory(mesh.on_main(lambda: last_window(run.path)))
    loaded, path = _load(order, mesh, run, training=False)
    dataset: SequenceDataset = open_dataset(path, mesh)
    started = mesh.world.broadcast(run.has_run())
    choice = order.checkpoint or "best"
    checkpoint = _chosen(choice, mesh, run, must=True)
    assert checkpoint is not None
    require_vocabularies(checkpoint, dataset, mesh, resume=False)
    problem = mesh.on_main(lambda: _problem(run)) if started else None
    if problem is not None:
        logger.warning("%s; the scores are only printed", problem)
    trainer = Trainer(with_kept_model(loaded.config, run.path), dataset, mesh, run)
    for note in trainer.notes:
        logger.info("%s", note)
    records = trainer.evaluate(checkpoint)
    for record in records:
        logger.info("step %d  %s  %s", record["step"], record["split"], format_metrics(record["metrics"]))
    if problem is None:
        mesh.on_main(run.create)
        name = "eval.json" if choice == "best" else f"eval_{checkpoint.name}.json"
        mesh.on_main(lambda: run.write_json(name, records[-1]))
        if choice == "best":
            _write_card(trainer, records[-1])
        logger.info("result: %s", run.path / name)


def _chosen(choice: str, mesh: Mesh, run: RunDirectory, *, must: bool) -> Path | None:
    found: Path | None = mesh.on_main(lambda: find_checkpoint(run.checkpoints, choice))
    if found is None and must:
        raise ValueError(f"--run-dir = {str(run.path)!r}: {no_checkpoint(run.checkpoints, choice)}")
    return found


def _write_card(trainer: Trainer, record: dict[str, Any]) -> None:
    run, config, schema = trainer.run.path, trainer.config, trainer.dataset.schema
    with warn_only(f"{run / 'card.md'} was not written"):
        trainer.mesh.on_main(lambda: write_card(run, config, schema, record))


def _problem(run: RunDirectory) -> str | None:
    """Return why ``run`` cannot be written, if it cannot."""
    try:
        run.create()
    except ValueError as error:
        return str(error)
    return None


def _load(order: Order, mesh: Mesh, run: RunDirectory, *, training: bool) -> tuple[LoadedConfig, Path]:
    """Load the config that was given, or for a run directory alone the one it was trained with; and find its data."""
    trained, given = recorded_task(run), order.config
    if trained not in (None, order.task):
        raise ValueError(
            f"--run-dir = {str(run.path)!r}: holds a {trained} run; use pretrain_gr_{trained}.py or another directory"
        )
    # A run goes on with what was given to it, and is scored with every value that applied to it.
    own = run.path / ("config.gin" if training else "operative.gin")
    if given is None and own.is_file():
        given = str(own)
    if given is None:
        raise ConfigError("--gin-config-file", "is required; for example synthetic_ranking.gin")
    start = [] if order.init_from is None else [f"TrainerArgs.init_from = {str(Path(order.init_from).resolve())!r}"]
    loaded = load_config(order.task, [given], [*order.bindings, *start])
    path = find_dataset(loaded.config.dataset, run)
    return sized(loaded, path, mesh.world_size, run.path), path
