"""What a run says while it trains: a line or a bar, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
import uuid
from types import TracebackType
from typing import Any

from tqdm import tqdm

from hstu.bar import progress_bar
from hstu.config import Config, ConfigError
from hstu.parallel import Mesh
from hstu.quiet import warn_only
from hstu.training.checkpoint_files import write_atomically
from hstu.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)


class RunLogger:
    """Writes each record everywhere it should appear; rank 0 only.

    Args:
        run: Where files go.
        config: The run; ``TrainerArgs.loggers`` says where curves go.
        first_step: Where training starts.
        total_steps: Where it ends.
    """

    def __init__(self, run: RunDirectory, config: Config, first_step: int, total_steps: int) -> None:
        loggers = config.trainer.loggers
        check_loggers(loggers)
        self.run, self.total_steps, self.first_step = run, total_steps, first_step
        self.started = time.perf_counter()
        self.bar = progress_bar(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1)
        self.tensorboard: Any = None
        self.wandb: Any = None
        if "tensorboard" in loggers:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(run.path / "tensorboard"), purge_step=first_step + 1)
        if "wandb" in loggers:
            self.wandb = _start_wandb(run, config)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        with warn_only("the last curves may be missing"):
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish(exit_code=int(value is not None))

    def tick(self) -> None:
        """Count one step."""
        if self.bar is not None:
            self.bar.update()

    def train(self, record: dict[str, Any]) -> None:
        """Log a training record."""
        self.run.append(record)
        self._curves("train", record["step"], {k: v for k, v in record.items() if isinstance(v, float)})
        speed = _format_speed(record)
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {record['loss']:.4f} {speed}")
            return
        logger.info(
            "step %d/%d  epoch %d  loss %.4f  lr %.2e  %s  ETA %s",
            record["step"], self.total_steps, record["epoch"], record["loss"], record["lr"], speed,
            self._eta(record["step"]),
        )  # fmt: skip

    def evaluation(self, record: dict[str, Any], note: str = "") -> None:
        """Log an evaluation record."""
        self.run.append(record)
        self._curves(record["split"], record["step"], record["metrics"])
        logger.info("step %d  %s  %s%s", record["step"], record["split"], format_metrics(record["metrics"]), note)

    def _curves(self, group: str, step: int, values: dict[str, float | None]) -> None:
        finite = {f"{group}/{name}": value for name, value in values.items() if value is not None}
        try:
            if self.tensorboard is not None:
                for name, value in finite.items():
                    self.tensorboard.add_scalar(name, value, step)
            if self.wandb is not None:
                self.wandb.log(finite, step=step)
        except Exception as error:  # curves end no run
            logger.warning("no more curves in TensorBoard and W&B (%s: %s)", type(error).__name__, error)
            self.tensorboard = self.wandb = None

    def _eta(self, step: int) -> str:
        done = step - self.first_step
        seconds = (time.perf_counter() - self.started) / max(1, done) * (self.total_steps - step)
        return tqdm.format_interval(seconds)


class SilentLogger:
    """Stands in for ``RunLogger`` on ranks other than 0."""

    def __enter__(self) -> SilentLogger:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tick(self) -> None:
        pass

    def train(self, record: dict[str, Any]) -> None:
        pass

    def evaluation(self, record: dict[str, Any], note: str = "") -> None:
        pass


def make_logger(
    mesh: Mesh, run: RunDirectory, config: Config, first_step: int, total_steps: int
) -> RunLogger | SilentLogger:
    """Return what this rank logs with."""
    return RunLogger(run, config, first_step, total_steps) if mesh.is_main else SilentLogger()


def format_metrics(metrics: dict[str, float | None]) -> str:
    """Return ``HR@10 0.1234  NDCG@10 0.0567``."""
    return "  ".join(f"{name} " + ("undefined" if value is None else f"{value:.4f}") for name, value in metrics.items())


def _format_speed(record: dict[str, Any]) -> str:
    """Return ``1,041 seq/s 14,707 tok/s 12.3 GFLOP/s  waits 2%  1.2 GiB``."""
    parts = [f"{record['sequences_per_second']:,.0f} seq/s {record['tokens_per_second']:,.0f} tok/s"]
    parts.append(f"{record['flops_per_second'] / 1e9:,.1f} GFLOP/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts.append(f"waits {record['data_wait_share']:.0%}  {record['memory_gib']:.1f} GiB")
    return "  ".join(parts)


def check_loggers(loggers: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` for a logger that is not installed."""
    if "wandb" in loggers and importlib.util.find_spec("wandb") is None:
        raise ConfigError("TrainerArgs.loggers", "asks for 'wandb': install it with pip install 'hstu[wandb]'")


def _start_wandb(run: RunDirectory, config: Config) -> Any:
    """Start a run of Weights & Biases, or go on with the one that this run directory has had."""
    import wandb

    note = run.path / "wandb_id"
    if not note.is_file():
        write_atomically(note, uuid.uuid4().hex)
    try:
        return wandb.init(
            dir=str(run.path),
            id=note.read_text(),
            name=run.path.name,
            resume="allow",
            project=config.trainer.wandb_project,
            group=config.trainer.wandb_group,
            config={name: value for name, value in dataclasses.asdict(config).items() if value is not None},
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        message = f"asks for 'wandb', which cannot start ({reason}); run wandb login, or set WANDB_MODE=offline"
        raise ConfigError("TrainerArgs.loggers", message) from None
