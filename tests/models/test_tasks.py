"""Ranking tasks: their labels, losses and predictions against plain formulas, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hstu.config import ConfigError
from hstu.data.schema import Feature, Schema, Statistics, count_statistics
from hstu.models.tasks import Task, make_tasks, ranking_loss
from tests.samples import make_config

NAN = float("nan")
CLICK = Task(name="click", kind="binary", feature="action", bit=1, classes=8)
SHELF = Task(name="shelf", kind="multiclass", feature="shelf", outputs=3, classes=3, weight=0.5)
WATCH = Task(name="watch", kind="regression", feature="seconds", is_number=True, mean=10.0, std=4.0)
LONG = Task(name="long", kind="binary", feature="seconds", is_number=True)
TARGETS = {
    "action": torch.tensor([0, 2, 3, 5]),
    "shelf": torch.tensor([2, 3, 0, 1]),  # 3: unknown
    "seconds": torch.tensor([[12.0], [NAN], [0.0], [20.0]]),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_losses_and_gradients_are_those_of_formulas() -> None:
    tasks = (CLICK, SHELF, WATCH, LONG)
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = ranking_loss(logits, TARGETS, tasks)
    expected, slopes = 0.0, torch.zeros(4, 6)
    for i, row in enumerate(logits.tolist()):
        clicked = TARGETS["action"][i].item() // 2 % 2
        expected -= math.log(sigmoid(row[0]) if clicked else 1 - sigmoid(row[0]))
        slopes[i, 0] = sigmoid(row[0]) - clicked
        shelf = int(TARGETS["shelf"][i])
        if shelf < 3:
            shares = [math.exp(x) / sum(math.exp(y) for y in row[1:4]) for x in row[1:4]]
            expected -= 0.5 * math.log(shares[shelf])
            for k in range(3):
                slopes[i, 1 + k] = 0.5 * (shares[k] - (k == shelf))
        seconds = float(TARGETS["seconds"][i])
        if not math.isnan(seconds):
            expected += (row[4] - (seconds - 10) / 4) ** 2
            slopes[i, 4] = 2 * (row[4] - (seconds - 10) / 4)
            expected -= math.log(sigmoid(row[5]) if seconds > 0 else 1 - sigmoid(row[5]))
            slopes[i, 5] = sigmoid(row[5]) - (seconds > 0)
    assert float(found.total.detach()) == pytest.approx(expected, rel=1e-5) and found.count == 4
    found.total.backward()
    torch.testing.assert_close(logits.grad, slopes)


def test_huber_is_linear_beyond_one_deviation() -> None:
    task = Task(name="w", kind="regression", feature="seconds", is_number=True, loss="huber", mean=0.0, std=2.0)
    numbers = {"seconds": torch.tensor([[2.0], [20.0]])}
    total = ranking_loss(torch.tensor([[0.5], [0.0]]), numbers, (task,)).total
    assert float(total) == pytest.approx(0.5 * 0.5**2 + (10 - 0.5), rel=1e-6)


def test_no_labels_move_nothing() -> None:
    logits = torch.randn(0, 6, requires_grad=True)
    nothing = {name: values[:0] for name, values in TARGETS.items()}
    loss = ranking_loss(logits, nothing, (CLICK, SHELF, WATCH, LONG))
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0 and loss.count == 0
    unknown = {"shelf": torch.tensor([3]), "seconds": torch.tensor([[NAN]])}
    outputs = torch.randn(1, 5, requires_grad=True)
    ranking_loss(outputs, unknown, (SHELF, WATCH, LONG)).total.backward()
    assert outputs.grad is not None and not outputs.grad.any()


def test_predictions_are_probabilities_and_numbers_of_the_unit() -> None:
    outputs = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    assert WATCH.predict(outputs).flatten().tolist() == [12.0, 6.0]
    assert CLICK.predict(outputs).flatten().tolist() == pytest.approx([sigmoid(0.5), sigmoid(-1.0)])
    assert SHELF.predict(torch.randn(5, 3)).sum(1).tolist() == pytest.approx([1.0] * 5)


def schema(bits: tuple[str, ...] | None = ("view", "click"), classes: int = 4) -> Schema:
    kind = "bitmask" if bits else "categorical"
    numbers = Statistics(mean=10.0, std=4.0, quantiles=tuple(np.linspace(0, 20, 101).tolist()))
    features = (
        Feature(name="user", role="user", vocab_size=3),
        Feature(name="item", role="item", vocab_size=5),
        Feature(name="did", role="action", vocab_size=classes, action_type=kind, bits=bits),  # type: ignore[arg-type]
        Feature(name="seconds", level="event", kind="numeric", statistics=numbers, known_at_request=False),
        Feature(name="shelf", level="event", kind="categorical", vocab_size=3),
    )
    return Schema(name="shop", features=features, counts=count_statistics(np.array([2, 2, 2]), 5))


def tasks_of(
    *tasks: tuple[str, str, str], arch: str = "[8, 5]", data: Schema | None = None, more: str = ""
) -> list[Task]:
    lines = [f"RankingArgs.tasks={tasks!r}", f"RankingArgs.prediction_head_arch={arch}", *([more] if more else [])]
    return list(make_tasks(make_config("ranking", *lines), data or schema()))


def test_tasks_come_from_actions_and_features() -> None:
    click, watch, shelf = tasks_of(
        ("c", "binary", "action:click"), ("w", "regression", "seconds"), ("s", "multiclass", "shelf"),
        more="RankingArgs.task_weights={'w': 0.1}",
    )  # fmt: skip
    assert (click.feature, click.bit, click.outputs) == ("did", 1, 1)
    assert (watch.mean, watch.std, watch.weight, click.weight) == (10.0, 4.0, 0.1, 1.0)
    assert (shelf.outputs, shelf.classes) == (3, 3)
    (same,) = tasks_of(("c", "binary", "did:1"), arch="[1]")
    assert same == click


@pytest.mark.parametrize(
    ("tasks", "arch", "message"),
    [
        ([("c", "binary", "action:buy")], "[1]", "as 'action:view'; bits: view, click"),
        ([("c", "multiclass", "action")], "[4]", "of which a binary task reads one bit"),
        ([("s", "binary", "shelf")], "[1]", "'shelf' has 3 values; use multiclass"),
        ([("s", "regression", "shelf")], "[1]", "'shelf' is no number; use multiclass or binary"),
        ([("w", "multiclass", "seconds")], "[1]", "'seconds' is a number; use regression"),
        ([("w", "regression", "minutes")], "[1]", "it has: seconds, shelf, did"),
        ([("s", "multiclass", "shelf:2")], "[3]", "only actions that are bit masks have parts"),
        ([("s", "multiclass", "shelf"), ("w", "regression", "seconds")], "[2]", "4 outputs (s 3, w 1); end with that"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(tasks: list[tuple[str, str, str]], arch: str, message: str) -> None:
    with pytest.raises(ConfigError, match="RankingArgs") as error:
        tasks_of(*tasks, arch=arch)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("tasks=(('a', 'binary'),)",), "must be (name, kind, what)"),
        (("tasks=(('a', 'ranking', 'action'),)",), "must be (name, kind, what)"),
        (("tasks=(('a', 'binary', 'x'), ('a', 'binary', 'y'))",), "name 'a' twice"),
        (("tasks=(('a', 'binary', 'x'),)", "task_weights={'b': 1}"), "no task 'b'; tasks: a"),
        (("tasks=(('a', 'binary', 'x'),)", "task_weights={'a': 0}"), "no task with a loss"),
        (("tasks=(('a', 'binary', 'x'),)", "regression_loss='huber'"), "is for a task of kind 'regression'"),
        (("tasks=(('a', 'binary', 'x'),)", "num_tasks=4"), "is told by RankingArgs.tasks"),
        (("tasks=(('a', 'binary', 'x'),)", "eval_metrics=('RMSE',)"), "is for tasks of kind regression"),
        (("tasks=(('a', 'binary', 'x'),)", "eval_metrics=('AUC/b',)"), "no task 'b'; tasks: a"),
        (("eval_metrics=('SPEARMAN',)",), "is for tasks of kind regression"),
    ],
)
def test_fields_that_do_not_fit_are_refused(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config("ranking", *(f"RankingArgs.{line}" for line in lines))
    assert message in str(error.value)


def test_the_first_metric_follows_from_the_tasks() -> None:
    numbers = make_config("ranking", "RankingArgs.tasks=(('w', 'regression', 'seconds'),)")
    both = make_config("ranking", "RankingArgs.tasks=(('w', 'regression', 'seconds'), ('c', 'binary', 'action'))")
    named = make_config(
        "ranking", "RankingArgs.tasks=(('c', 'binary', 'action'),)", "RankingArgs.eval_metrics=('auc/c',)"
    )
    assert (numbers.eval_metrics, both.eval_metrics, named.eval_metrics) == (("RMSE",), ("AUC",), ("AUC/c",))
