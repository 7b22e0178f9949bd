"""Initial weights are the same however a table is cut; plain tables look up."""

from __future__ import annotations

import pytest
import torch

from hstu.data.batch import keyed_features
from hstu.models.embedding import _BLOCK, EmbeddingTables, Table

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
