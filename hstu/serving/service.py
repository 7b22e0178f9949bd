"""The model that is served now, and how another checkpoint takes its place without a request being dropped."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path

from hstu.inference.opened import Opened, open_trained
from hstu.parallel import Mesh
from hstu.serving.batching import Batches
from hstu.serving.metrics import Metrics
from hstu.serving.model import ModelOptions, ServedModel
from hstu.training.checkpoint_files import MARKER, find_checkpoint
from hstu.training.file_errors import describe, is_foreseeable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """What is served, and how.

    Attributes:
        run_dir: The run directory.
        checkpoint: best, latest, a step, or a path.
        bindings: Gin lines that win over the run's config.
        model: How a checkpoint answers.
        batch_size: Questions answered together at most.
        batch_wait: Seconds that a question waits for others.
        max_waiting: Questions that may wait.
        watch: Seconds between looks for another checkpoint; None: only ``reload`` takes one up.
    """

    run_dir: Path
    checkpoint: str = "best"
    bindings: tuple[str, ...] = ()
    model: ModelOptions = field(default_factory=ModelOptions)
    batch_size: int = 64
    batch_wait: float = 0.002
    max_waiting: int = 512
    watch: float | None = None

    def check(self) -> None:
        """Raise ``ValueError`` for a number that cannot be."""
        limits = self.model.limits
        least = {
            "batch_size": (self.batch_size, 1),
            "batch_wait": (self.batch_wait, 0),
            "max_waiting": (self.max_waiting, 1),
            "cache_mib": (self.model.cache_bytes >> 20, 0),
            "max_k": (limits.k, 1),
            "max_events": (limits.events, 1),
            "max_items": (limits.items, 1),
        }
        for name, (value, low) in least.items():
            if not value >= low:
                raise ValueError(f"--{name} = {value}: must be at least {low}")
        if self.watch is not None and not self.watch > 0:
            raise ValueError(f"--watch = {self.watch}: must be above 0 seconds")


class Service:
    """Answers questions with one checkpoint, and then with another.

    Args:
        options: What is served.
        mesh: This process.

    Attributes:
        model: What answers now.
        batches: The thread that it answers in.
        metrics: What happened so far.

    Raises:
        ValueError: if the run cannot be opened, or the options do not fit it.
    """

    def __init__(self, options: ServiceOptions, mesh: Mesh) -> None:
        options.check()
        self.options, self.mesh, self.metrics = options, mesh, Metrics()
        self.model = self._open()
        self.metrics.served(self)
        self.batches = Batches(
            size=options.batch_size,
            wait=options.batch_wait,
            most=options.max_waiting,
            told=self.metrics.batch_size.observe,
        )
        self._loading = threading.Lock()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        if options.watch is not None:
            self._watcher.start()

    def reload(self) -> ServedModel:
        """Open the checkpoint that the options name now, and answer with it what is asked from then on.

        What was asked before is answered by the model before. Where it cannot be opened that goes on.

        Raises:
            ValueError: in one line, if it cannot be opened.
        """
        with self._loading:
            try:
                model = self._open()
            except (ValueError, OSError) as error:
                self.metrics.reloads.labels("refused").inc()
                if isinstance(error, OSError) and not is_foreseeable(error):
                    raise
                line = describe(error) if isinstance(error, OSError) else str(error)
                raise ValueError(f"{line}; step {self.model.step} is served as before") from error
            self.model = model
            self.metrics.reloads.labels("done").inc()
            logger.info("step %d of %s is served", model.step, model.opened.run.path)
            return model

    def close(self, timeout: float | None = None) -> None:
        """Answer what waits, and end."""
        self._ended.set()
        self.batches.close(timeout)

    def _open(self) -> ServedModel:
        options = self.options
        opened: Opened = open_trained(options.run_dir, options.checkpoint, list(options.bindings), self.mesh)
        return ServedModel(opened, options.model)

    def _watch(self) -> None:
        assert self.options.watch is not None
        refused = None
        while not self._ended.wait(self.options.watch):
            present = self._present()
            if present in (None, refused, _identity(self.model.opened.checkpoint)):
                continue
            refused = present  # unless it is taken up: it is not tried again and again
            try:
                self.reload()
            except ValueError as error:
                logger.warning("the new checkpoint is not taken up: %s", error)
            except Exception:
                logger.exception("the new checkpoint is not taken up; step %d is served as before", self.model.step)

    def _present(self) -> tuple[Path, bytes] | None:
        """Return which checkpoint the options name now; None while there is none."""
        try:
            found = find_checkpoint(self.model.opened.run.checkpoints, self.options.checkpoint)
        except ValueError:
            return None
        return None if found is None else _identity(found)


def _identity(checkpoint: Path) -> tuple[Path, bytes] | None:
    """Return what tells a checkpoint from others, also from one that took its place; None if it is gone."""
    try:
        return checkpoint, (checkpoint / MARKER).read_bytes()
    except OSError:
        return None
