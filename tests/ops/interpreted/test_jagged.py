"""The kernels that move rows, by the tests of the plain path."""

from __future__ import annotations

import pytest
import triton

from hstu.ops.jagged import rows
from tests.ops.test_jagged import (  # noqa: F401 - collected here, where the kernels are in use
    test_add_positions,
    test_interleave,
    test_split_with_known_totals,
)


@pytest.fixture(autouse=True)
def kernels_are_in_use() -> None:
    assert triton.knobs.runtime.interpret and rows._has_kernel("cpu")
