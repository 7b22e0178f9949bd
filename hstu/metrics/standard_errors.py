"""How far a metric would be from itself on other users of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

_GROUPS = 20


def of_mean(values: np.ndarray, users: np.ndarray) -> float:
    """Return the standard error of the mean of ``values``, of which those of one user are not independent.

    Args:
        values: [n].
        users: [n], whose each is.

    Returns:
        sqrt(sum over users of (sum of their values - mean)^2) / n, nan with less than two users: with one value a user
        the deviation over sqrt(n).
    """
    _, owner = np.unique(users, return_inverse=True)
    if owner.size == 0 or owner.max() == 0:
        return float("nan")
    residuals = np.bincount(owner, weights=values - values.mean())
    return math.sqrt(float(np.square(residuals).sum())) / values.size


def by_jackknife(metrics: Callable[[np.ndarray], dict[str, float]], users: np.ndarray) -> dict[str, float]:
    """Return the standard error of any metrics, by leaving out a twentieth of the users at a time (Efron 1982, ch. 3).

    Args:
        metrics: Of the events where a mask [n] bool holds: name -> value.
        users: [n], whose each event is.

    Returns:
        Name -> sqrt((g - 1) / g * sum of squared deviations over g groups); nan where a group has no value, and with
        less than two users.
    """
    found, owner = np.unique(users, return_inverse=True)
    groups = min(_GROUPS, found.size)
    if groups < 2:
        return dict.fromkeys(metrics(np.ones(users.size, bool)), float("nan"))
    parts = [metrics(owner % groups != group) for group in range(groups)]
    errors = {}
    for name in parts[0]:
        values = np.array([part[name] for part in parts])
        errors[name] = math.sqrt((groups - 1) / groups * float(np.square(values - values.mean()).sum()))
    return errors
