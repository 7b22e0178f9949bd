"""Counted work against counters on the reference path."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu.ops import Layout, Mask, hstu_attention, lengths_to_offsets
from hstu.ops.flops import attention_flops, layer_flops, linear_flops, visible_pairs
from tests.ops.attention_cases import CASES, build


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.queries is None])
def test_pairs_are_those_the_reference_attends_to(name: str) -> None:
    """With scores of one value everywhere, the sum of the output counts the visible pairs."""
    (q, _, _), arguments = build(CASES[name])
    options = {k: v for k, v in arguments.items() if k not in ("bias", "alpha")}
    ones = torch.ones(q.shape[0], 1, 1, dtype=torch.float64)
    out = hstu_attention(ones, ones, ones, **options, alpha=1.0, backend="reference")
    counted = out.sum() * arguments["scaling_seqlen"] / torch.nn.functional.silu(torch.tensor(1.0).double())
    pairs = visible_pairs(arguments["layout"], arguments["mask"])
    assert pairs.sum().item() == round(counted.item())


def test_attention_flops_are_those_of_a_counter() -> None:
    """Without a mask the reference computes visible pairs only; its backward saves the scores."""
    lengths = torch.tensor([7, 3, 12])
    heads, qk, v = 3, 5, 4
    x = [torch.randn(22, heads, width, requires_grad=True) for width in (qk, qk, v)]
    layout = Layout(lengths_to_offsets(lengths))
    pairs = int(visible_pairs(layout, Mask(causal=False)).sum())
    expected = attention_flops(pairs, heads, qk, v)
    with FlopCounterMode(display=False) as forward:
        out = hstu_attention(*x, layout, Mask(causal=False), scaling_seqlen=1.0, backend="reference")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert forward.get_total_flops() == expected.forward
    assert backward.get_total_flops() == expected.backward - 2 * pairs * heads * qk


def test_linear_and_layer_flops() -> None:
    weight = torch.randn(6, 10, requires_grad=True)
    x = torch.randn(4, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x @ weight).sum().backward()
    assert counter.get_total_flops() == linear_flops(4, 6, 10).total
    layer = layer_flops(4, 9, 6, 2, 5, 3, concat_gate=True)
    parts = linear_flops(4, 6, 32) + attention_flops(9, 2, 5, 3) + linear_flops(4, 18, 6)
    assert layer == parts and layer.total == layer.forward + layer.backward
