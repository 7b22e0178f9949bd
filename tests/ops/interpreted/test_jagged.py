"""The kernels that move rows, by the tests of the plain path."""

from __future__ import annotations

import pytest
import torch
import triton

from hstu.ops.jagged import lengths_to_offsets, rows, sequences_and_positions
from tests.ops.test_jagged import (  # noqa: F401 - collected here, where the kernels are in use
    test_add_positions,
    test_interleave,
    test_split_with_known_totals,
)


@pytest.fixture(autouse=True)
def kernels_are_in_use() -> None:
    assert triton.knobs.runtime.interpret and rows._has_kernel("cpu")


@pytest.mark.parametrize("lengths", [(), (0,), (1,), (5, 0, 0, 3), (0, 600, 0, 1, 513, 0), (2,) * 70])
def test_sequences_and_positions(lengths: tuple[int, ...]) -> None:
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64))
    sequence, position = sequences_and_positions(offsets, sum(lengths))
    assert sequence.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]
    assert position.tolist() == [i for n in lengths for i in range(n)]
