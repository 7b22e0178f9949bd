"""Ranking metrics against loops over pairs, users and events."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hstu.metrics.ranking import (
    Predicted,
    RankingScores,
    accuracy,
    auc,
    gauc,
    log_loss,
    lower_is_better,
    normalized_entropy,
    ranking_scores,
    spearman,
)


def pairwise_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    pairs = [(p, n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)


def draw(seed: int, n: int = 60, values: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(values, size=n) / values, rng.integers(2, size=n)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("values", [2, 8, 10**9])
def test_auc_with_ties_is_that_of_all_pairs(seed: int, values: int) -> None:
    scores, labels = draw(seed, values=values)
    assert auc(scores, labels) == pytest.approx(pairwise_auc(scores, labels), abs=1e-12)


def test_auc_ends_and_chance() -> None:
    labels = np.array([0, 0, 1, 1, 1])
    assert auc(np.array([1, 2, 3, 4, 5.0]), labels) == 1.0
    assert auc(np.array([5, 4, 3, 2, 1.0]), labels) == 0.0
    assert auc(np.full(5, 0.7), labels) == 0.5  # a model that cannot tell
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([1, 1])))
    assert math.isnan(auc(np.array([]), np.array([], dtype=np.int64)))


def test_breaking_ties_by_order_is_caught() -> None:
    def by_order(scores: np.ndarray, labels: np.ndarray) -> float:
        ranks = np.argsort(np.argsort(scores, kind="stable")) + 1
        positives = labels.sum()
        pairs = positives * (labels.size - positives)
        return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / pairs)

    scores, labels = draw(0, values=2)
    assert by_order(scores, labels) != pytest.approx(pairwise_auc(scores, labels), abs=1e-3)


def test_scores_that_differ_by_little_are_no_ties() -> None:
    scores = 0.5 + np.arange(6) * 1e-12
    assert auc(scores, np.array([0, 0, 0, 1, 1, 1])) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_gauc_weighs_users_by_their_events_and_counts_those_left_out(seed: int) -> None:
    scores, labels = draw(seed)
    users = np.random.default_rng(seed + 100).integers(12, size=60)  # not sorted
    labels[users == 3] = 1
    total, weight, left_out = 0.0, 0, 0
    for user in np.unique(users):
        own = users == user
        if len(np.unique(labels[own])) == 1:
            left_out += 1
            continue
        total, weight = total + own.sum() * pairwise_auc(scores[own], labels[own]), weight + own.sum()
    value, count = gauc(scores, labels, users)
    assert value == pytest.approx(total / weight, abs=1e-12) and count == left_out >= 1


def test_gauc_of_nobody() -> None:
    value, left_out = gauc(np.array([0.1, 0.2]), np.array([1, 0]), np.array([4, 9]))
    assert math.isnan(value) and left_out == 2
    empty = np.array([], dtype=np.int64)
    assert gauc(empty, empty, empty)[1] == 0


def probabilities(seed: int, n: int = 40, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(classes), size=n), rng.integers(classes, size=n)


def test_log_loss_accuracy_and_normalised_entropy_are_those_of_loops() -> None:
    p, y = probabilities(1)
    loss = -sum(math.log(p[i, y[i]]) for i in range(40)) / 40
    assert log_loss(p, y) == pytest.approx(loss, rel=1e-12)
    shares = [np.mean(y == k) for k in range(4)]
    entropy = -sum(s * math.log(s) for s in shares if s > 0)
    assert normalized_entropy(p, y) == pytest.approx(loss / entropy, rel=1e-12)
    assert accuracy(p, y) == sum(int(p[i].argmax() == y[i]) for i in range(40)) / 40


def test_predicting_the_frequencies_has_normalised_entropy_one() -> None:
    _, y = probabilities(2)
    shares = np.bincount(y, minlength=4) / y.size
    assert normalized_entropy(np.tile(shares, (y.size, 1)), y) == pytest.approx(1.0, rel=1e-12)
    assert math.isnan(normalized_entropy(np.array([[0.2, 0.8]]), np.array([1])))


def test_a_certain_mistake_is_a_large_number_and_no_infinity() -> None:
    assert math.isfinite(log_loss(np.array([[1.0, 0.0]]), np.array([1])))


def scores_of(
    names: tuple[str, ...],
    p: np.ndarray,
    y: np.ndarray,
    users: np.ndarray,
    *,
    multiclass: bool,
    tasks: tuple[str, ...] = (),
) -> RankingScores:
    """Scores of one softmax, or of a binary task for each bit; those of other names are called by their numbers."""
    if multiclass:
        return ranking_scores(names, [Predicted(name="all", kind="multiclass", values=p, labels=y, users=users)])
    called = [*tasks, *map(str, range(len(tasks), p.shape[1]))]
    return ranking_scores(names, [
        Predicted(name=name, kind="binary", values=p[:, [k]], labels=y >> k & 1, users=users)
        for k, name in enumerate(called)
    ])  # fmt: skip


def test_multiclass_auc_is_the_mean_over_classes_that_occur() -> None:
    p, y = probabilities(3, classes=5)
    y[y == 4] = 0  # a class that never occurs, as with a head wider than the actions
    scores = scores_of(("AUC", "GAUC", "LOGLOSS", "NE", "ACCURACY"), p, y, np.arange(40) % 7, multiclass=True)
    expected = np.mean([pairwise_auc(p[:, k], (y == k).astype(int)) for k in range(4)])
    assert scores.metrics["AUC"] == pytest.approx(expected, abs=1e-12) and scores.left_out["AUC"] == 1
    assert scores.metrics["LOGLOSS"] == log_loss(p, y) and set(scores.metrics) == {
        "AUC", "GAUC", "LOGLOSS", "NE", "ACCURACY"
    }  # fmt: skip


def test_each_binary_task_reads_its_bit() -> None:
    rng = np.random.default_rng(5)
    p, y = rng.random((50, 3)), rng.integers(8, size=50)
    y &= 0b011  # the third task never happens
    scores = scores_of(("AUC", "ACCURACY"), p, y, np.zeros(50, np.int64), multiclass=False)
    for k in (0, 1):
        bits = np.array([int(label) // 2**k % 2 for label in y])
        assert scores.metrics[f"AUC/{k}"] == pytest.approx(pairwise_auc(p[:, k], bits), abs=1e-12)
        assert scores.metrics[f"ACCURACY/{k}"] == np.mean((p[:, k] > 0.5) == bits)
    assert math.isnan(scores.metrics["AUC/2"]) and scores.left_out["AUC"] == 1
    assert scores.metrics["AUC"] == pytest.approx((scores.metrics["AUC/0"] + scores.metrics["AUC/1"]) / 2)
    named = scores_of(("AUC",), p, y, np.zeros(50, np.int64), multiclass=False, tasks=("click", "buy"))
    assert list(named.metrics) == ["AUC", "AUC/click", "AUC/buy", "AUC/2"]
    assert named.metrics["AUC/buy"] == scores.metrics["AUC/1"]


def test_one_binary_task_has_no_numbered_copy() -> None:
    scores, labels = draw(0)
    result = scores_of(("AUC", "LOGLOSS", "NE"), scores[:, None] * 0.9 + 0.05, labels, labels, multiclass=False)
    assert set(result.metrics) == {"AUC", "LOGLOSS", "NE"}
    p = scores * 0.9 + 0.05
    expected = -np.mean(labels * np.log(p) + (1 - labels) * np.log(1 - p))
    assert result.metrics["LOGLOSS"] == pytest.approx(expected, rel=1e-12)


def test_one_label_only_is_counted_and_not_scored() -> None:
    result = scores_of(("AUC",), np.array([[0.3], [0.4]]), np.array([1, 1]), np.array([0, 1]), multiclass=False)
    assert math.isnan(result.metrics["AUC"]) and result.left_out == {"AUC": 1}


def ranks_by_counting(values: np.ndarray) -> np.ndarray:
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_errors_and_rank_correlation_are_those_of_loops() -> None:
    rng = np.random.default_rng(6)
    found, wanted = rng.integers(6, size=40) / 2, rng.integers(5, size=40).astype(float)
    task = Predicted(name="watch", kind="regression", values=found[:, None], labels=wanted, users=np.zeros(40))
    scores = ranking_scores(("RMSE", "MAE", "SPEARMAN/watch"), [task]).metrics
    gaps = [float(f - w) for f, w in zip(found, wanted, strict=True)]
    assert scores["RMSE"] == pytest.approx(math.sqrt(sum(g * g for g in gaps) / 40), rel=1e-12)
    assert scores["MAE"] == pytest.approx(sum(map(abs, gaps)) / 40, rel=1e-12)
    expected = np.corrcoef(ranks_by_counting(found), ranks_by_counting(wanted))[0, 1]
    assert scores["SPEARMAN/watch"] == pytest.approx(expected, abs=1e-12)
    assert spearman(np.exp(wanted), wanted) == pytest.approx(1.0) and math.isnan(spearman(found, np.ones(40)))
    assert math.isnan(spearman(found[:0], wanted[:0]))


def test_each_metric_is_of_the_tasks_it_is_for() -> None:
    rng = np.random.default_rng(7)
    users = np.arange(30) % 4
    click = Predicted(
        name="click", kind="binary", values=rng.random((30, 1)), labels=rng.integers(2, size=30), users=users
    )
    buy = Predicted(name="buy", kind="binary", values=rng.random((30, 1)), labels=rng.integers(2, size=30), users=users)
    watch = Predicted(name="watch", kind="regression", values=rng.random((30, 1)), labels=rng.random(30), users=users)
    found = ranking_scores(("AUC", "GAUC/buy", "MAE"), [click, watch, buy]).metrics
    assert list(found) == ["AUC", "AUC/click", "AUC/buy", "GAUC/buy", "MAE", "MAE/watch"]
    assert found["AUC"] == (found["AUC/click"] + found["AUC/buy"]) / 2
    assert found["AUC/buy"] == auc(buy.values[:, 0], buy.labels)
    assert found["GAUC/buy"] == gauc(buy.values[:, 0], buy.labels, users)[0]
    assert lower_is_better("MAE/watch") and lower_is_better("RMSE") and not lower_is_better("SPEARMAN/watch")
