"""Evaluation of a whole split against a loop over users: means over users, training's own similarity."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.config import Config
from hstu.data import SequenceDataset, make_splits
from hstu.data.loader import BatchLoader
from hstu.models import RankingModel, RetrievalModel, build_model, make_collator
from hstu.training.evaluate import best_possible, evaluate
from tests.samples import make_config, make_dataset, scores_of

LENGTHS = [3, 9, 4, 12, 5, 3, 7, 20, 6, 4, 8]
ALONE = SimpleNamespace(sum=lambda x: x, gather=lambda x: x)
MESH: Any = SimpleNamespace(is_main=True, device=torch.device("cpu"), tokens=ALONE, obey_signals=lambda: None)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


def prepare(
    dataset: SequenceDataset, config: Config, split: str, batch_size: int, **options: Any
) -> tuple[Any, BatchLoader]:
    model = build_model(config, dataset.schema)
    for parameter in model.parameters():  # far from the small initial weights, so that scores differ
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    loader = BatchLoader(
        dataset=dataset,
        split=make_splits(config.dataset, dataset)[split],
        collate=make_collator(config, dataset.schema),
        batch_size=batch_size,
        **options,
    )
    return model, loader


@torch.no_grad()
def naive_retrieval(model: RetrievalModel, loader: BatchLoader, filter_seen: bool) -> dict[str, float]:
    """One user at a time; similarity from the raw table, in float64."""
    model.eval()
    table = model.embeddings.weights["item"].double()  # type: ignore[index, union-attr]
    table = table / table.norm(dim=1, keepdim=True)
    ranks = []
    for row in range(len(loader.split)):
        batch = loader.collate(loader.dataset, loader.split, np.array([row]), np.array([row]), 0)
        scores = (scores_of(model, batch).double() @ table.T)[0]
        stop = int(loader.split.stop[row])
        user = loader.split.users[[row]]
        events = loader.dataset.gather(user, np.array([0]), np.array([stop])).items.tolist()
        target = events[-1]
        left = set(range(30)) - (set(events[:-1]) if filter_seen else set())
        higher = sum(float(scores[j]) > float(scores[target]) for j in left - {target})
        ranks.append(1 + higher if target in left else math.inf)
    return {
        "HR@3": sum(r <= 3 for r in ranks) / len(ranks),
        "NDCG@5": sum(1 / math.log2(r + 1) for r in ranks if r <= 5) / len(ranks),
        "MRR": sum(1 / r for r in ranks) / len(ranks),
    }


RETRIEVAL = ("RetrievalArgs.eval_metrics=('HR@3', 'NDCG@5', 'MRR')", "NetworkArgs.preset='research'")


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_retrieval_scores_are_means_over_users(
    dataset: SequenceDataset, split: str, batch_size: int, filter_seen: bool
) -> None:
    config = make_config("retrieval", *RETRIEVAL, f"RetrievalArgs.filter_seen={filter_seen}")
    model, loader = prepare(dataset, config, split, batch_size)
    expected = naive_retrieval(model, loader, filter_seen)
    record = evaluate(model, loader, MESH, config, 7)
    assert record["metrics"] == pytest.approx(expected, rel=1e-12)
    assert (record["num_users"], record["num_candidates"], record["filter_seen"]) == (11, 30, filter_seen)
    assert (record["split"], record["step"], record["tie_rule"]) == (split, 7, "average")
    assert record["protocol"] == "leave_one_out" and model.training


def test_ranks_among_100_items_stand_under_their_own_name(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "many", LENGTHS, num_items=300)
    names = ("MRR", "MRR:sampled_100", "HR@10:sampled_100")
    config = make_config(
        "retrieval", RETRIEVAL[1], f"RetrievalArgs.eval_metrics={names}", "RetrievalArgs.filter_seen=False"
    )
    found = []
    for batch_size in (2, 11):
        model, loader = prepare(dataset, config, "test", batch_size)
        ranks = [replace(loader, rank=rank, world_size=2) for rank in range(2)]
        found += [evaluate(model, loader, MESH, config, 0), *evaluate_ranks(model, ranks, config)]
    for record in found:
        assert record["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-12), "it depends on batch or rank"
        assert tuple(record["metrics"]) == names and record["num_candidates"] == 300
    assert found[0]["metrics"]["MRR:sampled_100"] > found[0]["metrics"]["MRR"]
    model, loader = prepare(dataset, config, "test", 11)
    other = evaluate(model, loader, MESH, replace(config, trainer=replace(config.trainer, seed=5)), 0)["metrics"]
    assert other["MRR"] == pytest.approx(found[0]["metrics"]["MRR"])
    assert other["MRR:sampled_100"] != found[0]["metrics"]["MRR:sampled_100"]


def test_evaluating_on_raw_items_is_caught(dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("retrieval", *RETRIEVAL, "RetrievalArgs.filter_seen=True")
    model, loader = prepare(dataset, config, "test", 4)
    expected = naive_retrieval(model, loader, True)

    def raw(batch: Any, ids: Tensor) -> Tensor:
        return model.embeddings.weights["item"][ids]

    monkeypatch.setattr(model, "catalogue_vectors", raw)
    assert evaluate(model, loader, MESH, config, 0)["metrics"] != pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("candidates", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_ranking_scores_do_not_depend_on_batches(
    dataset: SequenceDataset, batch_size: int, candidates: int, tmp_path: Path
) -> None:
    config = make_config(
        "ranking",
        f"DatasetArgs.max_num_candidates={candidates}",
        "RankingArgs.eval_metrics=('AUC', 'LOGLOSS', 'ACCURACY')",
    )
    model, loader = prepare(dataset, config, "test", batch_size)
    assert isinstance(model, RankingModel)
    record = evaluate(model, loader, MESH, config, 0)
    model.eval()
    with torch.no_grad():
        rows = np.arange(11)
        whole = loader.collate(dataset, loader.split, rows, rows, 0)
        p = scores_of(model, whole).double().softmax(1)
    truth = [int(dataset.gather(rows[i : i + 1], np.array([0]), dataset.lengths[i : i + 1]).actions[-1]) for i in rows]  # type: ignore[index]
    loss = -sum(math.log(float(p[i, y])) for i, y in enumerate(truth)) / 11
    assert record["metrics"]["LOGLOSS"] == pytest.approx(loss, rel=1e-5)
    assert record["metrics"]["ACCURACY"] == pytest.approx(
        sum(int(p[i].argmax()) == y for i, y in enumerate(truth)) / 11
    )
    assert record["num_users"] == 11 and record["left_out"]["AUC"] == 4 - len(set(truth))


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"world_size": 2}])
def test_users_with_several_targets(dataset: SequenceDataset, filter_seen: bool, options: dict[str, int]) -> None:
    config = make_config(
        "retrieval",
        *RETRIEVAL,
        "DatasetArgs.protocol='temporal'",
        "DatasetArgs.temporal_quantiles=(0.3, 0.5)",
        f"RetrievalArgs.filter_seen={filter_seen}",
    )
    model, loader = prepare(dataset, config, "test", 4, **options)
    users = loader.split.users
    assert np.unique(users).size < users.size  # several targets of one user
    assert users.tolist() != list(range(users.size))
    expected = naive_retrieval(model, loader, filter_seen)
    ranks = [replace(loader, rank=rank) for rank in range(loader.world_size)]
    records = evaluate_ranks(model, ranks, config)
    for record in records:
        assert record["metrics"] == pytest.approx(expected, rel=1e-12)
        assert (record["protocol"], record["split"]) == ("temporal", "test")
        assert (record["num_users"], record["num_targets"]) == (np.unique(users).size, users.size)


def evaluate_ranks(model: Any, ranks: list[BatchLoader], config: Config) -> list[dict[str, Any]]:
    """Evaluate on each rank in a thread of its own; sums and gathers meet at a barrier."""
    board: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(ranks))

    def exchange(rank: int, value: Tensor) -> list[Tensor]:
        board[rank] = value.clone()
        barrier.wait(30)
        values = [board[other] for other in range(len(ranks))]
        barrier.wait(30)
        return values

    def mesh(rank: int) -> Any:
        tokens = SimpleNamespace(
            sum=lambda x: torch.stack(exchange(rank, x)).sum(0), gather=lambda x: torch.cat(exchange(rank, x))
        )
        return SimpleNamespace(is_main=rank == 0, device=torch.device("cpu"), obey_signals=lambda: None, tokens=tokens)

    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(evaluate, model, loader, mesh(loader.rank), config, 0) for loader in ranks]
        return [future.result() for future in futures]


def test_scores_of_planted_data_stand_beside_their_own_protocol_only() -> None:
    record = {"protocol": "leave_one_out", "split": "test", "metrics": {"HR@10": 0.1, "MRR": 0.2}}
    planted = {"test": {"HR@10": 0.4}}
    assert best_possible(record, planted) == {"HR@10": 0.4, "MRR": None}
    assert best_possible(record | {"protocol": "temporal"}, planted) is None
