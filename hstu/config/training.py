"""Knobs of training: how long, how often, and both optimizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hstu.config.base import STEPS, UNSET, Args


@dataclass(frozen=True, kw_only=True)
class TrainerArgs(Args):
    """How long to train, and how often to log, evaluate and save.

    ``train_batch_size`` and ``eval_batch_size`` count sequences per rank. Training ends after
    ``max_train_iters`` steps or ``max_epochs`` epochs, whichever is first; with neither, after one epoch.

    A step takes ``gradient_accumulation_steps`` batches of ``train_batch_size`` one after another. Dense weights
    then step once, as for one large batch; tables step after each batch, and in-batch negatives are those of
    one batch.
    """

    #: Sequences of a training batch, per rank.
    train_batch_size: int
    #: Sequences of a batch of evaluation and prediction, per rank.
    eval_batch_size: int
    #: Steps between validations.
    eval_interval: int = 100
    #: Steps between lines of metrics.jsonl and of the terminal.
    log_interval: int = 100
    #: Steps of the run; None: max_epochs alone ends it.
    max_train_iters: int | None = None
    #: Epochs of the run; None: one, if max_train_iters is None too.
    max_epochs: int | None = None
    #: Batches of a step.
    gradient_accumulation_steps: int = 1
    #: Batches of an evaluation; None: all of them.
    max_eval_iters: int | None = None
    #: Of initial weights, the order of samples, dropout and negatives.
    seed: int = 1234
    #: Another run, or one of its checkpoints, whose weights and optimizer state a new run starts from; rows of tables
    #: are matched by original ids. Of a run its best checkpoint is taken, else its latest.
    init_from: str | None = None
    #: Evaluations without a better validation score before training stops; 0 never stops early.
    early_stopping_patience: int = 0
    #: Steps between checkpoints; -1 saves only the best and the last one.
    ckpt_save_interval: int = -1
    #: The most recent checkpoints that stay, beside the best one.
    keep_last_checkpoints: int = 2
    #: "native": the next batch is copied and its ids travel to the tables while this one is computed; same losses.
    pipeline_type: Literal["none", "native"] = "none"
    #: "auto": on a GPU the dense part of a step, forward and backward, is recorded as CUDA graphs, one for each of some
    #: sizes of batches, and replayed, where the model allows; same losses, less of the host's time.
    cuda_graphs: Literal["auto", "off"] = "off"
    #: Deal the samples of a global batch to ranks by predicted work, not by count; losses stay the same.
    enable_balanced_shuffler: bool = True
    #: Write report.html into the run directory at the end, see python -m hstu.cli.report.
    report: bool = True
    #: Where curves go beside metrics.jsonl: "tensorboard", "wandb".
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    #: "wandb": the project of the run; the entity is that of the login, or WANDB_ENTITY.
    wandb_project: str = "hstu"
    #: "wandb": the group of the run, as all seeds of one config.
    wandb_group: str | None = None
    #: A loss that is not a number: "stop" the run, or "skip" the step, which then moves no weight or moment; the
    #: eleventh in a row stops the run.
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    #: A rank that takes longer than this for a step, an evaluation batch or a save ends the job.
    hang_timeout_seconds: float = 1800.0
    #: Write a Chrome trace of each rank.
    profile: bool = False
    #: The first step of the trace, from 0 over the whole run.
    profile_step_start: int = 100
    #: The step before which the trace ends.
    profile_step_end: int = 200

    limits: ClassVar = {
        **dict.fromkeys(("train_batch_size", "eval_batch_size", "gradient_accumulation_steps"), (1, 2**24)),
        **dict.fromkeys(
            ("eval_interval", "log_interval", "max_train_iters", "max_epochs", "max_eval_iters"), (1, STEPS)
        ),
        **dict.fromkeys(("profile_step_start", "profile_step_end"), (0, STEPS)),
        "ckpt_save_interval": (-1, STEPS),
        **dict.fromkeys(("seed", "early_stopping_patience"), (0, 2**31 - 1)),
        "keep_last_checkpoints": (1, 10**6),
        "hang_timeout_seconds": (1e-3, 1e7),
    }

    def resolve(self) -> None:
        if self.max_train_iters is None:
            self.default(max_epochs=1)

    def validate(self) -> None:
        if self.init_from is not None and not self.init_from.strip():
            raise self.error("init_from", "must name a run directory or a checkpoint; use None to start afresh")
        if self.nonfinite_loss == "skip" and self.gradient_accumulation_steps > 1:
            raise self.error("nonfinite_loss", "tables have stepped on the batches before; use 'stop', or "
                             "TrainerArgs.gradient_accumulation_steps = 1")  # fmt: skip
        if self.ckpt_save_interval != -1:
            self.require_positive("ckpt_save_interval")
        if self.profile and not 0 <= self.profile_step_start < self.profile_step_end:
            raise self.error("profile_step_end", "must be above TrainerArgs.profile_step_start")


@dataclass(frozen=True, kw_only=True)
class OptimizerArgs(Args):
    """The optimizer of the dense weights and the one fused into the tables' backward pass.

    Tables step by themselves after each batch, so ``clip_grad`` (global norm, 0: off) and ``weight_decay`` are
    those of the dense weights alone. ``sparse_*`` fields that are not set follow the dense ones, a minimum rate in
    proportion to the peak. Replicated tables are dense weights that follow the tables' rate and schedule.
    """

    #: Of the dense weights.
    optimizer_str: Literal["adam", "adamw", "sgd"]
    #: Peak rate of the dense weights.
    learning_rate: float
    #: Decay of the mean of gradients (adam, adamw), of tables too.
    adam_beta1: float = 0.9
    #: Decay of the mean of their squares.
    adam_beta2: float = 0.999
    #: Added to the root of that mean.
    adam_eps: float = 1e-8
    #: Momentum of the dense weights (sgd).
    sgd_momentum: float = 0.0
    #: Of the dense weights: "adamw" takes it off the weight, the others add it to the gradient.
    weight_decay: float = 0.0
    #: Bound of the global norm of dense gradients; 0: off.
    clip_grad: float = 0.0
    #: Steps of a linear rise to the peak.
    warmup_steps: int = 0
    #: Of the rate after that, down to min_learning_rate at the last step.
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    #: Rate of the last step.
    min_learning_rate: float = 0.0
    #: Split the state of the dense optimizer over ranks (adam and adamw).
    use_distributed_optimizer: bool = False
    #: Prefixes of the names of dense weights that stay as they are, as "backbone.layers.0."; a run's dense weights are
    #: those that the command export names.
    freeze: tuple[str, ...] = ()
    #: Prefixes of the names of dense weights -> times the learning rate; of several that fit the longest counts.
    learning_rate_factors: dict[str, float] = field(default_factory=dict)
    #: Average dense gradients while the backward pass still runs.
    overlap_grad_reduce: bool = False
    #: Of the tables; None: the dense one's, "adam" for "adamw".
    sparse_optimizer_str: Literal["adam", "sgd", "adagrad", "rowwise_adagrad"] = UNSET
    #: Peak rate of the tables; None: the dense one.
    sparse_learning_rate: float = UNSET
    #: Likewise their warm-up.
    sparse_warmup_steps: int = UNSET
    #: Likewise their schedule.
    sparse_lr_schedule: Literal["constant", "linear", "cosine"] = UNSET
    #: Their last rate; None: in proportion to the peak.
    sparse_min_learning_rate: float = UNSET
    #: Clip each number of the gradient of a looked-up row to [-x, x], before those of one row are summed; 0: off.
    sparse_max_gradient: float = 0.0

    limits: ClassVar = {
        **dict.fromkeys(("learning_rate", "sparse_learning_rate"), (1e-30, 1e6)),
        **dict.fromkeys(("min_learning_rate", "sparse_min_learning_rate"), (0, 1e6)),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "sgd_momentum"), (0, 1)),
        **dict.fromkeys(("clip_grad", "sparse_max_gradient", "weight_decay"), (0, 1e9)),
        **dict.fromkeys(("warmup_steps", "sparse_warmup_steps"), (0, STEPS)),
        "learning_rate_factors": (0, 1e6),
        "adam_eps": (1e-20, 1),  # below, a float32 without a gradient is divided by zero
    }

    def resolve(self) -> None:
        self.default(
            sparse_optimizer_str="adam" if self.optimizer_str == "adamw" else self.optimizer_str,
            sparse_learning_rate=self.learning_rate,
            sparse_warmup_steps=self.warmup_steps,
            sparse_lr_schedule=self.lr_schedule,
        )
        if self.learning_rate > 0:
            share = self.min_learning_rate / self.learning_rate
            self.default(sparse_min_learning_rate=share * self.sparse_learning_rate)

    def validate(self) -> None:
        for name in ("adam_beta1", "adam_beta2", "sgd_momentum"):
            self.require_range(name, 0, 1)
        if self.use_distributed_optimizer and self.optimizer_str == "sgd":
            raise self.error("use_distributed_optimizer", "works with adam and adamw")
        if self.min_learning_rate > self.learning_rate:
            raise self.error("min_learning_rate", "must not be above OptimizerArgs.learning_rate")
        if self.sparse_min_learning_rate > self.sparse_learning_rate:
            raise self.error("sparse_min_learning_rate", "must not be above the peak learning rate of the tables")
