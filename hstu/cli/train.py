"""What the training entrypoints call: flags to a config, a data set, a run directory, and the trainer."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from absl import app, flags

from hstu import environment
from hstu.cli.command import (
    dataset_record,
    find_dataset,
    open_dataset,
    recorded_task,
    require_vocabularies,
    run_on_mesh,
)
from hstu.cli.flags import refuse_repeats, underscore_flags
from hstu.config import ConfigError, LoadedConfig, load_config

FLAGS = flags.FLAGS
logger = logging.getLogger("hstu.cli")


def define_flags() -> None:
    """Define the flags of an entrypoint; hyphens and underscores both work."""
    flags.DEFINE_string("gin_config_file", None, "Gin file: a path, or the name of one in configs/.")
    flags.DEFINE_multi_string("gin_bindings", [], "A line such as TrainerArgs.max_train_iters=100; repeatable.")
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or score a checkpoint.")
    flags.DEFINE_string("checkpoint", None, "latest, best, a step, or a path. Default: latest to train, best to score.")
    flags.DEFINE_enum("resume", "auto", ["auto", "never", "must"], "Whether to go on from the run directory.")
    flags.DEFINE_string("init_from", None, "Run or checkpoint to start a new run from: TrainerArgs.init_from.")
    flags.DEFINE_string("run_dir", None, "Where results go. Default: runs/<config>-<time>.")
    refuse_repeats(FLAGS, "gin_config_file")
    for flag in FLAGS.flags_by_module_dict()[__name__]:
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # --help lists those of the script alone


def main(task: Literal["ranking", "retrieval"]) -> None:
    """Run the entrypoint of ``task``; a user's mistake ends in one line and exit code 2."""
    define_flags()
    app.define_help_flags()
    try:  # app.run would also send every library's notices to the terminal
        _, *rest = FLAGS(underscore_flags(sys.argv))
        if rest:
            raise flags.Error(f"{rest[0]!r} belongs to no flag")
    except flags.Error as error:
        if int(os.environ.get("RANK", 0)) == 0:  # all ranks have the same flags
            print(f"error: {error} (--help lists the flags)".replace("\n", " "), file=sys.stderr)
        sys.exit(2)
    unfinished = "; nothing was trained" if FLAGS.mode == "train" else "; nothing was written"
    sys.exit(run_on_mesh(lambda mesh: _run(task, mesh), unfinished))


def _run(task: Literal["ranking", "retrieval"], mesh: Any) -> None:
    from hstu.training.run_directory import RunDirectory

    run = RunDirectory(mesh.world.broadcast(_run_path()))
    try:
        _train_or_score(task, mesh, run)
    finally:
        run.unlock()


