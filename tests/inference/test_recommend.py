"""Recommendations of every backbone and similarity are what evaluation ranks first, whatever event is held out."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hstu.config import load_config
from hstu.config.backbones import BACKBONES
from hstu.data.loader import BatchLoader
from hstu.data.reader import SequenceDataset
from hstu.data.requests import Requests
from hstu.inference import recommend
from hstu.models import build_model, make_collator
from tests.tiny import BINDINGS, write_tiny

MESH = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), gather=lambda values: values)


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
        scores = model.scores(model.queries(batch), model.catalogue_vectors(batch, torch.arange(120)))
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
