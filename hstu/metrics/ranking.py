"""AUC, GAUC, normalised entropy, log loss and accuracy, exact in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LOWER_IS_BETTER = frozenset({"NE", "LOGLOSS"})


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
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
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


def ranking_scores(
    names: tuple[str, ...],
    probabilities: np.ndarray,
    labels: np.ndarray,
    users: np.ndarray,
    *,
    multiclass: bool,
    tasks: tuple[str, ...] = (),
) -> RankingScores:
    """Compute metrics over all events.

    Args:
        names: Of AUC, GAUC, NE, LOGLOSS, ACCURACY.
        probabilities: [n, K]. Multiclass: of K classes, summing to one. Otherwise of K binary tasks.
        labels: [n] int64. Multiclass: the class. Otherwise task k reads bit k.
        users: [n].
        multiclass: Which of the two. AUC is the mean over classes against the rest, or over tasks; the
            other metrics of tasks are means too. With several tasks each also appears as ``NAME/task``.
        tasks: Names of the first binary tasks; the others are called by their numbers.
    """
    columns = probabilities.shape[1]
    if multiclass:
        binary = [(probabilities[:, k], (labels == k).astype(np.int64)) for k in range(columns)]
        whole = [(probabilities, labels)]
    else:
        binary = [(probabilities[:, k], labels >> k & 1) for k in range(columns)]
        whole = [(np.stack([1 - p, p], axis=1), y) for p, y in binary]
    metrics: dict[str, float] = {}
    left_out: dict[str, int] = {}
    pointwise: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "NE": normalized_entropy,
        "LOGLOSS": log_loss,
        "ACCURACY": accuracy,
    }
    for name in names:
        if name == "AUC":
            values = [auc(p, y) for p, y in binary]
            left_out[name] = int(np.isnan(values).sum())
        elif name == "GAUC":
            pairs = [gauc(p, y, users) for p, y in binary]
            values = [value for value, _ in pairs]
            left_out[name] = sum(count for _, count in pairs)
        else:
            values = [pointwise[name](p, y) for p, y in whole]
        known = [value for value in values if not np.isnan(value)]
        metrics[name] = float(np.mean(known)) if known else float("nan")
        if not multiclass and columns > 1:
            named = [*tasks, *range(len(tasks), columns)]
            metrics |= {f"{name}/{task}": value for task, value in zip(named, values, strict=False)}
    return RankingScores(metrics=metrics, left_out=left_out)