def _train_or_score(task: Literal["ranking", "retrieval"], mesh: Any, run: Any) -> None:
    from hstu.training.checkpoint_files import find_checkpoint
    from hstu.training.init_from import find_source
    from hstu.training.logging import check_loggers
    from hstu.training.run_directory import configure_logging
    from hstu.training.trainer import Trainer

    loaded = _load(task, run)
    path = find_dataset(loaded.config.dataset, run)
    training = FLAGS.mode == "train"
    started = mesh.world.broadcast(run.has_run())
    restarted = training and mesh.on_main(run.has_begun)  # which has obeyed --resume and --checkpoint before
    if training and started and FLAGS.resume == "never" and not restarted:
        raise ValueError(f"--run-dir = {str(run.path)!r}: holds a run, and --resume=never; choose another directory")
    if training:
        check_loggers(loaded.config.trainer.loggers)
    killed = training and mesh.on_main(run.lock)  # then a whole look at what the machine may not have written
    dataset = open_dataset(path, mesh, check="all" if killed else "some")
    choice = FLAGS.checkpoint or ("latest" if training else "best")
    checkpoint = mesh.on_main(lambda: find_checkpoint(run.checkpoints, "latest")) if restarted else None
    checkpoint = checkpoint or mesh.on_main(lambda: find_checkpoint(run.checkpoints, choice))
    if checkpoint is None and (not training or FLAGS.resume == "must" or FLAGS.checkpoint is not None):
        raise ValueError(f"--run-dir = {str(run.path)!r}: has no finished checkpoint {choice!r}; train first")
    if checkpoint is not None:
        require_vocabularies(checkpoint, dataset, mesh, resume=training)
    init_from = loaded.config.trainer.init_from if training else None
    source = None
    if init_from is not None and checkpoint is None:
        source = mesh.on_main(lambda: find_source(init_from, run.path))
    problem = mesh.on_main(lambda: _problem(run)) if not training and started else None
    if problem is not None:
        logger.warning("%s; the scores are only printed", problem)
    trainer = Trainer(loaded.config, dataset, mesh, run)
    if not training:
        assert checkpoint is not None
        _score(trainer, checkpoint, choice, writable=problem is None)
        return
    if checkpoint is not None:
        trainer.resume(checkpoint)
    elif source is not None:
        trainer.start_from(source)
    mesh.on_main(run.create)
    mesh.on_main(run.lock)
    configure_logging(run.path / "train.log", is_main=mesh.is_main)
    for note in loaded.notes:
        logger.info("note: %s", note)
    if checkpoint is not None:
        logger.info("resumed from %s at step %d", checkpoint, trainer.progress.step)
        if init_from is not None:
            logger.info(
                "TrainerArgs.init_from = %r: not used again, for the run has a checkpoint of its own", init_from
            )
    record = {"command": sys.argv, "dataset": dataset_record(loaded.config.dataset, path)}
    record["started_from"] = trainer.started_from or mesh.world.broadcast(run.started_from())
    loaded = replace(loaded, config=trainer.config)  # with the values that the data set decides
    mesh.on_main(lambda: run.describe(loaded, environment.describe() | record))
    trainer.train()


def _problem(run: Any) -> str | None:
    """Return why ``run`` cannot be written, if it cannot."""
    try:
        run.create()
    except ValueError as error:
        return str(error)
    return None


def _score(trainer: Any, checkpoint: Path, choice: str, *, writable: bool) -> None:
    from hstu.training.logging import format_metrics

    for note in trainer.notes:
        logger.info("%s", note)
    records = trainer.evaluate(checkpoint)
    for record in records:
        logger.info("step %d  %s  %s", record["step"], record["split"], format_metrics(record["metrics"]))
    if writable:
        trainer.mesh.on_main(trainer.run.create)
        name = "eval.json" if choice == "best" else f"eval_{checkpoint.name}.json"
        trainer.mesh.on_main(lambda: trainer.run.write_json(name, records[-1]))
        logger.info("result: %s", trainer.run.path / name)


def _load(task: Literal["ranking", "retrieval"], run: Any) -> LoadedConfig:
    """Load the config that was given, or for a run directory alone the one it was trained with."""
    trained = recorded_task(run)
    if trained not in (None, task):
        raise ValueError(
            f"--run-dir = {str(run.path)!r}: holds a {trained} run; use pretrain_gr_{trained}.py or another directory"
        )
    given = FLAGS.gin_config_file
    # A run goes on with what was given to it, and is scored with every value that applied to it.
    own = run.path / ("config.gin" if FLAGS.mode == "train" else "operative.gin")
    if given is None and own.is_file():
        given = str(own)
    if given is None:
        raise ConfigError("--gin-config-file", "is required; for example synthetic_ranking.gin")
    start = [] if FLAGS.init_from is None else [f"TrainerArgs.init_from = {str(Path(FLAGS.init_from).resolve())!r}"]
    return load_config(task, [given], [*FLAGS.gin_bindings, *start])


def _run_path() -> Path:
    if FLAGS.run_dir is not None:
        return Path(FLAGS.run_dir).resolve()
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ConfigError("--run-dir", "is required with torchrun --max-restarts: a restarted run goes on from there")
    if FLAGS.mode == "eval":
        raise ConfigError("--run-dir", "is required to score a checkpoint")
    stem = Path(FLAGS.gin_config_file or "run").stem
    return Path.cwd() / "runs" / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
