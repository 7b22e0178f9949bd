"""Values of contexts and categories that training never met have a row of their own, which training moves."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu.data import SequenceDataset, leave_one_out
from hstu.data.batch import Batch
from hstu.data.seen import met_categories
from hstu.models import RetrievalModel, build_model, make_collator
from hstu.models.tables import make_tables
from hstu.training.checkpoint_files import CheckpointError, find_checkpoint
from tests.models.test_models import totals
from tests.samples import make_config, make_dataset
from tests.training.runs import trainer

USERS, UNKNOWN = 400, 7
OFTEN = "FeatureArgs.unknown_rate=0.25"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("unknown") / "small", [4] * USERS, num_items=300, categories=("kind",))


def batch_of(dataset: SequenceDataset, split: str, rows: np.ndarray, epoch: int = 0, *lines: str) -> Batch:
    collate = make_collator(make_config("retrieval", OFTEN, *lines), dataset.schema)
    return collate(dataset, leave_one_out(dataset.lengths)[split], rows, rows + epoch * USERS, 0)


def test_training_loses_contexts_by_seed_and_sample(dataset: SequenceDataset) -> None:
    rows = np.arange(USERS)
    true = dataset.gather(rows, rows * 0, rows * 0).contexts
    lost = {}
    for epoch in (0, 1):
        batch = batch_of(dataset, "train", rows, epoch)
        for name in ("country", "age"):
            ids = batch.ids(name).numpy()
            lost[name, epoch] = ids == UNKNOWN
            assert (ids == np.where(lost[name, epoch], UNKNOWN, true[name])).all()
            # 0.25 with a deviation of 0.022 over 400 draws
            assert 0.16 < lost[name, epoch].mean() < 0.34
    some = [tuple(draw) for draw in lost.values()] + [tuple(batch_of(dataset, "train", rows, 0, "TrainerArgs.seed=5")
                                                            .ids("age").numpy() == UNKNOWN)]  # fmt: skip
    assert len(set(some)) == len(some), "each context, epoch and seed draws anew"
    part = batch_of(dataset, "train", rows[::-3])
    assert torch.equal(part.ids("age"), batch_of(dataset, "train", rows).ids("age")[rows[::-3].copy()])
    for split in ("valid", "test"):
        assert (batch_of(dataset, split, rows).ids("age").numpy() == true["age"]).all(), "nothing is lost afterwards"


def test_training_loses_actions_by_seed_sample_and_event(dataset: SequenceDataset) -> None:
    rows, unknown = np.arange(USERS), 4
    config = make_config("ranking", OFTEN, "DatasetArgs.max_num_candidates=1")

    def collated(split: str, rows: np.ndarray, epoch: int = 0, **changes: object) -> Batch:
        collate = replace(make_collator(config, dataset.schema), **changes)  # type: ignore[arg-type]
        return collate(dataset, leave_one_out(dataset.lengths)[split], rows, rows + epoch * USERS, 0)

    batch, whole = collated("train", rows), collated("train", rows, unknown_rate=0.0)
    (table,) = [table for table in make_tables(config, dataset.schema) if table.name == "action"]
    assert torch.equal(batch.labels, whole.labels) and table.rows == unknown + 1 and table.unknown
    drawn = [batch, collated("train", rows, 1), collated("train", rows, seed=5)]
    for ids in (found.ids("action") for found in drawn):
        lost = ids == unknown
        assert torch.equal(ids, torch.where(lost, unknown, whole.ids("action")))
        assert 0.16 < float(lost.double().mean()) < 0.34  # 0.25 +- 4 x 0.022 over 400 events
    assert len({tuple(found.ids("action").tolist()) for found in drawn}) == len(drawn)
    part = collated("train", rows[::-3])
    assert torch.equal(part.ids("action"), batch.ids("action")[rows[::-3].copy()]), "whoever is beside it"
    assert int(collated("test", rows).ids("action").max()) < unknown, "nothing is lost afterwards"


@torch.no_grad()
def test_losses_do_not_depend_on_the_number_of_ranks(dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_dataset(dataset.path.parent / "few", [4, 9, 3, 7, 5, 3, 8], num_items=30)
    config = make_config("retrieval", OFTEN)
    expected = totals(small, config, 1, monkeypatch)
    assert totals(small, config, 2, monkeypatch) == pytest.approx(expected, rel=1e-5)
    never = replace(config, feature=replace(config.feature, unknown_rate=1e-9))
    assert totals(small, never, 1, monkeypatch) != pytest.approx(expected, rel=1e-3), "something was lost"


def test_training_loses_categories_by_seed_step_and_item(dataset: SequenceDataset) -> None:
    config = make_config("retrieval", OFTEN, "NetworkArgs.item_embedding='categorical'")
    model = build_model(config, dataset.schema)
    assert isinstance(model, RetrievalModel) and model.item_encoder is not None
    trained = torch.arange(300) % 3 > 0
    kinds = dataset.category_ids("kind")
    kinds_met = set(kinds[trained.numpy()].tolist())
    met = met_categories(dataset, trained)
    assert {*np.flatnonzero(met["kind"]).tolist()} == kinds_met and len(met["kind"]) == 6
    met["kind"][2] = False  # as if no trained item had it
    model.item_encoder.read(dataset, met)
    expected = torch.from_numpy(np.where(kinds == 2, 5, kinds))
    items = torch.arange(300)
    drawn = [model.item_encoder.ids_of(items, step)[0] for step in (0, 1)]
    for ids in drawn:
        assert (ids == torch.where(ids == 5, 5, expected)).all()
        assert 0.14 < float((ids[expected != 5] == 5).double().mean()) < 0.36  # 0.25 +- 4 x 0.028
    assert not torch.equal(*drawn)
    assert torch.equal(model.item_encoder.ids_of(items.flip(0), 1)[0].flip(0), drawn[1]), "wherever an item stands"
    batch = batch_of(dataset, "train", np.arange(20), 0, "NetworkArgs.item_embedding='categorical'")
    model(batch).total.backward()
    for name, row in (("kind", 5), ("age", UNKNOWN)):
        table = model.embeddings.weights[name]  # type: ignore[index, union-attr]
        assert table.shape[0] == row + 1 and table.grad[row].abs().sum() > 0  # type: ignore[index]
    model.eval()
    assert torch.equal(model.item_encoder.ids_of(items, 0)[0], expected), "nothing is lost afterwards"


def test_what_no_training_user_has_is_unknown_to_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = make_dataset(tmp_path / "synthetic", [5] * 10, num_items=30, categories=("kind",))
    caplog.set_level(logging.INFO, "hstu")
    about = ("DatasetArgs.protocol='by_user'", "TrainerArgs.max_train_iters=1", "NetworkArgs.item_embedding='both'")
    with trainer(dataset.path, tmp_path / "run", "retrieval", *about) as run:
        assert run.train() is not None
        users = np.arange(10)
        ages = dataset.gather(users, users * 0, users * 0).contexts["age"]
        strange = ~np.isin(ages[7:], ages[:7])
        (batch,) = run.loaders["test"].epoch(0)
        assert strange.any() and not strange.all()
        assert batch.ids("age").tolist() == np.where(strange, UNKNOWN, ages[7:]).tolist()
        shown = dataset.gather(users[:7], users[:7] * 0, dataset.lengths[:7]).items
        assert np.flatnonzero(run.assembly.trained_items.numpy()).tolist() == np.unique(shown).tolist()
    missing = 7 - np.unique(ages[:7]).size
    assert f"{missing} of age" in caplog.text and "no training sample has" in caplog.text


def test_a_checkpoint_without_the_row_says_how_to_use_it(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "synthetic", [5] * 10, num_items=30)
    without = ("FeatureArgs.unknown_rate=0", "TrainerArgs.max_train_iters=1")
    with trainer(dataset.path, tmp_path / "run", "retrieval", *without) as run:
        run.train()
        assert {t.name: t.rows for t in run.parallel.tables.tables} == {"item": 30, "country": 7, "age": 7}
        batch = next(run.loaders["test"].epoch(0))
        assert int(batch.ids("age").max()) < UNKNOWN
    latest = find_checkpoint(tmp_path / "run" / "checkpoints", "latest")
    assert latest is not None
    with (
        trainer(dataset.path, tmp_path / "run", "retrieval", "TrainerArgs.max_train_iters=2") as run,
        pytest.raises(CheckpointError, match=r"no rows for unknown values.*FeatureArgs.unknown_rate = 0"),
    ):
        run.resume(latest)


def test_a_model_without_such_features_takes_a_checkpoint_without_the_row(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "synthetic", [5] * 10, num_items=30, contexts=())
    with trainer(dataset.path, tmp_path / "run", "retrieval", "FeatureArgs.unknown_rate=0",
                 "TrainerArgs.max_train_iters=1") as run:  # fmt: skip
        run.train()
    latest = find_checkpoint(tmp_path / "run" / "checkpoints", "latest")
    assert latest is not None
    with trainer(dataset.path, tmp_path / "run", "retrieval", "TrainerArgs.max_train_iters=2") as run:
        run.resume(latest)
        assert run.progress.step == 1
