from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.data import numbering
from hstu.data.numbering import Numbering, ValueCounts

TABLE = 1 << 10


@pytest.fixture(autouse=True, scope="module")
def small_table() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbering, "_TABLE", TABLE)
        yield


VALUES = st.one_of(
    st.integers(0, 20),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([TABLE - 1, TABLE, 2**40, 2**40 + 1, 2**62, 2**62 + 1, -1]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(VALUES, max_size=12), max_size=9))
def test_counts_of_blocks_are_those_of_the_whole(blocks: list[list[int]]) -> None:
    counts = ValueCounts()
    for block in blocks:
        counts.add(np.array(block, np.int64))
    values, numbers = counts.result()
    expected = Counter(value for block in blocks for value in block)
    assert values.tolist() == sorted(expected)
    assert dict(zip(values.tolist(), numbers.tolist(), strict=True)) == expected


@settings(deadline=None, max_examples=60)
@given(st.sets(VALUES, max_size=12), st.lists(VALUES, max_size=30))
def test_ids_are_positions(known: set[int], column: list[int]) -> None:
    values = np.array(sorted(known), np.int64)
    ids = Numbering(values)(np.array(column, np.int64))
    assert ids.dtype == np.int64
    assert ids.tolist() == [sorted(known).index(value) if value in known else -1 for value in column]


@pytest.mark.parametrize("kind", [np.int8, np.uint32, np.int32])
def test_narrow_types(kind: type) -> None:
    column = np.array([5, 3, 5, 100], kind)
    counts = ValueCounts()
    counts.add(column)
    values, numbers = counts.result()
    assert values.tolist() == [3, 5, 100] and numbers.tolist() == [1, 2, 1]
    assert Numbering(values)(column).tolist() == [1, 0, 1, 2]
