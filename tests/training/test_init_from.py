"""A run that starts from another one, whose ids stood for other values, goes on as the other would have."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.data import write_dataset
from hstu.ops.row_sets import WAYS
from hstu.parallel import Mesh
from hstu.training.checkpoint_files import CheckpointError, read_marker, write_marker
from hstu.training.init_from import find_source
from hstu.training.saved_tensors import SavedTensors
from hstu.training.trainer import Trainer
from tests.launch import run, torchrun_command
from tests.tiny import renumber, tiny
from tests.training.runs import losses, records, trainer, worst

STEPS = 4  # an epoch: the next one begins with the same batch, for nothing is shuffled
SAME = ("DatasetArgs.shuffle=False", "NetworkArgs.hidden_dropout=0.0", "TrainerArgs.eval_interval=4",
        "FeatureArgs.unknown_rate=1e-12")  # fmt: skip
CLASSES = ("RankingArgs.prediction_head_arch=[16, 5]", "RankingArgs.num_tasks=1",
           "NetworkArgs.item_embedding='both'")  # fmt: skip
RETRIEVAL = (
    "retrieval",
    "RetrievalArgs.num_negatives=-1",
    "RetrievalArgs.item_bias=True",
    "NetworkArgs.item_embedding='both'",
)
VARIANTS = {
    "row-wise": ("ranking", *CLASSES),
    "mixed": (*RETRIEVAL, "EmbeddingArgs.table_sharding_types={'item_id': 'column_wise', 'segment': 'data_parallel', "
                          "'cluster': 'table_wise'}"),
    "data-parallel": (*RETRIEVAL, "EmbeddingArgs.sharding_type='data_parallel'",
                      "OptimizerArgs.use_distributed_optimizer=True"),
    "adagrad": ("ranking", *CLASSES, "OptimizerArgs.sparse_optimizer_str='rowwise_adagrad'",
                "OptimizerArgs.optimizer_str='sgd'", "OptimizerArgs.sgd_momentum=0.9"),
}  # fmt: skip
VARIANTS["dynamic"] = (*VARIANTS["row-wise"], "DynamicEmbeddingArgs.capacity={'item_id': 600, 'segment': 40}")
SMALL = "DynamicEmbeddingArgs.capacity={'item_id': 67}"
NEW = {"item_id": [1000, 1001, 1002], "segment": [77], "action": [9]}


def another_order(seed: int, more: dict[str, list] | None = None) -> Any:
    """The same log with every vocabulary in another order, and ``more`` values in them."""
    source, rng = tiny(120, classes=5), np.random.default_rng(seed)
    sizes = {f.name: f.vocab_size or 0 for f in source.schema.features if f.role not in ("user", "time")}
    orders = {name: rng.permutation(size + len((more or {}).get(name, []))) for name, size in sizes.items()}
    return renumber(source, orders, more)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of one log: ``one``; ``other``, its ids in another order; ``larger``, with new ids as well."""
    folder = tmp_path_factory.mktemp("init_from")
    write_dataset(tiny(120, classes=5), folder / "one")
    write_dataset(another_order(1), folder / "other")
    write_dataset(another_order(2, NEW), folder / "larger")
    return folder


@pytest.fixture(scope="module")
def mesh() -> Any:
    with Mesh.create() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def sources(home: Path, mesh: Mesh) -> Any:
    """Get the run of a variant on ``one``: steps 1 to 4, and 5 to 7 from there."""

    def get(variant: str) -> Path:
        path = home / "runs" / variant
        if not path.is_dir():
            task, *lines = VARIANTS[variant]
            with trainer(
                home / "one", path, task, *SAME, *lines, f"TrainerArgs.max_train_iters={STEPS}", mesh=mesh
            ) as run:
                run.train()
            more = f"TrainerArgs.max_train_iters={STEPS + 3}"
            with trainer(home / "one", home / "more" / variant, task, *SAME, *lines, more, mesh=mesh) as run:
                run.resume(path / "checkpoints" / "latest")
                run.train()
        return path

    return get


def continued(home: Path, variant: str) -> dict[int, float]:
    """Steps 5 to 7 of the run that never saw another vocabulary, numbered from 1."""
    return {step - STEPS: loss for step, loss in losses(home / "more" / variant).items() if step > STEPS}


