"""Knobs of training: how long, how often, and both optimizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hstu.config.base import STEPS, UNSET, Args


@dataclass(frozen=True, kw_only=True)
class TrainerArgs(Args):
    """How long to train, and how often to log, evaluate and save.

    ``train_batch_size`` and ``eval_batch_size`` count sequences per rank. Training ends after
    ``max_train_iters`` steps or ``max_epochs`` epochs, whichever is first; with neither, after one epoch.

    A step takes ``gradient_accumulation_steps`` batches of ``train_batch_size`` one after another. Dense weights
    then step once, as for one large batch; tables step in each backward pass, and in-batch negatives are those of
    one batch.
    """

    train_batch_size: int
    eval_batch_size: int
    eval_interval: int = 100
    log_interval: int = 100
    max_train_iters: int | None = None
    max_epochs: int | None = None
    gradient_accumulation_steps: int = 1
    max_eval_iters: int | None = None
    seed: int = 1234
    #: Another run, or one of its checkpoints, whose weights and optimizer state a new run starts from; rows of tables
    #: are matched by original ids. Of a run its best checkpoint is taken, else its latest.
    init_from: str | None = None
    #: Evaluations without a better validation score before training stops; 0 never stops early.
    early_stopping_patience: int = 0
    #: Steps between checkpoints; -1 saves only the best and the last one.
    ckpt_save_interval: int = -1
    keep_last_checkpoints: int = 2
    #: "native": the next batch is copied and its ids travel to the tables while this one is computed; same losses.
    pipeline_type: Literal["none", "native"] = "none"
    #: Deal the samples of a global batch to ranks by predicted work, not by count; losses stay the same.
    enable_balanced_shuffler: bool = True
    #: Write report.html into the run directory at the end, see python -m hstu.cli.report.
    report: bool = True
    #: Where curves go beside metrics.jsonl: "tensorboard", "wandb".
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    #: "wandb": the project of the run and the group that it belongs to; the entity is that of the login, or
    #: WANDB_ENTITY.
    wandb_project: str = "hstu"
    wandb_group: str | None = None
    #: A loss that is not a number: "stop" the run, or "skip" the step, which then moves no weight or moment; the
    #: eleventh in a row stops the run.
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    #: A rank that takes longer than this for a step, an evaluation batch or a save ends the job.
    hang_timeout_seconds: float = 1800.0
    profile: bool = False
    profile_step_start: int = 100
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

    Tables step inside the backward pass, so ``clip_grad`` (global norm, 0: off) and ``weight_decay`` are
    those of the dense weights alone. ``sparse_*`` fields that are not set follow the dense ones, a minimum rate in
    proportion to the peak. Replicated tables are dense weights that follow the tables' rate and schedule.
    """

    optimizer_str: Literal["adam", "adamw", "sgd"]
    learning_rate: float
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    sgd_momentum: float = 0.0
    weight_decay: float = 0.0
    clip_grad: float = 0.0
    warmup_steps: int = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    min_learning_rate: float = 0.0
    #: Split the state of the dense optimizer over ranks (adam and adamw).
    use_distributed_optimizer: bool = False
    #: Average dense gradients while the backward pass still runs.
    overlap_grad_reduce: bool = False
    sparse_optimizer_str: Literal["adam", "sgd", "adagrad", "rowwise_adagrad"] = UNSET
    sparse_learning_rate: float = UNSET
    sparse_warmup_steps: int = UNSET
    sparse_lr_schedule: Literal["constant", "linear", "cosine"] = UNSET
    sparse_min_learning_rate: float = UNSET
    #: Clip each number of the gradient of a looked-up row to [-x, x], before those of one row are summed; 0: off.
    sparse_max_gradient: float = 0.0

    limits: ClassVar = {
        **dict.fromkeys(("learning_rate", "sparse_learning_rate"), (1e-30, 1e6)),
        **dict.fromkeys(("min_learning_rate", "sparse_min_learning_rate"), (0, 1e6)),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "sgd_momentum"), (0, 1)),
        **dict.fromkeys(("clip_grad", "sparse_max_gradient", "weight_decay"), (0, 1e9)),
        **dict.fromkeys(("warmup_steps", "sparse_warmup_steps"), (0, STEPS)),
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
