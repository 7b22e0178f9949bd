"""Recommendations of every backbone and similarity are what evaluation ranks first, whatever event is held out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hstu.config import load_config
from hstu.config.backbones import BACKBONES
from hstu.data import leave_one_out, write_dataset
from hstu.data.loader import BatchLoader
from hstu.data.reader import SequenceDataset
from hstu.data.requests import Requests
from hstu.data.schema import count_statistics
from hstu.data.synthetic import SyntheticConfig, generate
from hstu.inference import recommend
from hstu.models import build_model, make_collator
from hstu.training.evaluate import evaluate
from tests.tiny import BINDINGS, SHAPE, write_tiny

ALONE = SimpleNamespace(rank=0, size=1, gather=lambda values: values, sum=lambda values: values)
MESH = SimpleNamespace(tokens=ALONE, is_main=True, device=torch.device("cpu"), obey_signals=lambda: None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return SequenceDataset.open(write_tiny(tmp_path_factory.mktemp("recommend") / "synthetic", num_users=30))


@pytest.mark.parametrize(
    "binding",
    [
        *(f"NetworkArgs.backbone={name!r}" for name in BACKBONES if not name.startswith("hf:")),
        "RetrievalArgs.similarity='mol'",
        "RetrievalArgs.similarity='cosine'",
        "NetworkArgs.token_layout='interleave'",
        "NetworkArgs.bias_query_time='next'",
    ],
)
def test_recommendations_are_what_evaluation_ranks_first(binding: str, dataset: SequenceDataset):
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], binding]).config
    model = build_model(config, dataset.schema).eval()
    requests = Requests(dataset, np.arange(30))
    loader = BatchLoader(
        dataset=requests, split=requests.split, collate=make_collator(config, dataset.schema), batch_size=8
    )
    (first, batch), *_ = enumerate(loader.epoch(0))
    with torch.no_grad():
        queries = model.queries(model.scoring_request(batch))
        scores = model.scores(queries, model.catalogue_vectors(batch, torch.arange(120)))
    found = list(recommend(model, loader, MESH, 120, filter_seen=True))  # type: ignore[arg-type]
    rows, best = found[first]
    assert torch.cat([rows for rows, _ in found]).tolist() == list(range(30))
    for row in rows.tolist():
        history = dataset.gather(np.array([row]), np.zeros(1, int), dataset.lengths[[row]]).items
        scores[row, history] = float("-inf")
        left = 120 - np.unique(history).size
        expected = scores[row].sort(descending=True).values[:left]
        assert torch.allclose(best.scores[row, :left], expected, atol=1e-6)
        assert (best.items[row, left:] == -1).all() and not set(best.items[row].tolist()) & set(history.tolist())
    other = Requests(dataset, np.arange(30), np.full(30, 17))
    again = recommend(model, dataclasses.replace(loader, dataset=other), MESH, 5, filter_seen=True)  # type: ignore[arg-type]
    assert torch.equal(next(again)[1].items, best.items[:, :5]), "the item that is asked for is not looked at"


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if not name.startswith("hf:")])
def test_an_evaluation_is_a_prediction_on_the_truncated_input(backbone: str, tmp_path: Path):
    whole = generate(SyntheticConfig(num_users=30, **SHAPE), name="whole")  # type: ignore[arg-type]
    last = np.cumsum(whole.lengths) - 1
    truncated = dataclasses.replace(
        whole,
        schema=dataclasses.replace(whole.schema, counts=count_statistics(whole.lengths - 1, SHAPE["num_items"])),
        lengths=whole.lengths - 1,
        events={name: np.delete(values, last) for name, values in whole.events.items()},
    )
    write_dataset(whole, tmp_path / "whole")
    write_dataset(truncated, tmp_path / "truncated")
    bindings = [f"NetworkArgs.backbone={backbone!r}", "RetrievalArgs.eval_metrics=('HR@10', 'MRR')"]
    bindings.append("RetrievalArgs.filter_seen=True")
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], *bindings]).config
    full, short = (SequenceDataset.open(tmp_path / name) for name in ("whole", "truncated"))
    model, collate = build_model(config, full.schema), make_collator(config, full.schema)
    test = BatchLoader(dataset=full, split=leave_one_out(full.lengths)["test"], collate=collate, batch_size=7)
    requests = Requests(short, np.arange(30))
    asked = BatchLoader(dataset=requests, split=requests.split, collate=collate, batch_size=30)
    record = evaluate(model, test, MESH, config, 0)  # type: ignore[arg-type]
    ((_, best),) = recommend(model, asked, MESH, 120, filter_seen=True)  # type: ignore[arg-type]
    targets = torch.from_numpy(whole.events["item_id"][last])
    ranks = 1.0 + (best.items == targets[:, None]).double().argmax(1).double()
    assert record["metrics"] == pytest.approx(
        {"HR@10": float((ranks <= 10).double().mean()), "MRR": float((1 / ranks).mean())}, abs=1e-12
    )


@pytest.mark.parametrize(("query_time", "matters"), [("own", False), ("next", True)])
def test_the_time_of_the_request(query_time: str, matters: bool, dataset: SequenceDataset):
    bindings = ["NetworkArgs.preset='research'", f"NetworkArgs.bias_query_time={query_time!r}"]
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], *bindings]).config
    model = build_model(config, dataset.schema).eval()
    torch.nn.init.normal_(next(p for name, p in model.named_parameters() if "time" in name))
    scores = []
    for later in (1, 10**7):
        requests = Requests(dataset, np.arange(30), time=dataset.time_range()[1] + later)
        loader = BatchLoader(
            dataset=requests, split=requests.split, collate=make_collator(config, dataset.schema), batch_size=30
        )
        ((_, best),) = recommend(model, loader, MESH, 5, filter_seen=True)  # type: ignore[arg-type]
        scores.append(best.scores)
    assert torch.equal(*scores) != matters


def test_a_mixture_of_logits_is_scored_for_promising_items_alone(dataset: SequenceDataset):
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], "RetrievalArgs.similarity='mol'"]).config
    model = build_model(config, dataset.schema).eval()
    requests = Requests(dataset, np.arange(30))
    loader = BatchLoader(
        dataset=requests, split=requests.split, collate=make_collator(config, dataset.schema), batch_size=8
    )

    def answers(**options: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = [best for _, best in recommend(model, loader, MESH, 10, filter_seen=True, **options)]  # type: ignore[arg-type]
        return torch.cat([best.items for best in found]), torch.cat([best.scores for best in found])

    items, scores = answers()
    every_item, every_score = answers(num_candidates=120)
    assert torch.equal(every_item, items) and torch.allclose(every_score, scores, atol=1e-6)

    def recall(num_candidates: int) -> float:
        some, some_scores = answers(num_candidates=num_candidates)
        shared = (some[:, :, None] == items[:, None, :]) & (some[:, :, None] >= 0)
        # An item that both find has one score.
        rows, left, right = shared.nonzero(as_tuple=True)
        assert torch.allclose(some_scores[rows, left], scores[rows, right], atol=1e-6)
        return float(shared.any(1).double().mean())

    recalls = [recall(count) for count in (10, 20, 40, 80)]
    assert recalls == sorted(recalls) and recalls[0] < recalls[-1] and recalls[-1] > 0.95, recalls
