"""Runs over items with texts: what is kept on disk, saved, gone on with, predicted with, exported and planned."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch

import hstu
from hstu.cli import export, predict
from hstu.config import ConfigError
from hstu.models.item_text import ItemText
from hstu.parallel import Mesh
from hstu.training.checkpoint_files import CheckpointError
from hstu.training.plan import measure_demand
from tests import launch
from tests.tiny import BINDINGS
from tests.toy_text import WORDS, save_model, text_dataset
from tests.training.runs import losses, trainer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is an extra: pip install 'hstu[text]'"
)
SHORT = ("DatasetArgs.dataset_name='small'", "TrainerArgs.max_train_iters=6", "TrainerArgs.eval_interval=3",
         "TrainerArgs.ckpt_save_interval=3", "ItemTextArgs.max_tokens=16", "NetworkArgs.item_embedding='both'",
         "RetrievalArgs.eval_metrics=('HR@10',)")  # fmt: skip


@pytest.fixture(scope="module")
def mesh() -> Any:
    with Mesh.create() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("text")
    lengths = np.random.default_rng(1).integers(3, 15, size=70).tolist()
    text_dataset(home / "tmp_data" / "small", lengths, num_items=40, num_actions=2)
    save_model(home / "bert", [*WORDS, *map(str, range(24))])
    return home


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def lines(home: Path, *more: str) -> tuple[str, ...]:
    return *SHORT, f"ItemTextArgs.model={str(home / 'bert')!r}", *more


def data(home: Path) -> Path:
    return home / "tmp_data" / "small"


def vectors_of(run: Any) -> torch.Tensor:
    text = run.model.item_encoder.text
    return text.vectors[text.numbers].clone()


def test_vectors_of_a_frozen_model_are_made_once(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    data = text_dataset(tmp_path / "small", [4, 5, 6, 7]).path
    given = lines(home)
    with trainer(data, tmp_path / "run", "retrieval", *given, mesh=mesh) as run:
        first, text = vectors_of(run), run.model.item_encoder.text
        assert abs(float(text._standard(text.vectors).mean())) < 1e-5
        assert float(text._standard(text.vectors).square().mean()) == pytest.approx(1, abs=1e-5)
    (kept,) = data.glob(".text-*.npy")
    with (
        mock.patch.object(ItemText, "embed", side_effect=AssertionError("read again")),
        trainer(data, tmp_path / "run2", "retrieval", *given, mesh=mesh) as run,
    ):
        assert torch.equal(vectors_of(run), first)
        assert kept.name in Path("/proc/self/maps").read_text()
    with trainer(data, tmp_path / "run3", "retrieval", *given, "ItemTextArgs.prompt='hat '", mesh=mesh) as run:
        assert not torch.allclose(vectors_of(run), first)
    assert len([*data.glob(".text-*.npy")]) == 2
    kept.write_bytes(kept.read_bytes()[:-8] + b"12345678")
    with (
        mock.patch("hstu.training.item_text.logger.warning") as warned,
        trainer(data, tmp_path / "run4", "retrieval", *given, mesh=mesh) as run,
    ):
        assert torch.equal(vectors_of(run), first)
    assert "has other contents than were written" in warned.call_args.args[2]
    kept.unlink()
    with (
        mock.patch("hstu.training.item_text.tempfile.mkstemp", side_effect=OSError(30, "Read-only file system")),
        trainer(data, tmp_path / "run5", "retrieval", *given, mesh=mesh) as run,
    ):
        assert torch.equal(vectors_of(run), first)
    assert not kept.exists() and not [*data.glob(".partial*")]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ranking", "retrieval"])
@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_goes_on(home: Path, tmp_path: Path, mesh: Mesh, task: str, freeze: bool) -> None:
    given = lines(home, f"ItemTextArgs.freeze={freeze}")
    with trainer(data(home), tmp_path / "whole", task, *given, mesh=mesh) as run:
        run.train()
        step = run.run.checkpoints / "step_000000003"
        saved = run.parallel.dense.state()
        assert any(".text.model." in name for name in saved) == (not freeze)
        assert not any(".frozen" in name for name in saved)
    with trainer(data(home), tmp_path / "again", task, *given, mesh=mesh) as run:
        run.resume(step)
        run.train()
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert list(again) == [4, 5, 6]
    assert {step: whole[step] for step in again} == pytest.approx(again, rel=1e-6)


def test_another_model_behind_the_same_name_is_refused(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    save_model(tmp_path / "model", WORDS)
    given = (*SHORT, f"ItemTextArgs.model={str(tmp_path / 'model')!r}")
    with trainer(data(home), tmp_path / "run", "retrieval", *given, mesh=mesh) as run:
        run._save()
        run.checkpointer.wait()
    for words in (
        [*WORDS, "new"],
        WORDS[::-1],
    ):  # another shape; the same model, whose tokenizer numbers words otherwise
        save_model(tmp_path / "model", words)
        with (
            trainer(data(home), tmp_path / "run", "retrieval", *given, mesh=mesh) as run,
            pytest.raises(CheckpointError, match=r"is of another model: ItemTextArgs.model \(contents\)"),
        ):
            run.resume(tmp_path / "run" / "checkpoints" / "step_000000000")


@pytest.mark.parametrize("kind", ["row_wise", "data_parallel"])
def test_rows_start_from_texts(home: Path, tmp_path: Path, mesh: Mesh, kind: str) -> None:
    given = lines(home, "ItemTextArgs.use='start'", f"EmbeddingArgs.sharding_type='{kind}'")
    with trainer(data(home), tmp_path / "run", "retrieval", *given, mesh=mesh) as run:
        assert run.model.item_encoder.text is None
        run.assembly.start_rows()
        batch = next(run.loaders["train"].epoch(0))
        rows = run.model.embeddings(run.model.request(batch).features)
        title = torch.from_numpy(run.dataset.item_features("title"))[batch.ids("item")]
        rows = rows["item"].detach()
        for number in title.unique():
            assert (rows[title == number] == rows[title == number][0]).all()
        assert rows.std() == pytest.approx(0.02, rel=0.5)
        assert rows[title == 0][0].dot(rows[title == 1][0]) != 0
    dynamic = "DynamicEmbeddingArgs.capacity={'item': 32}"
    with (
        pytest.raises(ConfigError, match="DynamicEmbeddingArgs.capacity .* cannot start from texts"),
        trainer(data(home), tmp_path / "run", "retrieval", *given[:-1], dynamic, mesh=mesh),
    ):
        pass


def shop() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events of 40 users, and items of which one has no title."""
    rng = np.random.default_rng(4)
    events = pl.DataFrame({"user": np.repeat(np.arange(40), 8), "item": rng.integers(24, size=320),
                           "time": np.arange(320)}).with_columns(pl.format("i{}", "item").alias("item"))  # fmt: skip
    titles = [f"{('red', 'blue')[n % 2]} {('shoe', 'hat', 'feather')[n % 3]} {n}" for n in range(23)]
    return events, pl.DataFrame({"item": [f"i{n}" for n in range(24)], "title": [*titles, None]})