def start(data: Path, path: Path, variant: str, source: Path, *more: str, mesh: Mesh) -> Any:
    task, *lines = VARIANTS[variant]
    return trainer(data, path, task, *SAME, *lines, *more, f"TrainerArgs.init_from={str(source)!r}", mesh=mesh)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_steps_are_those_of_the_unbroken_run(
    home: Path, sources: Any, tmp_path: Path, mesh: Mesh, variant: str
) -> None:
    source = sources(variant)
    with start(home / "other", tmp_path, variant, source, "TrainerArgs.max_train_iters=3", mesh=mesh) as run:
        run.start_from(find_source(str(source / "checkpoints" / "latest"), tmp_path))
        before = run.assembly.score("test", 0)["metrics"]
        run.train()
    if variant != "dynamic":  # where items without a row share those of their numbers
        assert before == pytest.approx(json.loads((source / "eval.json").read_text())["metrics"], abs=1e-6)
    assert worst(losses(tmp_path), continued(home, variant)) < 1e-5
    (record,) = records(tmp_path, "init")
    kept = 108 if variant == "dynamic" else 120  # the items that training met
    assert record["rows"]["item_id"] == {"kept": kept, "new": 0, "left_out": 0} and not record["optimizer_state_anew"]
    assert record["checkpoint_step"] == STEPS and record["checkpoint"].endswith("step_000000004")


@pytest.mark.parametrize("layouts", [("row-wise", "data_parallel"), ("data-parallel", "row_wise")])
def test_a_table_may_be_laid_out_otherwise(
    home: Path, sources: Any, tmp_path: Path, mesh: Mesh, layouts: tuple[str, str]
) -> None:
    source, variant = sources(layouts[0]), layouts[0]
    saved = SavedTensors((source / "checkpoints" / "latest").resolve())
    names = {
        "weight": ("tables/16/embeddings.item_id.weight", "dense/replicated.weights.item_id"),
        "item_id.momentum1": ("tables_optimizer/16/embeddings.item_id.weight/item_id.momentum1",
                              "optimizer/replicated.weights.item_id.exp_avg"),
        "item_id.exp_avg_sq": ("tables_optimizer/16/embeddings.item_id.weight/item_id.exp_avg_sq",
                               "optimizer/replicated.weights.item_id.exp_avg_sq"),
    }  # fmt: skip
    lines = (f"EmbeddingArgs.sharding_type={layouts[1]!r}", "TrainerArgs.max_train_iters=1")
    with start(home / "other", tmp_path, variant, source, *lines, mesh=mesh) as run:
        run.start_from(find_source(str(source / "checkpoints" / "latest"), tmp_path))
        originals = torch.from_numpy(run.dataset.vocabulary("item_id").copy())
        if layouts[1] == "row_wise":
            found = rows_of(run, "item_id")
        else:
            state = {f"dense/{name}": value for name, value in run.parallel.dense.state().items()}
            state |= {f"optimizer/{name}": value for name, value in run.optimizer.state().items()}
            found = {what: state[whole] for what, (_, whole) in names.items()}
        for what, pair in names.items():
            (key,) = (key for key in pair if key in saved.shapes)
            assert torch.equal(found[what], saved.whole(key)[originals]) and found[what].any(), what
        run.train()
    assert worst(losses(tmp_path), {1: continued(home, variant)[1]}) < 1e-5


def rows_of(run: Trainer, name: str) -> dict[str, torch.Tensor]:
    """The weight and the moments of a sharded table, on one rank."""
    for collection in run.parallel.tables.collections.values():
        moments = collection.fused_optimizer.state_dict()["state"]
        for full, weight in collection.state_dict().items():
            if full.split(".")[-2] == name:
                (shard,) = weight.local_shards()
                held = {moment: value.local_shards()[0].tensor for moment, value in moments[full].items()}
                return {"weight": shard.tensor, **held}
    raise AssertionError(name)


