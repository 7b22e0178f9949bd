"""What the training entrypoints call: flags to an order, and the order carried out."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from absl import app, flags

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import refuse_repeats, show_in_help, underscore_flags
from hstu.config import ConfigError

if TYPE_CHECKING:
    from hstu.parallel import Mesh

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Define the flags of an entrypoint; hyphens and underscores both work."""
    flags.DEFINE_string("gin_config_file", None, "Gin file: a path, or the name of one in configs/.")
    flags.DEFINE_multi_string("gin_bindings", [], "A line such as TrainerArgs.max_train_iters=100; repeatable.")
    flags.DEFINE_multi_string("import", [], "Module that registers parts of your own; repeatable.")
    flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train, or score a checkpoint.")
    flags.DEFINE_string("checkpoint", None, "latest, best, a step, or a path. Default: latest to train, best to score.")
    flags.DEFINE_enum("resume", "auto", ["auto", "never", "must"], "Whether to go on from the run directory.")
    flags.DEFINE_string("init_from", None, "Run or checkpoint to start a new run from: TrainerArgs.init_from.")
    flags.DEFINE_string("run_dir", None, "Where results go. Default: runs/<config>-<time>.")
    refuse_repeats(FLAGS, "gin_config_file")


def ranking() -> None:
    """Run ``hstu-train-ranking``."""
    main("ranking")


def retrieval() -> None:
    """Run ``hstu-train-retrieval``."""
    main("retrieval")


def main(task: Literal["ranking", "retrieval"]) -> None:
    """Run the entrypoint of ``task``; a user's mistake ends in one line and exit code 2."""
    define_flags()
    show_in_help(FLAGS, __name__, f"Train or score a generative {task} model.")
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


def _run(task: Literal["ranking", "retrieval"], mesh: Mesh) -> None:
    from hstu.inference import report
    from hstu.training import session
    from hstu.training.run_directory import RunDirectory

    order = session.Order(
        task=task,
        config=FLAGS.gin_config_file,
        bindings=[*(f"import {module}" for module in FLAGS.get_flag_value("import", [])), *FLAGS.gin_bindings],
        resume=FLAGS.resume,
        checkpoint=FLAGS.checkpoint,
        init_from=FLAGS.init_from,
        command=sys.argv,
    )
    run = RunDirectory(mesh.world.broadcast(_run_path()))
    if FLAGS.mode == "eval":
        session.score(order, mesh, run)
        return
    session.train(order, mesh, run)
    report.report_at_end(run.path, mesh)


def _run_path() -> Path:
    if FLAGS.run_dir is not None:
        return Path(FLAGS.run_dir).resolve()
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ConfigError("--run-dir", "is required with torchrun --max-restarts: a restarted run goes on from there")
    if FLAGS.mode == "eval":
        raise ConfigError("--run-dir", "is required to score a checkpoint")
    stem = Path(FLAGS.gin_config_file or "run").stem
    return Path.cwd() / "runs" / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
