"""Extensions behind a cache, by the kernels: the rows that the definition gives in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.layers.test_cache import BLOCKS, KINDS, MASKS, make_stack, make_tokens, random_cuts, run_in_pieces


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_extensions_give_the_rows_of_one_pass(kind: str, mask: str) -> None:
    tokens = make_tokens(BLOCKS, torch.float32)
    stack = make_stack(kind, MASKS[mask], torch.float32)
    exact = make_stack(kind, MASKS[mask])(make_tokens(BLOCKS))
    calls = []

    def by_kernels(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values, **fields: calls.append(run) or run(*values, **(fields | {"backend": "triton"}))

    for layer in stack.layers:
        layer.attention = by_kernels(layer.attention)
    found, _ = run_in_pieces(stack, tokens, random_cuts(tokens, 2, 5))
    assert len(calls) == 6, "two layers, three times"
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