def test_known_ids_keep_their_rows_and_new_ones_are_fresh(home: Path, sources: Any, tmp_path: Path, mesh: Mesh) -> None:
    source = sources("row-wise")
    wider = "RankingArgs.prediction_head_arch=[16, 6]"
    saved, values = SavedTensors((source / "checkpoints" / "latest").resolve()), {}
    with start(home / "larger", tmp_path, "row-wise", source, wider, mesh=mesh) as run:
        tables = {table.name: table for table in run.parallel.tables.tables}
        head = run.parallel.dense.state()["head.layers.2.weight"].clone()
        run.start_from(find_source(str(source), tmp_path))
        assert run.started_from is not None
        for name in ("item_id", "segment", "action", "cluster"):
            values[name] = run.dataset.vocabulary(name)
            held, number = rows_of(run, name), len(values[name])
            assert run.started_from["rows"][name] == {
                "kept": number - len(NEW.get(name, [])), "new": len(NEW.get(name, [])), "left_out": 0
            }  # fmt: skip
            for what, tensor in held.items():
                key = (
                    "tables/16/embeddings.{0}.weight"
                    if what == "weight"
                    else f"tables_optimizer/16/embeddings.{{0}}.weight/{what}"
                )
                there = saved.whole(key.format(name))
                fresh = tables[name].initial_rows(0, number) if what == "weight" else torch.zeros_like(tensor)
                for row, original in enumerate(values[name].tolist()):
                    wanted = fresh[row] if original in NEW.get(name, []) else there[original]
                    assert torch.equal(tensor[row], wanted), (name, what, original)
            assert any(bool(there.any()) for what, there in held.items() if what != "weight")
            if tables[name].unknown:  # its row stands behind those of the values
                assert len(held["weight"]) == number + 1
                assert torch.equal(held["weight"][-1], saved.whole(f"tables/16/embeddings.{name}.weight")[-1])
        new_head = run.parallel.dense.state()["head.layers.2.weight"]
        for row, original in enumerate(values["action"].tolist()):
            wanted = head[row] if original == 9 else saved.whole("dense/head.layers.2.weight")[original]
            assert torch.equal(new_head[row], wanted)


def rows_by_original(run: Trainer) -> dict[int, tuple[torch.Tensor, int]]:
    """Of each item that has a row in a dynamic table: the row, and its score."""
    (table,) = run.parallel.tables.maps  # type: ignore[attr-defined]
    known, weight = run.parallel.tables.maps[table].map, rows_of(run, "item_id")["weight"]  # type: ignore[attr-defined]
    ids = torch.arange(run.checkpointer.vocabularies["item_id"]["size"])
    places = known._find(ids)
    originals = run.dataset.vocabulary("item_id")
    return {
        int(originals[i]): (weight[known.row_of(place)].clone(), int(known.scores[place]))
        for i, place in zip(ids.tolist(), places, strict=True)
        if place < known.size
    }


@pytest.mark.parametrize("strategy", ["lru", "lfu"])
def test_ids_that_had_one_of_few_rows_keep_it(home: Path, tmp_path: Path, mesh: Mesh, strategy: str) -> None:
    lines = (
        *SAME,
        *CLASSES,
        SMALL,
        f"DynamicEmbeddingArgs.evict_strategy={strategy!r}",
        "TrainerArgs.max_train_iters=3",
    )
    with trainer(home / "one", tmp_path / "source", "ranking", *lines, mesh=mesh) as run:
        run.train()
        wanted = rows_by_original(run)
        spare = rows_of(run, "item_id")["weight"][-16:].clone()
        clock = run.parallel.tables.row_maps()["item_id/clock"].clone()
    assert 40 < len(wanted) <= 51
    with trainer(home / "other", tmp_path / "run", "ranking", *lines, mesh=mesh) as run:
        run.start_from(find_source(str(tmp_path / "source"), tmp_path / "run"))
        found = rows_by_original(run)
        assert run.started_from is not None
        ((_, rows),) = run.parallel.tables.maps.items()  # type: ignore[attr-defined]
        sets = rows.map._sets(torch.arange(120))
        lowest = rows.map.scores[:-1].view(-1, WAYS)[sets].flatten(1).amin(1)
        full = dict(zip(run.dataset.vocabulary("item_id").tolist(), lowest.tolist(), strict=True))
        counts = run.started_from["rows"]["item_id"]
        assert counts == {"kept": len(found), "new": 0, "left_out": len(wanted) - len(found)}
        assert torch.equal(run.parallel.tables.row_maps()["item_id/clock"], clock)
        assert torch.equal(rows_of(run, "item_id")["weight"][-16:], spare)
        run.train()
    # Its sets are others, and of those too full the ids with the lowest scores stay out.
    assert len(found) > 40 and found.keys() <= wanted.keys()
    assert all(torch.equal(row, wanted[item][0]) and score == wanted[item][1] for item, (row, score) in found.items())
    assert all(full[item] >= wanted[item][1] for item in wanted.keys() - found.keys())


