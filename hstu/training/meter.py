"""Loss and throughput between two log lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hstu.models.losses import LossSum
from hstu.parallel import Mesh


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not finite, or there is nothing to learn from."""


def not_finite(what: str, step: int, where: str = "") -> TrainingError:
    """Return the error for a loss or weight that is not a number any more."""
    remedy = "lower OptimizerArgs.learning_rate or set clip_grad"
    return TrainingError(f"{what} is not finite at step {step}: {remedy}{where}")


class Meter:
    """Sums over steps and ranks since the last log line; time spent elsewhere does not count."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.has_negatives = mesh, False
        self._reset()

    def _reset(self) -> None:
        # Loss and live negatives gather on the device, so that no step waits for it.
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)
        self.labels = self.sequences = self.tokens = self.batches = self.skipped = 0
        self.start()

    def start(self) -> None:
        """Start the clock of the next line."""
        self.away, self.since = 0.0, time.perf_counter()

    def add(self, loss: LossSum, sequences: int, tokens: int) -> None:
        """Count one batch that was trained on."""
        self.batches += 1
        self.sums[0] += loss.total.detach()
        self.has_negatives = loss.live_negatives is not None
        if loss.live_negatives is not None:
            self.sums[1] += loss.live_negatives.detach()
        self.labels += loss.count
        self.sequences += sequences
        self.tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside."""
        start = time.perf_counter()
        yield
        self.away += time.perf_counter() - start

    def state(self) -> list[float]:
        """Return loss, live negatives, labels, sequences and tokens since the last line, summed over all ranks."""
        host = torch.tensor([self.labels, self.sequences, self.tokens], dtype=torch.float64, device=self.sums.device)
        totals: list[float] = self.mesh.sum(torch.cat([self.sums, host])).tolist()
        return totals

    def restore(self, state: list[float]) -> None:
        """Go on from the means of ``state``, which all ranks share: rank 0 takes it. Speed is that of this process."""
        self._reset()
        if self.mesh.is_main and state:
            self.sums += torch.tensor(state[:2], dtype=torch.float64, device=self.sums.device)
            self.labels = int(state[2])

    def read(self, step: int) -> dict[str, float]:
        """Return means since the last line, and start again.

        Raises:
            TrainingError: if a label has less than one negative on average.
        """
        loss, live, labels, sequences, tokens = self.state()
        seconds = max(1e-9, time.perf_counter() - self.since - self.away)
        record = {
            "loss": loss / max(1.0, labels),
            "sequences_per_second": sequences / seconds,
            "tokens_per_second": tokens / seconds,
        }
        if self.skipped:
            record["skipped_steps"] = self.skipped
        if self.has_negatives:
            record["live_negatives"] = live / max(1.0, labels)
            if labels and record["live_negatives"] < 1:
                raise TrainingError(
                    f"{record['live_negatives']:.2f} negatives per label at step {step}: raise "
                    "TrainerArgs.train_batch_size or set RetrievalArgs.num_negatives"
                )
        self._reset()
        return record
