"""Knobs of ranking: what is predicted of a candidate, by which head, and how it is scored."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hstu.config.base import UNSET, Args

TASK_KINDS = ("binary", "multiclass", "regression")
_CLASSES = ("binary", "multiclass")
METRIC_KINDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("AUC", "GAUC", "NE", "LOGLOSS", "ACCURACY"), _CLASSES),
    **dict.fromkeys(("RMSE", "MAE", "SPEARMAN"), ("regression",)),
}
"""Metric of a ranking -> kinds of tasks that it is for."""


@dataclass(frozen=True, kw_only=True)
class RankingArgs(Args):
    """The ranking head: an MLP whose last width says what is predicted.

    Without ``tasks``, with ``num_tasks`` equal to the last width each output is one binary task that reads one bit of
    the action; with ``num_tasks = 1`` and a wider output it is one softmax over action classes.
    """

    #: Widths of the MLP, the last one that of its outputs.
    prediction_head_arch: tuple[int, ...]
    #: Between its layers.
    prediction_head_act_type: Literal["relu", "gelu"] = "relu"
    #: Whether its layers have a bias.
    prediction_head_bias: bool = True
    #: Binary tasks; 1 with a wider output: one softmax.
    num_tasks: int = 1
    #: (name, kind, what) of each task, as ("click", "binary", "action:click"). Kinds: "binary", of a bit of an action
    #: (by name or number), an action or a category of two values, or a number above zero or not; "multiclass", of an
    #: action or a category; "regression", of a number. What: the action or an event feature. The last width of the
    #: head is then the sum of their outputs: one, or one for each class.
    tasks: tuple[tuple[str, ...], ...] = ()
    #: By name of a task; others weigh 1.
    task_weights: dict[str, float] = field(default_factory=dict)
    #: Of regression, in standard deviations of the number; "huber" is linear beyond one of them.
    regression_loss: Literal["squared", "huber"] = "squared"
    #: Of tasks of classes AUC, GAUC, NE, LOGLOSS, ACCURACY, of regression RMSE, MAE, SPEARMAN: the mean over tasks and
    #: each of them, or with "/task" behind it that task's alone. None: AUC, or RMSE if all tasks are regression.
    eval_metrics: tuple[str, ...] = UNSET

    limits: ClassVar = {
        "prediction_head_arch": (1, 2**17),
        "num_tasks": (1, 2**17),
        "task_weights": (0, 1e9),
    }

    def resolve(self) -> None:
        kinds = {task[1] for task in self.tasks if len(task) == 3} or {"binary"}
        self.default(eval_metrics=("RMSE",) if kinds == {"regression"} else ("AUC",))
        metrics = (metric.partition("/") for metric in self.eval_metrics)
        object.__setattr__(self, "eval_metrics", tuple(name.upper() + slash + task for name, slash, task in metrics))

    def validate(self) -> None:
        if not self.prediction_head_arch:
            raise self.error("prediction_head_arch", "must list at least one positive width")
        if self.num_tasks not in (1, self.prediction_head_arch[-1]):
            raise self.error("num_tasks", "must be 1 (one softmax) or the last width of prediction_head_arch")
        self._validate_tasks()
        for metric in self.eval_metrics:
            self._validate_metric(metric)
        if not self.eval_metrics:
            raise self.error("eval_metrics", "must name at least one metric")

    def _validate_tasks(self) -> None:
        if self.tasks and self.num_tasks != 1:
            raise self.error("num_tasks", "is told by RankingArgs.tasks; leave it out")
        for task in self.tasks:
            if len(task) != 3 or task[1] not in TASK_KINDS or not re.fullmatch(r"\w[\w.\- ]*", task[0]):
                raise self.error("tasks", f"{task!r} must be (name, kind, what), of a kind of {', '.join(TASK_KINDS)}, "
                                 "as ('click', 'binary', 'action:click')")  # fmt: skip
        names = [task[0] for task in self.tasks]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise self.error("tasks", f"name {min(repeated)!r} twice; give each its own")
        if unknown := set(self.task_weights) - set(names):
            raise self.error("task_weights", f"no task {min(unknown)!r}; tasks: {', '.join(names) or 'none'}")
        if self.task_weights and not any(self.task_weights.get(name, 1.0) for name in names):
            raise self.error("task_weights", "leave no task with a loss; use a number above zero")
        if self.regression_loss != "squared" and all(task[1] != "regression" for task in self.tasks):
            raise self.error("regression_loss", "is for a task of kind 'regression'; leave it out")

    def _validate_metric(self, metric: str) -> None:
        name, _, task = metric.partition("/")
        kinds = {own: kind for own, kind, _ in self.tasks} or {"": "binary"}
        if name not in METRIC_KINDS:
            raise self.error("eval_metrics", f"must be some of {', '.join(METRIC_KINDS)}")
        if task and task not in kinds:
            raise self.error("eval_metrics", f"{metric!r}: no task {task!r}; tasks: {', '.join(filter(None, kinds))}")
        if not any(kind in METRIC_KINDS[name] for own, kind in kinds.items() if task in ("", own)):
            raise self.error("eval_metrics", f"{metric!r}: is for tasks of kind {' or '.join(METRIC_KINDS[name])}")

    @property
    def is_multiclass(self) -> bool:
        """Whether the head is one softmax over actions rather than binary tasks, or those of ``tasks``."""
        return not self.tasks and self.num_tasks == 1 and self.prediction_head_arch[-1] > 1
