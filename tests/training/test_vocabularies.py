"""Ids that mean something else than in training are refused, by name and in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hstu.data import Schema, write_dataset
from hstu.data.vocabulary import Vocabularies
from hstu.parallel import Mesh
from hstu.training.checkpoint_files import CheckpointError, read_marker, write_marker
from hstu.training.vocabularies import kept_vocabularies
from tests.tiny import renumber, tiny
from tests.training.runs import trainer

LINES = ("NetworkArgs.item_embedding='both'", "TrainerArgs.max_train_iters=2")
REVERSED = {"item_id": 120, "segment": 6, "cluster": 12, "user_id": 40}


@pytest.fixture(scope="module")
def mesh() -> Any:
    with Mesh.create() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh) -> Path:
    """The data set ``one`` with a run of 2 steps on it, and the same log with one vocabulary in another order each."""
    folder, source = tmp_path_factory.mktemp("vocabularies"), tiny(40)
    write_dataset(source, folder / "one")
    for name, size in REVERSED.items():
        write_dataset(renumber(source, {name: np.arange(size)[::-1]}), folder / name)
    write_dataset(renumber(source, {"item_id": np.arange(121)}, {"item_id": [500]}), folder / "larger")
    with trainer(folder / "one", folder / "run", "ranking", *LINES, mesh=mesh) as run:
        run.train()
    return folder


@pytest.mark.parametrize("name", ["item_id", "segment", "cluster", "larger"])
def test_another_vocabulary_is_refused(home: Path, tmp_path: Path, mesh: Mesh, name: str) -> None:
    latest = home / "run" / "checkpoints" / "latest"
    problem = "121 values instead of 120" if name == "larger" else "as many values, but others or in another order"
    feature = "item_id" if name == "larger" else name
    with trainer(home / name, tmp_path, "ranking", *LINES, mesh=mesh) as run:
        for ask in (run.resume, run.evaluate):
            with pytest.raises(
                CheckpointError, match=rf"another vocabulary of '{feature}' than .* \({problem}\)"
            ) as caught:
                ask(latest)
            assert "--init-from" in str(caught.value) and "\n" not in str(caught.value)
        with pytest.raises(CheckpointError, match="another vocabulary"):
            run.resume(latest)


def test_other_users_may_be_scored_and_not_trained_on(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    latest = home / "run" / "checkpoints" / "latest"
    with trainer(home / "user_id", tmp_path, "ranking", *LINES, mesh=mesh) as run:
        assert (
            run.evaluate(latest, ("test",))[0]["metrics"]
            == json.loads((home / "run" / "eval.json").read_text())["metrics"]
        )
        with pytest.raises(CheckpointError, match="another vocabulary of 'user_id'"):
            run.resume(latest)


def test_items_of_other_categories_may_be_scored_and_not_trained_on(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    source, latest = tiny(40), home / "run" / "checkpoints" / "latest"
    source.categories["cluster"][:2] = source.categories["cluster"][:2] + 1
    write_dataset(source, tmp_path / "data")
    with trainer(tmp_path / "data", tmp_path / "run", "ranking", *LINES, mesh=mesh) as run:
        assert run.evaluate(latest, ("test",))
        assert (run.model.item_encoder.ids[0, :2].numpy() == source.categories["cluster"][:2]).all()  # type: ignore[union-attr]
        with pytest.raises(CheckpointError, match="another vocabulary of 'category:cluster'"):
            run.resume(latest)


def test_bits_of_other_names_are_refused(tmp_path: Path, mesh: Mesh) -> None:
    source = tiny(40)
    for bits in ("click,buy", "buy,click"):
        action = replace(source.schema.action, vocab_size=4, bits=tuple(bits.split(",")))  # type: ignore[type-var]
        features = tuple(action if f.role == "action" else f for f in source.schema.features)
        schema = replace(source.schema, features=features, best_possible=None)
        write_dataset(replace(source, schema=schema), tmp_path / bits)
    lines = (*LINES, "RankingArgs.prediction_head_arch=[16, 2]", "RankingArgs.num_tasks=2")
    with trainer(tmp_path / "click,buy", tmp_path / "run", "ranking", *lines, mesh=mesh) as run:
        run.train()
    latest = tmp_path / "run" / "checkpoints" / "latest"
    with trainer(tmp_path / "buy,click", tmp_path / "new", "ranking", *lines, mesh=mesh) as run:
        with pytest.raises(CheckpointError, match="another vocabulary of 'action'"):
            run.evaluate(latest)
        with pytest.raises(CheckpointError, match="'action' has bits: click, buy there and bits: buy, click here"):
            run.start_from(latest)
    with trainer(tmp_path / "click,buy", tmp_path / "new", "ranking", *lines, mesh=mesh) as run:
        run.start_from(latest)
    assert run.started_from is not None and run.started_from["rows"]["action"] == {"kept": 4, "new": 0, "left_out": 0}


def test_a_checkpoint_of_before_is_compared_by_sizes(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_000000002"
    shutil.copytree(home / "run" / "checkpoints" / "step_000000002", checkpoint)
    marker = read_marker(checkpoint)
    sizes = {name: entry["size"] for name, entry in marker.pop("vocabularies").items()}
    marker["model"]["tables"] = sizes | {"timestamp": None}
    write_marker(checkpoint, marker)
    with trainer(home / "one", tmp_path / "a", "ranking", *LINES, "TrainerArgs.max_train_iters=3", mesh=mesh) as run:
        run.resume(checkpoint)
    refusal = pytest.raises(CheckpointError, match=r"'item_id' than .* \(121 values instead of 120\)")
    with trainer(home / "larger", tmp_path / "b", "ranking", *LINES, mesh=mesh) as run, refusal:
        run.resume(checkpoint)


def test_a_run_keeps_what_its_ids_stand_for(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    marker = read_marker(home / "run" / "checkpoints" / "latest")["vocabularies"]
    known = Schema.load(home / "one").vocabularies
    embedded = {"item_id", "segment", "cluster", "action"}
    assert {name for name, entry in marker.items() if entry["embedded"]} == embedded
    assert all(entry["identity"] == known.get(name) for name, entry in marker.items())
    kept = Vocabularies(home / "run", Schema.load(home / "run"))
    assert {file.stem for file in (home / "run" / "vocabulary").iterdir()} == embedded - {"action"}  # a bit mask
    assert kept.originals("item_id").to_pylist() == list(range(120))
    assert not (home / "run" / ".vocabulary.partial").exists()
    shutil.rmtree(home / "run" / "vocabulary")
    assert kept_vocabularies(home / "run", {"item_id": known["item_id"]}) is None
    with trainer(home / "one", home / "run", "ranking", *LINES, "TrainerArgs.max_train_iters=3", mesh=mesh) as run:
        run.resume(home / "run" / "checkpoints" / "latest")
        run.train()
    assert kept.originals("item_id").to_pylist() == list(range(120))


def test_a_damaged_vocabulary_is_not_kept(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    data = shutil.copytree(home / "one", tmp_path / "data")
    shutil.copy(home / "segment" / "vocabulary" / "segment.parquet", data / "vocabulary" / "segment.parquet")
    with (
        trainer(data, tmp_path / "run", "ranking", *LINES, mesh=mesh) as run,
        pytest.raises(ValueError, match=r"data/vocabulary/segment.parquet: column 'original' is damaged"),
    ):
        run.train()
    assert not list((tmp_path / "run").glob("*vocabulary*")) and not (tmp_path / "run" / "schema.json").exists()
