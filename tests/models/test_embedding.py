"""Initial weights are the same however a table is cut; plain tables look up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hstu.config import ConfigError
from hstu.data import SequenceDataset, leave_one_out
from hstu.data.batch import POOL, Batch, keyed_features
from hstu.models import RankingModel, RetrievalModel, build_model, make_collator
from hstu.models.embedding import _BLOCK, EmbeddingTables, Table
from tests.samples import make_config, make_dataset

ROWS = 2 * _BLOCK + 100


def table(**fields: object) -> Table:
    return Table(**{"name": "item", "rows": ROWS, "width": 3, "features": ("item",), "std": 0.1, "seed": 7, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "cuts", [[0, ROWS], [0, 1, ROWS], [0, _BLOCK, 2 * _BLOCK, ROWS], [0, 50, _BLOCK - 1, _BLOCK + 1, ROWS - 1, ROWS]]
)
def test_rows_do_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    whole = table().initial_rows(0, ROWS)
    parts = [table().initial_rows(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)


def test_rows_do_not_depend_on_what_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = table().initial_rows(0, 10)
    state = torch.get_rng_state()
    torch.rand(5)
    assert torch.equal(table().initial_rows(0, 10), first)
    torch.set_rng_state(state)
    table().initial_rows(0, 10)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_ranges() -> None:
    for start, stop in ((0, 0), (5, 5), (_BLOCK, _BLOCK), (ROWS, ROWS)):
        assert table().initial_rows(start, stop).shape == (0, 3)


def test_names_seeds_and_blocks_differ() -> None:
    rows = table().initial_rows(0, ROWS)
    assert not torch.equal(table(name="other").initial_rows(0, ROWS), rows)
    assert not torch.equal(table(seed=8).initial_rows(0, ROWS), rows)
    assert not torch.equal(rows[:_BLOCK], rows[_BLOCK : 2 * _BLOCK])


def test_truncated_normal_with_the_deviation_asked_for() -> None:
    rows = table().initial_rows(0, ROWS)
    assert float(rows.abs().max()) <= 0.2 and abs(float(rows.mean())) < 0.003
    assert float(rows.std()) == pytest.approx(0.1 * 0.88, rel=0.02)  # cut at two deviations


def test_lookup_of_features_that_share_a_table() -> None:
    tables = EmbeddingTables((table(rows=9, features=("item", "more")), table(name="age", rows=4, features=("age",))))
    assert tables.widths == {"item": 3, "more": 3, "age": 3}
    features = keyed_features(["age", "item"], torch.tensor([3, 8, 0]), torch.tensor([[1, 0], [1, 1]]), [1, 2])
    found = tables(features)
    assert set(found) == {"age", "item"}
    assert torch.equal(found["item"], tables.weights["item"][[8, 0]])
    assert torch.equal(found["age"], tables.weights["age"][[3]])


def test_descriptions_without_weights() -> None:
    assert len(list(EmbeddingTables((table(),), allocate=False).parameters())) == 0


@pytest.fixture(scope="module")
def categorized(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    folder = tmp_path_factory.mktemp("data") / "small"
    return make_dataset(folder, [3, 9, 1, 5], num_items=30, categories=("genre", "maker"))


def model_and_batch(
    dataset: SequenceDataset, task: str, kind: str, *lines: str
) -> tuple[RankingModel | RetrievalModel, Batch]:
    config = make_config(task, f"NetworkArgs.item_embedding={kind!r}", "FeatureArgs.unknown_rate=0", *lines)
    model = build_model(config, dataset.schema)
    assert model.item_encoder is not None
    model.item_encoder.read(dataset)
    split = leave_one_out(dataset.lengths)["train"]
    rows = np.arange(len(split))
    return model, make_collator(config, dataset.schema)(dataset, split, rows, rows, 0)


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
@pytest.mark.parametrize("kind", ["categorical", "both"])
def test_items_are_the_sum_of_the_rows_of_their_categories(categorized: SequenceDataset, task: str, kind: str) -> None:
    model, batch = model_and_batch(categorized, task, kind)
    tables = model.embeddings.weights
    assert ("item" in tables) == (kind == "both") and {"genre", "maker"} < {*tables}
    whole = sum(tables[name][torch.from_numpy(categorized.category_ids(name))] for name in ("genre", "maker"))
    if kind == "both":
        whole = whole + tables["item"]
    pool = torch.tensor([4, 4, 29])
    values = model.values(batch, model.lay_out(batch), pool if task == "retrieval" else None)
    found = model.join(model.embeddings(values.features), values)
    torch.testing.assert_close(found["item"], whole[batch.ids("item")])
    if task == "retrieval":
        assert isinstance(model, RetrievalModel)
        torch.testing.assert_close(found[POOL], whole[pool])
        everything = model.catalogue_vectors(batch, torch.arange(30))
        torch.testing.assert_close(everything, model.item_vectors(whole, torch.arange(30)))
    assert {*found} == {*batch.features.keys(), *([POOL] if task == "retrieval" else [])}
    loss = model(batch)
    loss.total.backward()
    assert all(table.grad.abs().sum() > 0 for name, table in tables.items() if name in ("item", "genre", "maker"))


def test_an_item_that_training_never_saw_has_what_its_categories_learned(categorized: SequenceDataset) -> None:
    model, batch = model_and_batch(categorized, "retrieval", "categorical", "RetrievalArgs.loss='full_softmax'")
    vectors = model.catalogue_vectors(batch, torch.arange(30))
    kinds = np.stack([categorized.category_ids(name) for name in ("genre", "maker")], 1)
    twins = [(a, b) for a in range(30) for b in range(a) if (kinds[a] == kinds[b]).all()]
    assert twins and all(torch.equal(vectors[a], vectors[b]) for a, b in twins)


def test_categories_that_are_missing_are_refused(categorized: SequenceDataset, tmp_path: Path) -> None:
    bare = make_dataset(tmp_path / "bare", [3, 4])
    with pytest.raises(ConfigError, match="NetworkArgs.item_embedding = 'both'.*no features of items.*--items"):
        build_model(make_config("retrieval", "NetworkArgs.item_embedding='both'"), bare.schema)
    with pytest.raises(ConfigError, match="no table 'item'; tables: genre"):
        sharding = "EmbeddingArgs.table_sharding_types={'item': 'row_wise'}"
        model_and_batch(categorized, "ranking", "categorical", sharding)