def test_a_table_may_become_dynamic_or_cease_to_be(home: Path, sources: Any, tmp_path: Path, mesh: Mesh) -> None:
    for there, here in (("dynamic", "row-wise"), ("row-wise", "dynamic")):
        path = tmp_path / here
        with start(home / "other", path, here, sources(there), "TrainerArgs.max_train_iters=3", mesh=mesh) as run:
            run.start_from(find_source(str(sources(there) / "checkpoints" / "latest"), path))
            run.train()
        assert worst(losses(path), continued(home, there)) < 1e-5
    refusal = pytest.raises(CheckpointError, match="'item_id' has 120 rows there .*capacity gives 67")
    with start(home / "other", tmp_path / "few", "row-wise", sources("row-wise"), SMALL, mesh=mesh) as run, refusal:
        run.start_from(find_source(str(sources("row-wise")), tmp_path / "few"))


def test_ids_that_are_gone_are_counted(home: Path, sources: Any, tmp_path: Path, mesh: Mesh) -> None:
    lines = VARIANTS["mixed"][1:]
    larger = tmp_path / "larger"
    with trainer(
        home / "larger", larger, "retrieval", *SAME, *lines, "TrainerArgs.max_train_iters=1", mesh=mesh
    ) as run:
        run.train()
    with start(home / "one", tmp_path / "run", "mixed", larger, mesh=mesh) as run:
        run.start_from(find_source(str(larger), run.run.path))
    assert run.started_from is not None
    assert run.started_from["rows"]["item_id"] == {"kept": 120, "new": 0, "left_out": 3}
    assert run.started_from["rows"]["segment"]["left_out"] == 1


def test_the_data_set_of_the_other_run_may_be_gone(home: Path, sources: Any, tmp_path: Path, mesh: Mesh) -> None:
    shutil.copytree(sources("row-wise"), tmp_path / "run", symlinks=True)
    shutil.copytree(home / "other", tmp_path / "data")
    with start(tmp_path / "data", tmp_path / "new", "row-wise", tmp_path / "run", mesh=mesh) as run:
        run.start_from(find_source(str(tmp_path / "run"), run.run.path))
        vocabulary = tmp_path / "run" / "vocabulary" / "item_id.parquet"
        vocabulary.write_bytes((home / "other" / "vocabulary" / "item_id.parquet").read_bytes())
        with pytest.raises(ValueError, match=r"run/vocabulary/item_id.parquet: column 'original' is damaged"):
            run.start_from(find_source(str(tmp_path / "run"), run.run.path))
        vocabulary.unlink()
        with pytest.raises(
            CheckpointError, match="vocabulary of 'item_id' that it was trained on is not in its run dir"
        ):
            run.start_from(find_source(str(tmp_path / "run"), run.run.path))


def test_another_optimizer_begins_anew_and_is_told(home: Path, sources: Any, tmp_path: Path, mesh: Mesh) -> None:
    source = sources("row-wise")
    lines = ("OptimizerArgs.sparse_optimizer_str='adagrad'", "OptimizerArgs.optimizer_str='adamw'")
    with start(home / "other", tmp_path, "row-wise", source, *lines, mesh=mesh) as run:
        run.start_from(find_source(str(source), tmp_path))
        assert run.started_from is not None
        assert run.started_from["optimizer_state_anew"] == ["tables (adam there, adagrad here)"]
        assert (run.progress.step, run.progress.dense_steps, run.progress.table_steps) == (0, STEPS, 0)
        assert not rows_of(run, "item_id")["item_id.momentum1"].any()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("NetworkArgs.hidden_size=8",), "NetworkArgs.hidden_size is 16 there and 8 here"),
        (
            ("RankingArgs.prediction_head_arch=[8, 5]",),
            r"RankingArgs.prediction_head_arch is \[16\] there and \[8\] here",
        ),
        (("DatasetArgs.max_history_seqlen=12",), "DatasetArgs.max_history_seqlen is 16 there and 12 here"),
        (("NetworkArgs.item_embedding='local'",), "NetworkArgs.item_embedding is 'both' there and 'local' here"),
    ],
)
def test_another_model_is_refused(
    home: Path, sources: Any, tmp_path: Path, mesh: Mesh, lines: tuple[str, ...], message: str
) -> None:
    source = sources("row-wise")
    with (
        start(home / "other", tmp_path, "row-wise", source, *lines, mesh=mesh) as run,
        pytest.raises(CheckpointError, match=f"TrainerArgs.init_from = .*is of another model: {message}") as caught,
    ):
        run.start_from(find_source(str(source), tmp_path))
    assert "\n" not in str(caught.value)


