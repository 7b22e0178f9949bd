"""One optimizer step: forward and backward passes over its batches, then both optimizers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hstu.config import Config
from hstu.data.batch import Batch
from hstu.data.reader import SequenceDataset
from hstu.models.losses import LossSum
from hstu.parallel import Mesh, Parallelized
from hstu.parallel.embedding import HeldRows
from hstu.parallel.pipeline import CachedLookupPipeline, LookupPipeline, Rows
from hstu.training.batch_flops import batch_flops
from hstu.training.checkpoint_files import Progress
from hstu.training.graphs import graphed_loss
from hstu.training.meter import Meter, not_finite
from hstu.training.optimizer import Optimizer

logger = logging.getLogger(__name__)

_MOST_SKIPPED = 10  # one after another: then it is not the batch that is bad
_NAMED_USERS = 10  # in an error message; train.log has all


class Stepper:
    """Takes the steps of a run.

    Args:
        parallel: The distributed model.
        optimizer: Both optimizers.
        meter: Counts what was trained on.
        config: The run.
        dataset: Knows the original ids of users.

    Attributes:
        note: A line on what is computed otherwise than asked for, or None.
    """

    def __init__(
        self, parallel: Parallelized, optimizer: Optimizer, meter: Meter, config: Config, dataset: SequenceDataset
    ) -> None:
        self.parallel, self.optimizer, self.meter, self.config = parallel, optimizer, meter, config
        self.mesh, self.model, self.dataset = parallel.mesh, parallel.model, dataset
        self.graphs, self.note = graphed_loss(parallel, config)
        self.skipped_in_a_row = 0
        self.pipeline: LookupPipeline | None = None
        if config.trainer.pipeline_type == "native" and parallel.tables.collections:
            kind = CachedLookupPipeline if parallel.tables.cached else LookupPipeline
            self.pipeline = kind(parallel.model, parallel.tables, self.mesh.device)

    def take(self, batches: Sequence[Batch], progress: Progress) -> float:
        """Take the step after ``progress.step`` and count it in ``progress``; returns the learning rate.

        Gradients are those of the mean over the label tokens of all ``batches`` of all ranks.

        Args:
            batches: What ``steps`` gives: the batches of this rank, in host memory.
            progress: Counts of steps.

        Raises:
            TrainingError: if the loss is not finite; no weight has moved on account of it.
        """
        rate = self.optimizer.prepare(progress.step)
        scale = self._scale(batches)
        for number, batch in enumerate(batches, 1):
            with self.parallel.dense.accumulate(last=number == len(batches)):
                loss, check, held = self._run(batch, scale)
                # The device has the backward pass of the dense weights before it while the host asks for the loss.
                broken = check.read()
                if broken is None:
                    held.step()
            if broken is not None:
                if number == len(batches):
                    self.parallel.dense.reduce_gradients()  # an exchange that has begun has to end
                self._refuse(batch, broken, progress)
                break
            progress.table_steps += 1
            work = batch_flops(self.model, self.config, batch)
            # A rank without a sample got a stand-in, whose user is -1.
            self.meter.add(loss, int((batch.users >= 0).sum()), self.model.num_tokens(batch), work)
        else:
            self.meter.gradient_norm = self.optimizer.step()
            self.skipped_in_a_row = 0
            progress.dense_steps += 1
        progress.step += 1
        return rate

    def steps(self, batches: Iterator[Batch], progress: Progress) -> Iterator[tuple[Batch, ...]]:
        """Group the batches of an epoch into those of a step, each to be taken before the next is asked for."""
        size, trainer = self.config.trainer.gradient_accumulation_steps, self.config.trainer
        batches = map(self._training_batch, batches)
        if self.pipeline is None:
            yield from zip(*[batches] * size, strict=True)
            return
        batches, ahead = itertools.tee(batches)
        for step in zip(*[batches] * size, strict=True):
            if self.pipeline.is_empty:  # nothing is in flight while tables are looked up for an evaluation
                to_evaluation = trainer.eval_interval - progress.step % trainer.eval_interval
                number = min(to_evaluation, self.optimizer.total_steps - progress.step)
                self.pipeline.feed(itertools.islice(ahead, number * size))
            yield step

    def _training_batch(self, batch: Batch) -> Batch:
        """Return ``batch`` with what training predicts, in page-locked memory where it is copied from there."""
        prepared = self.model.training_batch(batch)
        return prepared.pin_memory() if prepared is not batch and self.mesh.device.type == "cuda" else prepared

    def _scale(self, batches: Sequence[Batch]) -> float | torch.Tensor:
        """Return what turns the sums of losses of this rank into the mean over the labels of all ranks."""
        # Ranks average gradients, hence their number; those of a context group all count the same samples.
        labels, ranks = float(sum(batch.labels.numel() for batch in batches)), self.mesh.tokens.size
        if ranks == 1:
            return 1.0 / max(1.0, labels)
        total = torch.full((), labels, dtype=torch.float64, device=self.mesh.device)
        return ranks / (self.mesh.tokens.sum(total) / self.mesh.context.size).clamp(min=1.0)

    def _run(self, batch: Batch, scale: float | torch.Tensor) -> tuple[LossSum, _Check, HeldRows]:
        """Run ``batch`` forward, and backward to the rows of sharded tables.

        Returns:
            The loss, whether it is finite, and the rows.
        """

        def compute(found: Rows, own: Any) -> tuple[torch.Tensor, tuple[LossSum, _Check, HeldRows]]:
            held = self.parallel.tables.hold(found)
            loss = (self.graphs or self.model.loss)(held.rows, own)
            return loss.total * scale, (loss, _Check(self.mesh, loss.total), held)

        if self.pipeline is not None:
            result: tuple[LossSum, _Check, HeldRows] = self.pipeline.run(batch, compute)
            return result
        request = self.model.request(batch.to(self.mesh.device, non_blocking=True))
        scaled, result = compute(self.model.embeddings(request.features), request)
        scaled.backward()
        return result

    def _refuse(self, batch: Batch, broken: bool, progress: Progress) -> None:
        """Stop, or say that the step is left out; all ranks agree, for they sum the same facts."""
        rows = self.mesh.tokens.gather(batch.users if broken else batch.users[:0])
        users = self.mesh.on_main(lambda: self._original_users(rows))
        logger.debug("step %d: users of batches whose loss is not finite: %s", progress.step + 1, ", ".join(users))
        more = f" and {len(users) - _NAMED_USERS} more in train.log" if len(users) > _NAMED_USERS else ""
        where = f"; users of the batch: {', '.join(users[:_NAMED_USERS])}{more}"
        error = not_finite("the loss", progress.step + 1, self.config, progress.dense_steps, where)
        self.skipped_in_a_row += 1
        if self.config.trainer.nonfinite_loss == "stop" or self.skipped_in_a_row > _MOST_SKIPPED:
            raise error
        logger.warning("%s; the step is skipped", error)
        self.meter.skipped += 1

    def _original_users(self, rows: torch.Tensor) -> list[str]:
        originals = self.dataset.vocabulary(self.dataset.schema.user.name)
        return [str(originals[row]) for row in dict.fromkeys(rows.tolist()) if row >= 0]


class _Check:
    """Whether the losses of all ranks are finite, on its way to the host.

    Args:
        mesh: The ranks, each of which makes one at once.
        loss: Of this rank, a scalar.
    """

    def __init__(self, mesh: Mesh, loss: torch.Tensor) -> None:
        facts = (loss.detach() * 0.0 != 0.0).double().repeat(2)  # of all ranks, and of this one
        mesh.world.sum(facts[0])
        self.facts, self.arrived = facts, None
        if facts.is_cuda:
            self.facts = torch.empty(2, dtype=facts.dtype, pin_memory=True).copy_(facts, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> bool | None:
        """Return None if all losses are finite, else whether this rank's is not."""
        if self.arrived is not None:
            self.arrived.synchronize()
        every, own = self.facts.tolist()
        return bool(own) if every else None
