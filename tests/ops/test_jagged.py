"""Jagged helpers against Python lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hstu.ops import (
    add_positions,
    concat_jagged,
    interleave_jagged,
    lengths_to_offsets,
    positions_in_sequence,
    sequence_ids,
    split_jagged,
)

sizes = st.lists(st.integers(0, 4), min_size=0, max_size=5)


def ragged(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    lengths_tensor = torch.tensor(lengths, dtype=torch.int64)
    values = torch.randn(sum(lengths), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [part.tolist() for part in values.split(lengths)] if lengths else []
    return values.requires_grad_(), lengths_to_offsets(lengths_tensor), rows


@settings(deadline=None, max_examples=60)
@given(sizes)
def test_positions_and_sequence_ids(lengths: list[int]) -> None:
    offsets = lengths_to_offsets(torch.tensor(lengths, dtype=torch.int32))
    assert offsets.dtype == torch.int64 and offsets.numel() == len(lengths) + 1
    assert positions_in_sequence(offsets, sum(lengths)).tolist() == [p for n in lengths for p in range(n)]
    assert sequence_ids(offsets, sum(lengths)).tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 3), st.randoms(use_true_random=False))
def test_concat_and_split_are_inverse(lengths: list[int], parts: int, random) -> None:
    part_lengths = [random.sample(lengths, len(lengths)) for _ in range(parts)]
    inputs = [ragged(own, seed) for seed, own in enumerate(part_lengths)]
    values, offsets = concat_jagged([(v, o) for v, o, _ in inputs])
    expected = [row for b in range(len(lengths)) for _, _, rows in inputs for row in rows[b]]
    assert values.tolist() == expected
    back = split_jagged(values, offsets, [torch.tensor(own, dtype=torch.int64) for own in part_lengths])
    for (original, _, _), again in zip(inputs, back, strict=True):
        assert torch.equal(original, again)
    weights = [torch.randn_like(x) for x in back]
    sum((x * w).sum() for x, w in zip(back, weights, strict=True)).backward()
    for (original, _, _), weight in zip(inputs, weights, strict=True):
        assert torch.equal(original.grad, weight)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5))
def test_interleave(counts: list[tuple[int, int]]) -> None:
    items, item_offsets, item_rows = ragged([a + c for a, c in counts], 0)
    actions, action_offsets, action_rows = ragged([a for a, _ in counts], 1)
    values, offsets = interleave_jagged(items, item_offsets, actions, action_offsets)
    expected = []
    for own_items, own_actions in zip(item_rows, action_rows, strict=True):
        for position, item in enumerate(own_items):
            expected.append(item)
            expected += own_actions[position : position + 1]
    assert values.tolist() == expected
    assert offsets.diff().tolist() == [2 * a + c for a, c in counts]
    values.sum().backward()
    assert torch.equal(items.grad, torch.ones_like(items))
    assert torch.equal(actions.grad, torch.ones_like(actions))


def test_split_with_known_totals() -> None:
    values, offsets, _ = ragged([3, 2], 0)
    first, second = split_jagged(values, offsets, [torch.tensor([1, 2]), torch.tensor([2, 0])], totals=[3, 2])
    assert torch.equal(first, values[[0, 3, 4]]) and torch.equal(second, values[[1, 2]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_positions(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    x, table = (torch.randn(n, 5, generator=rng, dtype=torch.float64).to(dtype) for n in (9, 4))
    positions = torch.randint(0, 4, (9,), generator=rng)
    grads = []
    for run in (add_positions, lambda x, table, positions, scale: scale * x + table[positions]):
        leaves = [x.clone().requires_grad_(), table.clone().requires_grad_()]
        out = run(*leaves, positions, scale=3.0)
        out.square().sum().backward()
        grads.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="positions must be"):
        add_positions(x, table, positions[:3])
    with pytest.raises(ValueError, match="table must be"):
        add_positions(x, table[:, :2], positions)


def test_errors() -> None:
    values, offsets, _ = ragged([3, 2], 0)
    with pytest.raises(ValueError, match="sample 1"):
        split_jagged(values, offsets, [torch.tensor([3, 1])])
    with pytest.raises(ValueError, match="more actions than items"):
        interleave_jagged(values, offsets, values, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match="part 1 has 1 samples"):
        concat_jagged([(values, offsets), (values, torch.tensor([0, 5]))])
    with pytest.raises(ValueError, match="number of tokens 5"):
        concat_jagged([(values, torch.tensor([0, 2]))])
