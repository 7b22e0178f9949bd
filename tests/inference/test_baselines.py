"""Popularity, repeats and item neighbours against loops over users, through the evaluation of the models."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from hstu.cli.baselines import table
from hstu.data import SequenceDataset
from hstu.inference import baselines
from hstu.inference.baselines import make_baselines
from hstu.training.evaluate import evaluate
from tests.metrics.test_evaluation import MESH, prepare
from tests.samples import make_config, make_dataset

NUM_ITEMS, NEIGHBOURS, LONGEST = 12, 3, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Users who repeat themselves, some of whom are not scored, and an item that nobody has."""
    lengths = [3, 9, 4, 12, 2, 3, 7, 20, 1, 6, 4, 8]
    items = np.random.default_rng(3).integers(NUM_ITEMS - 1, size=sum(lengths))
    return make_dataset(tmp_path_factory.mktemp("data") / "small", lengths, num_items=NUM_ITEMS, items=items)


def naive_scores(dataset: SequenceDataset) -> dict[str, Any]:
    """From a history to the score of each item, by name, from sets and counters."""
    shown, counts = [], Counter()
    for user, length in enumerate(dataset.lengths.tolist()):
        events = dataset.gather(np.array([user]), np.array([0]), np.array([length])).items.tolist()
        train = events[:-2] if length >= 3 else events
        counts.update(train)
        shown.append(set(train[-(LONGEST + 1) :]))
    having = {item: {user for user, own in enumerate(shown) if item in own} for item in range(NUM_ITEMS)}

    def near(item: int) -> dict[int, float]:
        both = {
            other: len(having[item] & having[other]) / math.sqrt(len(having[item]) * len(having[other]))
            for other in range(NUM_ITEMS)
            if other != item and having[item] & having[other]
        }
        return dict(sorted(both.items(), key=lambda pair: (-pair[1], pair[0]))[:NEIGHBOURS])

    def knn(history: list[int]) -> list[float]:
        found = [near(item) for item in set(history)]
        return [math.fsum(one.get(item, 0.0) for one in found) for item in range(NUM_ITEMS)]

    def recency(history: list[int]) -> list[int]:
        return [max((i + 1 for i, h in enumerate(history) if h == item), default=0) for item in range(NUM_ITEMS)]

    return {
        "popularity": lambda history: [counts[item] for item in range(NUM_ITEMS)],
        "last_item": recency,
        "item_knn": knn,
        "item_knn_last": lambda history: knn(history[-1:]),
    }


def naive_metrics(dataset: SequenceDataset, score: Any, filter_seen: bool) -> dict[str, float]:
    ranks = []
    for user, length in enumerate(dataset.lengths.tolist()):
        if length < 3:
            continue
        *history, target = dataset.gather(np.array([user]), np.array([0]), np.array([length])).items.tolist()
        scores = np.round(score(history[-LONGEST:]), 12)  # sums in another order
        left = [i for i in range(NUM_ITEMS) if not filter_seen or i not in history]
        higher = sum(scores[i] > scores[target] for i in left)
        ties = sum(scores[i] == scores[target] for i in left if i != target)
        ranks.append(1 + higher + ties / 2 if target in left else math.inf)
    return {
        "HR@3": sum(r <= 3 for r in ranks) / len(ranks),
        "NDCG@5": sum(1 / math.log2(r + 1) for r in ranks if r <= 5) / len(ranks),
        "MRR": sum(1 / r for r in ranks) / len(ranks),
    }


@pytest.mark.parametrize("pairs", [1 << 24, 1])
@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("name", ["popularity", "last_item", "item_knn", "item_knn_last"])
def test_baselines_are_what_they_are_called(
    dataset: SequenceDataset, name: str, filter_seen: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_PAIRS", pairs)
    monkeypatch.setattr(baselines, "_SAMPLES", 5 if pairs == 1 else 1 << 16)
    metrics = "RetrievalArgs.eval_metrics=('HR@3', 'NDCG@5', 'MRR')"
    config = make_config("retrieval", metrics, f"RetrievalArgs.filter_seen={filter_seen}")
    train, test = (prepare(dataset, config, split, 4)[1] for split in ("train", "test"))
    scorer = make_baselines(train, NEIGHBOURS, MESH.device)[name]
    record = evaluate(scorer, test, MESH, config, 7)
    assert record["metrics"] == pytest.approx(naive_metrics(dataset, naive_scores(dataset)[name], filter_seen))
    assert (record["num_candidates"], record["num_targets"], record["filter_seen"]) == (NUM_ITEMS, 10, filter_seen)


def test_what_the_model_does_not_beat_is_told() -> None:
    model: dict[str, float | None] = {"HR@10": 0.5, "MRR": 0.2, "HR@3": None}
    others = {"popularity": {"HR@10": 0.5, "MRR": 0.1, "HR@3": None}, "knn": {"HR@10": 0.6, "MRR": 0.1, "HR@3": 0.1}}
    behind = baselines._not_beaten(model, others)  # type: ignore[arg-type]
    assert behind == {"HR@10": ["knn", "popularity"], "HR@3": ["knn"]}
    found = {"step": 3, "metrics": model, "baselines": others, "left_out": {"last_item": "why"}, "not_beaten": behind}
    lines = table(found).splitlines()
    assert "THE MODEL DOES NOT BEAT knn, popularity on HR@10" in lines and "last_item is left out: why" in lines
    assert lines[1].split() == ["model,", "step", "3", "0.5000", "0.2000", "undefined"]
    assert table(found | {"not_beaten": {}}).splitlines()[-1] == "the model beats every baseline"
