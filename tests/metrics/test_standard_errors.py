"""Standard errors: by their definition, and as far as scores of simulated users really differ."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hstu.metrics.ranking import auc
from hstu.metrics.standard_errors import by_jackknife, of_mean


def test_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(50)
    once = of_mean(values, np.arange(50))
    assert once == pytest.approx(values.std() / math.sqrt(50))
    assert of_mean(np.repeat(values, 3), np.repeat(np.arange(50), 3)) == pytest.approx(once), (
        "three times the same user"
    )
    assert of_mean(np.repeat(values, 3), np.arange(150)) == pytest.approx(once / math.sqrt(3))
    assert of_mean(np.ones(9), np.arange(9)) == 0
    for nobody in (np.zeros(0), np.ones(3)):
        assert math.isnan(of_mean(nobody, np.zeros(len(nobody))))


def test_the_jackknife_of_a_mean_is_that_of_the_mean() -> None:
    values, users = np.random.default_rng(1).random(15), np.arange(15)
    errors = by_jackknife(lambda kept: {"mean": float(values[kept].mean())}, users)
    assert errors == {"mean": pytest.approx(values.std(ddof=1) / math.sqrt(15))}
    assert math.isnan(by_jackknife(lambda kept: {"mean": 0.5}, np.zeros(4))["mean"])
    assert math.isnan(by_jackknife(lambda kept: {"x": float("nan")}, users)["x"])


def test_the_jackknife_tells_how_far_auc_moves() -> None:
    """Users differ in how often they like things, so that their events are not independent."""
    rng, scores, errors = np.random.default_rng(2), [], []
    for _ in range(60):
        taste = rng.normal(size=(200, 1))
        labels = (taste + rng.normal(size=(200, 5)) > 0).ravel().astype(np.int64)
        predicted = (taste + rng.normal(size=(200, 5))).ravel()
        users = np.repeat(np.arange(200), 5)
        scores.append(auc(predicted, labels))
        errors.append(by_jackknife(lambda k, p=predicted, y=labels: {"AUC": auc(p[k], y[k])}, users)["AUC"])
    # The deviation of 60 scores is known to 9%, the mean of their errors to 2%: 1.05 measured.
    assert 0.6 < float(np.mean(errors)) / float(np.std(scores)) < 1.4
