"""Loss and throughput between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from hstu.config import Config
from hstu.data.batch import Batch
from hstu.models.losses import LossSum
from hstu.parallel import Mesh


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite, or there is nothing to learn from."""


def not_finite(what: str, step: int, config: Config, dense_steps: int, where: str = "") -> TrainingError:
    """Return the error for a loss or weight that is not a number after ``dense_steps`` changes of the weights."""
    args, rate = config.optimizer, f"OptimizerArgs.learning_rate = {config.optimizer.learning_rate:g}"
    if dense_steps == 0:
        remedy = "no weight has moved yet, so that no learning rate is the reason; lower NetworkArgs."
        remedy += "embedding_initializer_std" + (
            "" if config.retrieval is None else " or raise RetrievalArgs.temperature"
        )
    elif args.sparse_learning_rate > args.learning_rate:
        remedy = f"lower OptimizerArgs.sparse_learning_rate = {args.sparse_learning_rate:g} (and {rate}), or set "
        remedy += "sparse_max_gradient and clip_grad"
    else:
        remedy = f"lower {rate} or set clip_grad"
    return TrainingError(f"{what} is not finite at step {step}: {remedy}{where}")


class Meter:
    """Sums over steps and ranks since the last log line; time spent elsewhere does not count.

    Args:
        mesh: The ranks.
        peak: Floating-point operations a second that one of them can do, if that is known.
    """

    def __init__(self, mesh: Mesh, peak: float | None = None) -> None:
        self.mesh, self.has_negatives, self.peak = mesh, False, peak
        self._reset()

    def _reset(self) -> None:
        # Loss and live negatives gather on the device, so that no step waits for it.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        self.labels = self.sequences = self.tokens = self.batches = self.skipped = 0
        self.flops = self.waited = 0.0
        #: Of the dense weights, before clipping, in the last step since the last line that was not skipped.
        self.gradient_norm: torch.Tensor | None = None
        self.start()

    def start(self) -> None:
        """Start the clock of the next line."""
        self.away, self.since = 0.0, time.perf_counter()

    def add(self, loss: LossSum, sequences: int, tokens: int, flops: float) -> None:
        """Count one batch that was trained on."""
        self.batches += 1
        self.sums[0] += loss.total.detach()
        self.has_negatives = loss.live_negatives is not None
        if loss.live_negatives is not None:
            self.sums[1] += loss.live_negatives.detach()
        self.labels += loss.count
        if self.mesh.context.rank == 0:  # the ranks of a context group share their samples
            self.sequences += sequences
            self.tokens += tokens
            self.flops += flops

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield ``batches``, and count the time that they keep the step waiting."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        start = time.perf_counter()
        yield
        self.away += time.perf_counter() - start

    def state(self) -> list[float]:
        """Return what happened since the last line, summed over all ranks.

        Loss, live negatives, labels, sequences, tokens, floating-point operations, seconds of waiting for data.
        """
        host = torch.tensor(
            [self.labels, self.sequences, self.tokens, self.flops, self.waited],
            dtype=torch.float64,
            device=self.sums.device,
        )
        totals: list[float] = self.mesh.tokens.sum(torch.cat([self.sums, host])).tolist()
        return totals

    def restore(self, state: list[float]) -> None:
        """Go on from the means of ``state``, which all ranks share: one of each sum takes it, not the speed."""
        self._reset()
        if self.mesh.tokens.rank == 0 and state:
            self.sums += torch.tensor(state[:2], dtype=torch.float64, device=self.sums.device)
            self.labels = int(state[2])

    def read(self, step: int) -> dict[str, float]:
        """Return means since the last line, and start again.

        Raises:
            TrainingError: if a label has less than one negative on average.
        """
        loss, live, labels, sequences, tokens, flops, waited = self.state()
        seconds = max(1e-9, time.perf_counter() - self.since - self.away)
        record = {
            "loss": loss / max(1.0, labels),
            "sequences_per_second": sequences / seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "data_wait_share": waited / self.mesh.tokens.size / seconds,
            "memory_gib": self._memory() / 2**30,
        }
        if self.gradient_norm is not None:
            record["gradient_norm"] = float(self.gradient_norm)
        if self.peak:
            record["mfu"] = flops / seconds / self.mesh.world_size / self.peak
        if self.skipped:
            record["skipped_steps"] = self.skipped
        if self.has_negatives:
            record["live_negatives"] = live / max(1.0, labels)
            if labels and record["live_negatives"] < 1:
                raise TrainingError(
                    f"{record['live_negatives']:.2f} negatives per label at step {step}: raise "
                    "TrainerArgs.train_batch_size or set RetrievalArgs.num_negatives; where RetrievalArgs."
                    "closest_negative leaves out all items because their vectors are nearly one, leave it out"
                )
        self._reset()
        return record

    def _memory(self) -> int:
        """Return the most memory that tensors took on this GPU, or what this process takes on a CPU, in bytes."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device)
        return int(psutil.Process().memory_info().rss)
