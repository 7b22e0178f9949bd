"""Control columns come out with predictions: those of the user, of the item, and of the event that was held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hstu.data import Feature, leave_one_out
from hstu.data.requests import Requests
from hstu.inference.prediction_requests import Controls, PredictionRequests
from hstu.metrics.topk import TopK
from tests.samples import make_dataset

CONTROLS = (
    Feature(name="request", role="control", level="event", kind="categorical", vocab_size=9),
    Feature(name="cohort", role="control", level="user", kind="categorical", vocab_size=2),
    Feature(name="title", role="control", level="item", kind="categorical", vocab_size=50),
    Feature(name="score", role="control", level="user", kind="categorical", vocab_size=2),
)
WORDS = {"request": [f"r{k}" for k in range(9)], "cohort": ["old", "new"], "title": [f"item {k}" for k in range(50)]}


def test_control_columns_stand_beside_scores_and_recommendations(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 4, 12], declared=CONTROLS, originals=WORDS)
    split, users = leave_one_out(dataset.lengths)["test"], np.arange(3)
    found = dataset.gather(users, dataset.lengths - 1, dataset.lengths, ("request", "cohort"))
    request, cohort = (
        [[*WORDS[name], None][k] for k in values]
        for name, values in (("request", found.of_events["request"]), ("cohort", found.of_users["cohort"]))
    )
    titles = [[*WORDS["title"], None][k] for k in dataset.category_ids("title")]
    common = {"users": pa.array(["a", "b", "c"]), "vocabulary": pa.array(np.arange(50) + 100), "pairs": None,
              "score_names": ("score",), "label_features": ()}  # fmt: skip
    asked = PredictionRequests(
        dataset=dataset, split=split, held_out=True, controls=Controls.read(dataset, ("user", "event")), **common
    )
    columns = asked.scores(torch.tensor([2, 0]), torch.tensor([[0.5], [0.25]]))
    assert columns["request"].to_pylist() == [request[2], request[0]]
    assert columns["cohort"].to_pylist() == [cohort[2], cohort[0]]
    assert columns["title"].to_pylist() == [titles[item] for item in found.items[[2, 0]]]
    assert columns["score"].to_pylist() == [0.5, 0.25], "no control column takes the place of a prediction"
    best = TopK(items=torch.tensor([[3, 4], [5, -1]]), scores=torch.zeros(2, 2))
    columns = asked.recommendations(torch.tensor([1, 2]), best)
    assert columns["title"].to_pylist() == [titles[3], titles[4], titles[5]]
    assert columns["request"].to_pylist() == [request[1], request[1], request[2]]
    future = Requests(dataset, users)
    asked = PredictionRequests(
        dataset=future, split=future.split, held_out=False, controls=Controls.read(dataset, ("user",)), **common
    )
    columns = asked.recommendations(torch.tensor([1, 2]), best)
    assert columns["cohort"].to_pylist() == [cohort[1], cohort[1], cohort[2]] and "request" not in columns
