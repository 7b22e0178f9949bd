"""What a ranking head predicts: tasks of classes and of numbers, their labels, losses and predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.config import Config, ConfigError, RankingArgs
from hstu.data.schema import Feature, Schema
from hstu.models.losses import LossSum


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing that is predicted of each labelled event.

    Attributes:
        name: As metrics and predictions call it.
        kind: Binary and regression have one output, multiclass one for each class.
        feature: The action or event feature that is predicted.
        is_number: Whether that is a number rather than an id.
        outputs: Outputs of the head.
        bit: Binary: the bit of a mask that it reads; None: the whole value.
        classes: Ids of the feature; one beyond them is unknown.
        weight: Of its loss.
        loss: Of regression.
        mean: Of the number that regression predicts, else 0.
        std: Likewise, above zero, else 1.
    """

    name: str
    kind: Literal["binary", "multiclass", "regression"]
    feature: str
    is_number: bool = False
    outputs: int = 1
    bit: int | None = None
    classes: int = 2
    weight: float = 1.0
    loss: Literal["squared", "huber"] = "squared"
    mean: float = 0.0
    std: float = 1.0

    def labels(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the labels, classes or numbers, [L] float64; nan where they are unknown."""
        values = targets[self.feature]
        if self.is_number:
            values = values.reshape(-1).double()
            return values if self.kind == "regression" else torch.where(values.isnan(), values, (values > 0).double())
        labels = values if self.bit is None else values >> self.bit & 1
        return labels.double().masked_fill(values >= self.classes, torch.nan)

    def loss_of(self, outputs: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of ``outputs`` [L, outputs], summed over the events whose label is known."""
        labels = self.labels(targets)
        if self.kind == "multiclass":
            return F.cross_entropy(outputs, labels.nan_to_num(-100).long(), reduction="sum")
        found, known = outputs.squeeze(1), ~labels.isnan()
        wanted = ((labels.nan_to_num(self.mean) - self.mean) / self.std).to(found.dtype)
        if self.kind == "binary":
            losses = F.binary_cross_entropy_with_logits(found, wanted, reduction="none")
        else:
            losses = (F.mse_loss if self.loss == "squared" else F.huber_loss)(found, wanted, reduction="none")
        return torch.where(known, losses, 0.0).sum()

    def predict(self, outputs: Tensor) -> Tensor:
        """Turn outputs [L, outputs] into probabilities, or numbers of the feature's unit."""
        if self.kind == "regression":
            return outputs * self.std + self.mean
        return outputs.softmax(1) if self.kind == "multiclass" else outputs.sigmoid()


def ranking_loss(logits: Tensor, targets: Mapping[str, Tensor], tasks: tuple[Task, ...]) -> LossSum:
    """Sum over tasks and label tokens.

    Args:
        logits: [L, outputs of all tasks].
        targets: [L] of each feature that a task predicts.
        tasks: In the order of their outputs.
    """
    parts = logits.float().split([task.outputs for task in tasks], 1)
    losses = [task.weight * task.loss_of(part, targets) for task, part in zip(tasks, parts, strict=True)]
    return LossSum(total=torch.stack(losses).sum(), count=logits.shape[0])


def make_tasks(config: Config, schema: Schema) -> tuple[Task, ...]:
    """Return the tasks of ``config`` on data sets of ``schema``.

    Raises:
        ConfigError: if they, the head and the data set do not fit together.
    """
    assert config.ranking is not None
    args, outputs = config.ranking, config.ranking.prediction_head_arch[-1]
    if not args.tasks:
        return _of_actions(args, schema)
    tasks = tuple(_make_task(args, task, schema) for task in args.tasks)
    needed = sum(task.outputs for task in tasks)
    if outputs != needed:
        each = ", ".join(f"{task.name} {task.outputs}" for task in tasks)
        raise args.error("prediction_head_arch", f"the tasks have {needed} outputs ({each}); end with that")
    return tasks


def _of_actions(args: RankingArgs, schema: Schema) -> tuple[Task, ...]:
    """Return the tasks of ``num_tasks``: one softmax over actions, or one task for each bit."""
    action = schema.action
    if action is None:
        raise ConfigError("DatasetArgs.dataset_name", f"= {schema.name!r}: has no actions, so nothing can be ranked; "
                          "RankingArgs.tasks can predict other features")  # fmt: skip
    outputs, classes = args.prediction_head_arch[-1], action.vocab_size or 0
    if args.is_multiclass:
        if action.action_type == "bitmask":
            raise args.error(
                "num_tasks", f"{schema.name!r} has bit-mask actions; use num_tasks = {outputs}, one per bit"
            )
        if outputs < classes:
            raise args.error("prediction_head_arch", f"{schema.name!r} has {classes} classes of actions; end with that")
        return (Task(name=action.name, kind="multiclass", feature=action.name, outputs=outputs, classes=outputs),)
    if classes > 2**outputs:
        raise args.error("prediction_head_arch", f"{schema.name!r} has actions up to {classes - 1}, more than "
                         f"{outputs} binary task(s) can hold; end with {(classes - 1).bit_length()} tasks or "
                         f"{classes} classes and num_tasks = 1")  # fmt: skip
    names = [*(action.bits or ()), *map(str, range(len(action.bits or ()), outputs))][:outputs]
    return tuple(
        Task(name=name, kind="binary", feature=action.name, bit=bit, classes=2**outputs)
        for bit, name in enumerate(names)
    )


def _make_task(args: RankingArgs, given: tuple[str, ...], schema: Schema) -> Task:
    name, kind, what = given
    source, _, part = what.partition(":")
    feature = schema.action if source == "action" else _event_feature(args, given, source, schema)
    if feature is None:
        raise args.error("tasks", f"{given!r}: data set {schema.name!r} has no actions")
    is_number, size, bit = feature.kind == "numeric", feature.vocab_size or 0, None
    if (kind == "regression") != is_number and kind != "binary":
        raise args.error("tasks", f"{given!r}: {feature.name!r} is {'a number' if is_number else 'no number'}; "
                         f"use {'regression' if is_number else 'multiclass or binary'}")  # fmt: skip
    if feature.action_type == "bitmask":
        bit = _bit(args, given, part, feature)
    elif part:
        raise args.error("tasks", f"{given!r}: only actions that are bit masks have parts; leave out {':' + part!r}")
    elif kind == "binary" and not is_number and size != 2:
        raise args.error("tasks", f"{given!r}: {feature.name!r} has {size} values; use multiclass")
    known = feature.statistics if kind == "regression" else None
    return Task(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        feature=feature.name,
        is_number=is_number,
        outputs=size if kind == "multiclass" else 1,
        bit=bit,
        classes=size,
        weight=args.task_weights.get(name, 1.0),
        loss=args.regression_loss,
        mean=known.mean if known else 0.0,
        std=(known.std if known else 0.0) or 1.0,
    )


def _event_feature(args: RankingArgs, given: tuple[str, ...], name: str, schema: Schema) -> Feature:
    known = {feature.name: feature for feature in schema.of("event", "categorical", "numeric")}
    if schema.action is not None:
        known[schema.action.name] = schema.action
    if name not in known:
        raise args.error("tasks", f"{given!r}: data set {schema.name!r} has no action, number or category of events "
                         f"{name!r}; it has: {', '.join(known) or 'none'}")  # fmt: skip
    return known[name]


def _bit(args: RankingArgs, given: tuple[str, ...], part: str, action: Feature) -> int:
    bits = [*(action.bits or map(str, range((action.vocab_size or 1).bit_length() - 1)))]
    if given[1] != "binary" or part not in [*bits, *map(str, range(len(bits)))]:
        raise args.error("tasks", f"{given!r}: actions are bit masks, of which a binary task reads one bit, as "
                         f"'action:{bits[0]}'; bits: {', '.join(bits)}")  # fmt: skip
    return bits.index(part) if part in bits else int(part)
