"""AUC, GAUC, normalised entropy, log loss, accuracy and errors of numbers, exact in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hstu.config.ranking import METRIC_KINDS

_LOWER_IS_BETTER = frozenset({"NE", "LOGLOSS", "RMSE", "MAE"})


def lower_is_better(name: str) -> bool:
    """Return whether less of metric ``name``, maybe of one task, is better."""
    return name.partition("/")[0] in _LOWER_IS_BETTER


@dataclass(frozen=True, kw_only=True)
class RankingScores:
    """Metrics, and how many classes or users had only one label and were left out."""

    metrics: dict[str, float]
    left_out: dict[str, int]


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting half; nan with one label or a nan score.

    Args:
        scores: [n].
        labels: [n], 0 or 1.
    """
    positives = float(labels.sum())
    negatives = labels.size - positives
    if positives == 0 or negatives == 0 or np.isnan(scores).any():
        return float("nan")
    ranks = _mean_ranks(scores)
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> tuple[float, int]:
    """Mean AUC over users with both labels, weighted by their events; and the number of users left out."""
    order = np.argsort(users, kind="stable")
    bounds = np.flatnonzero(np.diff(users[order])) + 1
    total, weight, left_out = 0.0, 0, 0
    for rows in np.split(order, bounds) if users.size else []:
        value = auc(scores[rows], labels[rows])
        if np.isnan(value):
            left_out += 1
        else:
            total, weight = total + value * rows.size, weight + rows.size
    return (total / weight if weight else float("nan")), left_out


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy in nats of [n, classes] against class numbers [n]."""
    chosen = probabilities[np.arange(labels.size), labels]
    return float(-np.log(np.maximum(chosen, 1e-300)).mean()) if labels.size else float("nan")


def normalized_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Log loss over that of predicting the labels' frequencies (He et al., ADKDD 2014); nan if those are pure."""
    frequency = np.bincount(labels, minlength=probabilities.shape[1]) / max(1, labels.size)
    present = frequency[frequency > 0]
    entropy = float(-(present * np.log(present)).sum())
    return log_loss(probabilities, labels) / entropy if entropy > 0 else float("nan")


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Share of events whose likeliest class is the label."""
    return float((probabilities.argmax(1) == labels).mean()) if labels.size else float("nan")


def rmse(numbers: np.ndarray, labels: np.ndarray) -> float:
    """Root of the mean squared error of [n] against [n]."""
    return math.sqrt(float(np.square(numbers - labels).mean())) if labels.size else float("nan")


def mae(numbers: np.ndarray, labels: np.ndarray) -> float:
    """Mean absolute error of [n] against [n]."""
    return float(np.abs(numbers - labels).mean()) if labels.size else float("nan")


def spearman(numbers: np.ndarray, labels: np.ndarray) -> float:
    """Correlation of the ranks of [n] and [n], equal ones sharing their mean; nan where all of one are equal."""
    if labels.size == 0 or np.isnan(numbers).any():
        return float("nan")
    x, y = (ranks - ranks.mean() for ranks in (_mean_ranks(numbers), _mean_ranks(labels)))
    norm = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / norm if norm > 0 else float("nan")


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each of ``values`` [n] from 1, equal ones sharing their mean, float64."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What one task predicted of n events, and what came.

    Attributes:
        name: Of the task.
        kind: Of the task.
        values: [n, K]: probabilities of K classes, or with K = 1 of the binary label 1, or numbers.
        labels: [n]: the class, 0 or 1, or the number.
        users: [n].
    """

    name: str
    kind: Literal["binary", "multiclass", "regression"]
    values: np.ndarray
    labels: np.ndarray
    users: np.ndarray

    def score(self, metric: str) -> tuple[float, int]:
        """Return a metric, nan where it is not defined, and how many classes or users it leaves out."""
        if self.kind == "regression":
            return {"RMSE": rmse, "MAE": mae, "SPEARMAN": spearman}[metric](self.values[:, 0], self.labels), 0
        p, y = self.values, self.labels
        if metric in ("AUC", "GAUC"):
            one = [(p[:, 0], y)] if self.kind == "binary" else [(p[:, k], (y == k) * 1) for k in range(p.shape[1])]
            if metric == "AUC":
                values = [auc(scores, labels) for scores, labels in one]
                return _mean_of_known(values), int(np.isnan(values).sum())
            pairs = [gauc(scores, labels, self.users) for scores, labels in one]
            return _mean_of_known([value for value, _ in pairs]), sum(count for _, count in pairs)
        whole = np.concatenate([1 - p, p], axis=1) if self.kind == "binary" else p
        return {"NE": normalized_entropy, "LOGLOSS": log_loss, "ACCURACY": accuracy}[metric](whole, y), 0


def ranking_scores(names: tuple[str, ...], tasks: Sequence[Predicted]) -> RankingScores:
    """Compute metrics over all events.

    Args:
        names: Of the metrics: each is the mean over the tasks it is for, and with several tasks also appears as
            ``NAME/task``; the name of a task behind it, as in ``AUC/click``, asks for that one alone. AUC and GAUC of
            a softmax are means over classes against the rest.
        tasks: What was predicted.
    """
    metrics: dict[str, float] = {}
    left_out: dict[str, int] = {}
    for name in names:
        metric, _, wanted = name.partition("/")
        fitting = [task for task in tasks if task.kind in METRIC_KINDS[metric] and wanted in ("", task.name)]
        found = {task.name: task.score(metric) for task in fitting}
        metrics[name] = _mean_of_known([value for value, _ in found.values()])
        if metric in ("AUC", "GAUC"):
            left_out[name] = sum(count for _, count in found.values())
        if not wanted and len(tasks) > 1:
            metrics |= {f"{metric}/{task}": value for task, (value, _) in found.items()}
    return RankingScores(metrics=metrics, left_out=left_out)


def _mean_of_known(values: list[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
