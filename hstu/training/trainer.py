"""The one trainer: steps, log lines, validation, checkpoints, and the test score of the best of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hstu.config import Config, ConfigError
from hstu.data.reader import SequenceDataset
from hstu.interrupt import Stopped, patience
from hstu.parallel import Mesh
from hstu.quiet import warn_only
from hstu.training.assembly import Assembly
from hstu.training.checkpoint import Checkpointer
from hstu.training.checkpoint_files import Progress, find_checkpoint, read_marker, supersede
from hstu.training.evaluate import improves
from hstu.training.file_errors import describe, is_foreseeable
from hstu.training.hardware import present_peak
from hstu.training.init_from import in_words, initialize, open_source
from hstu.training.logging import RunLogger, SilentLogger, format_metrics, make_logger
from hstu.training.met import met_there, read_met
from hstu.training.meter import Meter, TrainingError, not_finite
from hstu.training.optimizer import Optimizer
from hstu.training.plot import draw_curves, sketch_curves
from hstu.training.profile import profiler
from hstu.training.run_directory import RunDirectory
from hstu.training.step import Stepper
from hstu.training.summary import describe_data, describe_plan, describe_unmet, memory_table
from hstu.training.vocabularies import keep_vocabularies, require_same_vocabularies
from hstu.training.watchdog import beat, keep_stacks, watchdog

logger = logging.getLogger(__name__)


class Trainer:
    """Trains and evaluates one model on one data set.

    Args:
        config: The run.
        dataset: The data.
        mesh: The ranks.
        run: Where results go.

    Attributes:
        config: The run as these devices compute it.
        notes: Lines about what was asked for and is computed otherwise.

    Raises:
        ConfigError: if config and data do not fit together.
    """

    def __init__(self, config: Config, dataset: SequenceDataset, mesh: Mesh, run: RunDirectory) -> None:
        self.assembly = assembly = Assembly(config, dataset, mesh)
        self.config = config = assembly.config
        self.notes, self.filtering, self.met = assembly.notes, assembly.filtering, assembly.met
        self.dataset, self.mesh, self.run, self.loaders = dataset, assembly.mesh, run, assembly.loaders
        self.parallel, self.model = assembly.parallel, assembly.model
        self.progress, self.resumed_at = Progress(), -1  # the last step whose checkpoints here are this run's
        self.started_from: dict[str, Any] | None = None
        self.total_steps = self._total_steps()
        self.optimizer = Optimizer(self.parallel, config.optimizer, self.total_steps)
        self.checkpointer = Checkpointer(
            run.checkpoints,
            self.parallel,
            self.optimizer,
            assembly.identity,
            assembly.vocabularies,
            config.trainer.keep_last_checkpoints,
            assembly.every_met,
        )
        self.meter = Meter(self.mesh, present_peak(config.network.dtype_str))
        self.stepper = Stepper(self.parallel, self.optimizer, self.meter, config, dataset)
        if self.stepper.note is not None:
            self.notes = (*self.notes, self.stepper.note)
        self.mesh.set_timeout(2 * config.trainer.hang_timeout_seconds)  # the watchdog speaks first
        torch.manual_seed(config.trainer.seed + self.mesh.tokens.rank)  # ranks with the same tokens drop the same

    def resume(self, checkpoint: Path) -> None:
        """Go on from ``checkpoint``, as if training had never stopped. Nothing is written yet.

        Raises:
            CheckpointError: if it cannot be loaded.
            ConfigError: if it is another run's, and that has taken all the steps of this one.
        """
        self._require_same_vocabularies(checkpoint, resume=True)
        self.progress = self.checkpointer.load(checkpoint)
        self.assembly.also_met(read_met(checkpoint))
        self.resumed_at = self.progress.step
        self._keep_position()
        self.meter.restore(self.progress.since_last_line)
        if checkpoint.resolve().parent != self.run.checkpoints.resolve():
            if self.progress.step >= self.total_steps:
                raise ConfigError("--checkpoint", f"= {str(checkpoint)!r}: has taken {self.progress.step} steps of "
                                  f"{self.total_steps}; raise TrainerArgs.max_train_iters or max_epochs")  # fmt: skip
            self.resumed_at = -1
            # The best of another run is not here to be tested.
            fresh = dict(best_score=None, best_step=None, evaluations_since_best=0, stopped_early=False, records=0)
            self.progress = replace(self.progress, **fresh)  # type: ignore[arg-type]

    def start_from(self, checkpoint: Path) -> None:
        """Start with the weights and the optimizer state of another run, see ``TrainerArgs.init_from``.

        Raises:
            CheckpointError: if it is of another model, or does not say what its ids stand for.
        """
        own, here = self.checkpointer, self.dataset.vocabularies
        source = open_source(checkpoint, self.mesh, own.identity, here, own.vocabularies)
        self.progress, self.started_from = initialize(source, self.parallel, self.optimizer, own.identity)
        there = source.marker["vocabularies"]
        self.assembly.also_met(met_there(source.path, source.ids, self.assembly.tables_of, there, own.vocabularies))

    def train(self) -> dict[str, Any]:
        """Train to the end, then score the best checkpoint on the test split once.

        Returns:
            The test record.

        Raises:
            Stopped: if a signal asked for it; the state is saved.
            TrainingError: if the loss is not finite or there are no negatives; the last checkpoint stays.
        """
        logger.info("%s\n%s", describe_data(self.dataset, self.config), memory_table(self.parallel, self.optimizer))
        plan = describe_plan(self.mesh, self.loaders["train"], self.total_steps)
        logger.info("\n".join([f"{plan}; run directory {self.run.path}", *describe_unmet(self.met), *self.notes]))
        if self.config.retrieval is not None:
            logger.info("RetrievalArgs.filter_seen = %s: %s", self.config.retrieval.filter_seen, self.filtering)
        self._rewind()
        started_from = self.started_from
        if self.progress.step == 0 and started_from is None:
            self.assembly.start_rows()
        if started_from is not None:
            logger.info(in_words(started_from))
            self.mesh.on_main(lambda: self.run.append({"kind": "init", "step": 0, **started_from}))
        here, record = self.dataset.vocabularies, self.checkpointer.vocabularies
        self.mesh.on_main(lambda: keep_vocabularies(here, record, self.run.path))
        self.assembly.keep_text_model(self.run.path)
        seconds, stacks = self.config.trainer.hang_timeout_seconds, self.run.path / "stacks"
        self.mesh.on_main(lambda: keep_stacks(stacks))
        with (
            patience(lambda: f"stopped in the middle of something; {self.run.kept()}", self.checkpointer.busy),
            watchdog(stacks, self.mesh.rank, seconds),
            self.checkpointer,  # whose writer may hang as well
            make_logger(self.mesh, self.run, self.config, self.progress.step, self.total_steps) as log,
        ):
            outcome = self._to_the_end(log)
            if not isinstance(outcome, Stopped):
                self.mesh.on_main(lambda: self._draw(outcome))  # a signal comes too late to stop the run
        if isinstance(outcome, Stopped):
            raise outcome
        return outcome

    def _to_the_end(self, log: RunLogger | SilentLogger) -> dict[str, Any] | Stopped:
        """Train and test; returns the test record, or the signal that came first."""
        outcome: dict[str, Any] | Stopped
        try:
            self.model.train()
            with profiler(self.config.trainer, self.run.path, self.progress.step, self.mesh.rank) as profile:
                self._loop(log, profile)
            self.checkpointer.wait()
            beat()
            outcome = self._test(log)
        except Stopped as stopped:
            self.checkpointer.wait()
            beat()
            logger.info("stopped at step %d, saved; go on with --run-dir %s", self.progress.step, self.run.whole)
            stopped.told, outcome = True, stopped
        except OSError as error:
            if not is_foreseeable(error):
                raise
            raise TrainingError(f"{describe(error)}; {self.run.kept()}") from error
        return outcome

    def evaluate(self, checkpoint: Path, splits: tuple[str, ...] = ("valid", "test")) -> list[dict[str, Any]]:
        """Score ``checkpoint``; returns one record per split."""
        self._require_same_vocabularies(checkpoint, resume=False)
        step = self.checkpointer.load(checkpoint, optimizer=False).step
        self.assembly.also_met(read_met(checkpoint))
        beat()
        return [self.assembly.score(split, step) for split in splits]

    def _require_same_vocabularies(self, checkpoint: Path, *, resume: bool) -> None:
        here = self.dataset.vocabularies
        self.mesh.on_main(lambda: require_same_vocabularies(checkpoint, read_marker(checkpoint), here, resume=resume))

    def _rewind(self) -> None:
        """Drop what a run that goes on from here will write again."""
        progress, checkpoints = self.progress, self.run.checkpoints
        self.mesh.on_main(lambda: self.run.rewind(progress, evaluated=not self._owes_evaluation()))
        if not self.mesh.on_main(lambda: supersede(checkpoints, progress, after=self.resumed_at)):
            progress.best_score = progress.best_step = None  # its checkpoint is gone: the search starts anew
        self.mesh.on_main(self.run.begin)

    def _loop(self, log: RunLogger | SilentLogger, profile: Any) -> None:
        """Take steps until the end, or until a signal raises ``Stopped``, with the state being saved."""
        args, progress, loader = self.config.trainer, self.progress, self.loaders["train"]
        size = len(loader.split)
        self.meter.start()
        if self._owes_evaluation():  # the run was stopped in it
            self._after_step(log)
        while progress.step < self.total_steps and not progress.stopped_early:
            epoch, first = divmod(progress.samples, size)
            batches = self.meter.waiting(loader.epoch(epoch, first))
            for step_batches in self.stepper.steps(batches, progress):
                beat()  # waiting for data has a time of its own
                rate = self.stepper.take(step_batches, progress)
                progress.samples = loader.after(progress.samples)
                beat()
                profile.step()
                log.tick()
                done = progress.step == self.total_steps
                if (progress.step % args.log_interval == 0 or done) and self.meter.batches:
                    log.train(self._train_record(epoch, rate))
                self._after_step(log)
                if done or progress.stopped_early:
                    break
                try:
                    self.mesh.obey_signals()
                except Stopped:
                    self._save()
                    raise

    def _owes_evaluation(self) -> bool:
        """Return whether the weights as they are now are to be validated and have not been."""
        progress = self.progress
        due = progress.step % self.config.trainer.eval_interval == 0 or progress.step == self.total_steps
        return due and progress.evaluated_step != progress.step > 0

    def _after_step(self, log: RunLogger | SilentLogger) -> None:
        """Validate and save when it is time to; saved first, for an evaluation may take long."""
        interval, progress = self.config.trainer.ckpt_save_interval, self.progress
        owes = self._owes_evaluation()
        with self.meter.paused():
            if owes or (interval != -1 and progress.step % interval == 0):
                self._save()
            if owes:
                record = self.assembly.score("valid", progress.step)
                best = self._note(record)
                log.evaluation(record, "  (best so far)" if best else "")
                progress.records = self.mesh.world.broadcast(self.run.num_records)
                self.checkpointer.amend(progress, best=best)

    def _note(self, record: dict[str, Any]) -> bool:
        """Keep the best validation score; returns whether this is it."""
        name, progress = self.config.eval_metrics[0], self.progress
        progress.evaluated_step = progress.step
        if improves(name, record["metrics"][name], progress.best_score):
            progress.best_score, progress.best_step = record["metrics"][name], progress.step
            progress.evaluations_since_best = 0
            return True
        progress.evaluations_since_best += 1
        patience = self.config.trainer.early_stopping_patience
        if patience and progress.evaluations_since_best >= patience:
            progress.stopped_early = True
            logger.info("no better %s in %d evaluations: training stops early", name, patience)
        return False

    def _save(self) -> None:
        self.progress.since_last_line = self.meter.state()
        self.progress.records = self.mesh.world.broadcast(self.run.num_records)
        # A finite loss says nothing of the step that came after it.
        if self.mesh.world.any(not all(bool(p.isfinite().all()) for p in self.model.parameters())):
            raise not_finite("a weight", self.progress.step, self.config, self.progress.dense_steps)
        self.checkpointer.save(self.progress)
        beat()

    def _test(self, log: RunLogger | SilentLogger) -> dict[str, Any]:
        """Score the best checkpoint on the test split, once."""
        name = self.config.eval_metrics[0]
        checkpoint = self.mesh.world.broadcast(find_checkpoint(self.run.checkpoints, "best"))
        if checkpoint is None:  # no validation score was a number
            checkpoint = self.mesh.world.broadcast(find_checkpoint(self.run.checkpoints, "latest"))
        (record,) = self.evaluate(checkpoint, ("test",))
        best = "best validation %s at step %d; its test score:"
        undefined = "validation %s is undefined, so that there is no best step; the test score of the last one, %d:"
        logger.info(undefined if self.progress.best_step is None else best, name, record["step"])
        log.evaluation(record)
        if record.get("best_possible"):
            logger.info("best possible on this data:    %s", format_metrics(record["best_possible"]))
        self.mesh.on_main(lambda: self.run.write_json("eval.json", record))
        return record

    def _train_record(self, epoch: int, rate: float) -> dict[str, Any]:
        return {
            "kind": "train",
            "step": self.progress.step,
            "epoch": epoch,
            "lr": rate,
            **self.meter.read(self.progress.step),
            **self.parallel.tables.counters(),
        }

    def _draw(self, record: dict[str, Any]) -> None:
        names, path = self.config.eval_metrics, self.run.figures / "curves.png"
        best = (record.get("best_possible") or {}).get(names[0])
        with warn_only("no sketch of the curves"):
            logger.info("%s", sketch_curves(self.run.records(), names[0], best))
        with warn_only(f"{path} was not drawn"):
            draw_curves(self.run.records(), names, record, path)
            logger.info("curves: %s", path)
        logger.info("result: %s", self.run.path / "eval.json")

    def _total_steps(self) -> int:
        """Return the steps at the end: those taken, and those that the rest of the last epoch needs."""
        args, loader, progress = self.config.trainer, self.loaders["train"], self.progress
        if loader.steps_per_epoch == 0:
            raise self.config.dataset.error("drop_last", f"{len(loader.split)} training samples are less than a global "
                                            f"batch of {loader.global_batch_size}; lower TrainerArgs.train_batch_size "
                                            "or set it to False")  # fmt: skip
        limits = [args.max_train_iters]
        if args.max_epochs is not None:
            epoch, first = divmod(progress.samples, len(loader.split))
            limits.append(
                progress.step + loader.steps_from(first) + (args.max_epochs - epoch - 1) * loader.steps_per_epoch
            )
        return min(limit for limit in limits if limit is not None)

    def _keep_position(self) -> None:
        """Go on at the sample where the checkpoint stopped, though batches may be of another size now."""
        progress, loader = self.progress, self.loaders["train"]
        progress.samples = loader.skip_dropped(progress.samples)
        self.total_steps = self.optimizer.total_steps = self._total_steps()
        epoch, first = divmod(progress.samples, len(loader.split))
        if progress.step != epoch * loader.steps_per_epoch + -(-first // loader.global_batch_size):
            logger.info(
                "the global batch was of another size: goes on at sample %d of epoch %d with %d samples a step, "
                "%d steps in all",
                first, epoch, loader.global_batch_size, self.total_steps,
            )  # fmt: skip