def test_features_that_differ_are_named(home: Path, sources: Any, tmp_path: Path, mesh: Mesh) -> None:
    source = sources("row-wise")
    path = shutil.copytree(source, tmp_path / "run", symlinks=True) / "checkpoints" / "step_000000004"
    marker = read_marker(path)
    marker["vocabularies"]["plan"] = marker["vocabularies"]["segment"]
    write_marker(path, marker)
    with start(home / "other", tmp_path / "new", "row-wise", source, mesh=mesh) as run:
        with pytest.raises(CheckpointError, match="features that are embedded here and there differ in 'plan'"):
            run.start_from(path)
        del marker["vocabularies"]
        write_marker(path, marker)
        with pytest.raises(CheckpointError, match="was written by a version that kept no vocabularies"):
            run.start_from(path)


def test_what_is_no_source_is_refused(home: Path, sources: Any, tmp_path: Path) -> None:
    source = sources("row-wise")
    best = source / "checkpoints" / "step_000000004"
    for name in (source, source / "checkpoints" / "best", source / "checkpoints" / "latest", best):
        assert find_source(str(name), tmp_path) == best.resolve()
    for name in (source, source / "checkpoints" / "best"):
        with pytest.raises(CheckpointError, match="is this run itself"):
            find_source(str(name), source)
    for name in (tmp_path, tmp_path / "absent", source / "checkpoints"):
        with pytest.raises(CheckpointError, match=f"init_from = {re.escape(repr(str(name)))}: is neither a run dir"):
            find_source(str(name), tmp_path / "new")


@pytest.mark.slow
def test_two_ranks_start_from_one_and_one_from_two(home: Path, sources: Any, tmp_path: Path, mesh: Mesh) -> None:
    source, names = sources("mixed"), ("mixed", "row-wise", "dynamic")
    sources("row-wise"), sources("dynamic")
    worker = Path(__file__).with_name("init_from_worker.py")
    done = run(torchrun_command(2, worker, str(home), str(tmp_path), *names), timeout=200, cwd=tmp_path)
    assert done.code == 0, done.err[-4000:]
    for name in names:
        assert worst(losses(tmp_path / name), {k: v for k, v in continued(home, name).items() if k < 3}) < 1e-5
    with start(home / "one", tmp_path / "one", "mixed", source, "TrainerArgs.max_train_iters=1", mesh=mesh) as one:
        one.start_from(find_source(str(tmp_path / "mixed" / "checkpoints" / "latest"), one.run.path))
        one.progress.samples = 64  # which two ranks have taken
        one._keep_position()
        one.progress.step = 0
        one.train()
    assert losses(tmp_path / "one")[1] == pytest.approx(continued(home, "mixed")[3], rel=1e-5)


def test_classes_of_one_softmax_among_several_tasks_have_to_be_the_same(home: Path, tmp_path: Path, mesh: Mesh) -> None:
    lines = (
        "RankingArgs.tasks=(('first', 'multiclass', 'action'), ('again', 'multiclass', 'action'))",
        "RankingArgs.prediction_head_arch=[16, 10]",
        "RankingArgs.eval_metrics=('ACCURACY',)",
        "TrainerArgs.max_train_iters=1",
    )
    with trainer(home / "one", tmp_path / "source", "ranking", *SAME, *lines, mesh=mesh) as run:
        run.train()
    found = find_source(str(tmp_path / "source"), tmp_path / "other")
    with trainer(home / "one", tmp_path / "same", "ranking", *SAME, *lines, mesh=mesh) as run:
        run.start_from(found)
    refused = pytest.raises(CheckpointError, match="values of 'action', which a task of several predicts, are others")
    with trainer(home / "other", tmp_path / "other", "ranking", *SAME, *lines, mesh=mesh) as run, refused:
        run.start_from(found)
