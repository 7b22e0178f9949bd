"""Runs on data with features of every kind: trained, saved, started from, planned, predicted with, exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu.cli import export, predict
from hstu.data import SequenceDataset, write_dataset
from hstu.data.values import Sets
from hstu.parallel import Mesh
from hstu.training.checkpoint_files import CheckpointError
from hstu.training.init_from import find_source
from hstu.training.plan import measure_demand
from tests import launch
from tests.samples import declared_features, make_dataset, read_back
from tests.tiny import BINDINGS
from tests.training.runs import trainer

# Names of methods, and with a dot, which modules cannot have.
CONTEXTS = ("type", "a.b")
NAMES = {"price": "values", "brand": "keys"}
TASKS = ("RankingArgs.tasks=(('did', 'binary', 'action'), ('watch', 'regression', 'watched'), "
         "('end', 'multiclass', 'ending'))", "RankingArgs.prediction_head_arch=[16, 5]")  # fmt: skip
LINES = {
    "ranking": (*TASKS, "RankingArgs.eval_metrics=('AUC/did', 'RMSE', 'AUC/end')", "DatasetArgs.max_num_candidates=2"),
    "retrieval": ("RetrievalArgs.eval_metrics=('HR@10',)", "FeatureArgs.merge='sum'", "NetworkArgs.token_layout='add'"),
}
SHORT = ("NetworkArgs.item_embedding='both'", "DatasetArgs.dataset_name='small'", "TrainerArgs.max_train_iters=4",
         "TrainerArgs.eval_interval=4")  # fmt: skip


@pytest.fixture(scope="module")
def mesh() -> Any:
    with Mesh.create() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and ``other``: the same values under other ids."""
    home = tmp_path_factory.mktemp("declared")
    features = tuple(replace(f, name=NAMES.get(f.name, f.name), table=None if f.name in NAMES else f.table)
                     for f in declared_features())  # fmt: skip
    lengths = np.random.default_rng(1).integers(3, 15, size=70).tolist()
    make_dataset(
        home / "tmp_data" / "small", lengths, num_items=40, num_actions=2, contexts=CONTEXTS, declared=features
    )
    data = read_back(home / "tmp_data" / "small")
    orders = {"keys": np.array([2, 0, 3, 1]), "likes": np.array([5, 3, 1, 0, 4, 2]), "a.b": np.arange(7)[::-1]}

    def renumbered(columns: dict[str, Any], tables: dict[str, str]) -> dict[str, Any]:
        new = {table: np.append(np.argsort(order), len(order)) for table, order in orders.items()}
        return {
            name: (values if tables.get(name) not in new else values._replace(ids=new[tables[name]][values.ids])
                   if isinstance(values, Sets) else new[tables[name]][values])
            for name, values in columns.items()
        }  # fmt: skip

    tables = {feature.name: feature.table or feature.name for feature in data.schema.features}
    vocabularies = {name: own.take(orders[name]) if name in orders else own for name, own in data.vocabularies.items()}
    write_dataset(
        replace(
            data,
            contexts=renumbered(data.contexts, tables),
            events=renumbered(data.events, tables),
            categories=renumbered(data.categories, tables),
            vocabularies=vocabularies,
        ),
        home / "other",
    )
    return home


@pytest.fixture(scope="module")
def runs(home: Path) -> dict[str, dict[str, float]]:
    """A trained run of each task, and its test scores."""
    scores = {}
    for task, lines in LINES.items():
        (home / f"{task}.gin").write_text("\n".join((*BINDINGS[task], *SHORT, *lines)))
        done = launch.entrypoint()(task, "--gin-config-file", f"{task}.gin", "--run-dir", task, cwd=home)
        assert done.code == 0, done.err
        scores[task] = json.loads((home / task / "eval.json").read_text())["metrics"]
    return scores


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


@pytest.mark.parametrize("task", LINES)
def test_rows_of_features_go_with_their_values(home: Path, runs: Any, tmp_path: Path, mesh: Mesh, task: str) -> None:
    source = find_source(str(home / task), tmp_path)
    with trainer(home / "other", tmp_path / "run", task, *SHORT, *LINES[task], mesh=mesh) as run:
        run.start_from(source)
        rows = run.started_from["rows"]  # type: ignore[index]
        assert {"keys", "likes", "a.b", "type", "device"} <= {*rows}
        assert all(own["new"] == own["left_out"] == 0 for own in rows.values())
        found = run.assembly.score("test", 0)["metrics"]
    assert found == pytest.approx(runs[task], rel=1e-6)
    less = ("FeatureArgs.event_features=('device',)",)
    with (
        trainer(home / "tmp_data" / "small", tmp_path / "less", task, *SHORT, *LINES[task], *less, mesh=mesh) as run,
        pytest.raises(CheckpointError, match="is of another model"),
    ):
        run.start_from(source)


def test_predictions_are_what_evaluation_scored(home: Path, runs: dict[str, dict[str, float]], tmp_path: Path) -> None:
    flags = ["--run-dir", str(home / "ranking"), "--split", "test", "--output", f"{tmp_path}/out.parquet"]
    assert predict.main(flags) == 0
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert {"score_did", "score_watch", "score_end_0", "watched", "ending_id", "request"} <= {*found.columns}
    assert np.allclose(found.select("score_end_0", "score_end_1", "score_end_2").sum_horizontal(), 1)
    gaps = found.filter(~pl.col("watched").is_nan()).select(pl.col("score_watch") - pl.col("watched")).to_series()
    assert 20 < len(gaps) < len(found)
    assert float((gaps**2).mean()) ** 0.5 == pytest.approx(runs["ranking"]["RMSE"], rel=1e-6)  # type: ignore[arg-type]


def test_vectors_go_out(home: Path, runs: Any, tmp_path: Path) -> None:
    assert export.main(["--run-dir", str(home / "retrieval"), "--output", str(tmp_path / "out")]) == 0
    items = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert items["vector"].to_numpy().shape == (40, 16)
    assert predict.main(["--run-dir", str(home / "retrieval"), "--output", str(tmp_path / "next.parquet")]) == 0


@pytest.mark.parametrize("task", LINES)
def test_a_plan_counts_every_table(home: Path, runs: Any, tmp_path: Path, mesh: Mesh, task: str) -> None:
    with trainer(home / "tmp_data" / "small", tmp_path / "run", task, *SHORT, *LINES[task], mesh=mesh) as run:
        batch = next(run.loaders["train"].epoch(0))
        demand = measure_demand(run.config, SequenceDataset.open(home / "tmp_data" / "small"), batch)
        dense = sum(p.numel() for p in run.parallel.dense.ddp.module.parameters())
    assert {table.name for table in demand.tables} == {table.name for table in run.model.embeddings.tables}
    assert demand.dense == dense and demand.activations > 0
    widths = {key: table.width for table in demand.tables for key in table.features}
    counts = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
    least = 4 * sum(count * widths[key] for key, count in counts.items())
    of_items = 4 * counts["item"] * (widths["item:keys"] + 1.5 * widths["item:genres"])  # 1.5 ids a set
    pool = 4 * 40 * (3.5 * 16) if task == "retrieval" else 0
    assert demand.lookups == pytest.approx(least + of_items + pool, rel=0.05)