def fitted(home: Path, run_dir: Path, *, freeze: bool, **more: Any) -> hstu.Run:
    own = [line for line in (*BINDINGS["retrieval"], *SHORT) if "item_embedding" not in line]
    (home / "fit.gin").write_text("\n".join(line for line in own if "dataset_name" not in line))
    events, items = shop()
    text = {"ItemTextArgs.model": str(home / "bert"), "ItemTextArgs.freeze": freeze}
    given = {"items": items, "item_features": "title:text", "run_dir": run_dir, "config": str(home / "fit.gin"),
             "verbose": False, "duplicates": "keep"} | text | more  # fmt: skip
    return hstu.fit(events, user="user", item="item", time="time", **given)


@pytest.mark.parametrize("freeze", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_answers_as_it_was_scored(home: Path, tmp_path: Path, freeze: bool) -> None:
    """From a table of items with titles to predictions and vectors, which need no directory of the language model."""
    shutil.copytree(home / "bert", tmp_path / "bert")
    more = {} if freeze else {"NetworkArgs.backbone": "hf:gpt2", "NetworkArgs.item_embedding": "categorical"}
    run = fitted(home, tmp_path / "run", freeze=freeze, **{"ItemTextArgs.model": str(tmp_path / "bert")} | more)
    assert run.config.network.item_embedding == ("both" if freeze else "categorical")
    assert run.evaluate("test")["metrics"] == pytest.approx(run.scores, abs=1e-12)
    flags = ["--run-dir", str(run.path), "--split", "test", "--top-k", "10", "--output", f"{tmp_path}/out.parquet"]
    assert predict.main(flags) == 0
    found = pl.read_parquet(tmp_path / "out.parquet")
    assert run.scores["HR@10"] == found.filter(pl.col("item") == pl.col("target")).height / 40 > 0
    assert export.main(["--run-dir", str(run.path), "--output", str(tmp_path / "vectors")]) == 0
    assert pl.read_parquet(tmp_path / "vectors" / "items.parquet")["vector"].to_numpy().shape == (24, 16)
    (tmp_path / "bert").rename(tmp_path / "elsewhere")
    assert predict.main([*flags[:-1], f"{tmp_path}/again.parquet"]) == 0
    assert pl.read_parquet(tmp_path / "again.parquet").equals(found)
    given = ("--gin-config-file", str(run.path / "operative.gin"), "--run-dir", str(run.path), "--mode", "eval")
    done = launch.entrypoint()("retrieval", *given, cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads((run.path / "eval.json").read_text())["metrics"] == run.scores
    if freeze:
        (vectors,) = run._opened.dataset.path.glob(".text-*.npy")
        vectors.unlink()
        with pytest.raises(ConfigError, match=rf"model = '{tmp_path}/bert': is gone, and there are no vectors"):
            hstu.open_run(run.path).recommend()
    else:
        with pytest.raises(ConfigError, match="a run keeps this without weights; name the directory of the model"):
            fitted(home, tmp_path / "other", freeze=freeze, **more | {"ItemTextArgs.model": f"{run.path}/text_model"})


def test_items_without_texts_are_found_before_anything_is_trained(home: Path, tmp_path: Path) -> None:
    _, items = shop()
    with pytest.raises(ValueError, match=r"items: 1 of 24 items of .* are missing \(for example 'i9'\)"):
        fitted(home, tmp_path / "run", freeze=True, items=items.filter(pl.col("item") != "i9"))
    with pytest.raises(ValueError, match="column 'name' is missing"):
        fitted(home, tmp_path / "run", freeze=True, item_features="name:text")
    with pytest.raises(ValueError, match="column 'title' has no value in any row"):
        fitted(home, tmp_path / "run", freeze=True, items=items.with_columns(pl.lit("").alias("title")))


@pytest.mark.slow
def test_a_plan_counts_the_language_model(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    work = {}
    for freeze in (True, False):
        given = lines(home, f"ItemTextArgs.freeze={freeze}")
        with trainer(data(home), tmp_path / f"run{freeze}", "retrieval", *given, mesh=mesh) as run:
            demand = measure_demand(run.config, run.dataset, next(run.loaders["train"].epoch(0)))
            assert demand.dense == sum(p.numel() for p in run.parallel.dense.ddp.module.parameters())
            work[freeze] = demand
    assert work[False].flops > work[True].flops and work[False].dense > work[True].dense
