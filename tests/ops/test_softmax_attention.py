"""Softmax attention on jagged tensors against a loop over tokens in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.layers.hstu import HSTUConfig
from hstu.ops import Mask, attention_buckets, lengths_to_offsets, softmax_attention
from tests.layers.naive import may_read
from tests.layers.streams import make_config

LENGTHS, CONTEXT, CANDIDATES = (6, 0, 1, 9, 3, 1, 20), (2, 0, 0, 1, 1, 1, 0), (2, 0, 1, 4, 0, 0, 19)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "groups": {"candidate_group_size": 2},
    "window": {"max_attn_len": 2},
    "full_context": {"context_attention": "full"},
}


def inputs(heads: int = 4, groups: int = 4, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 5), (groups, 5), (groups, 3)]
    return [torch.randn(sum(lengths), *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def mask_of(config: HSTUConfig) -> Mask:
    return Mask(
        context_full=config.context_attention == "full",
        candidate_group_size=config.candidate_group_size,
        max_attn_len=config.max_attn_len,
        num_context=torch.tensor(CONTEXT),
        num_candidates=torch.tensor(CANDIDATES),
    )


def naive(q: Tensor, k: Tensor, v: Tensor, config: HSTUConfig | None) -> Tensor:
    rows, start, share = [], 0, q.shape[1] // k.shape[1]
    for length, context, candidates in zip(LENGTHS, CONTEXT, CANDIDATES, strict=True):
        for i in range(length):
            seen = range(length) if config is None else [
                j for j in range(length) if may_read(i, j, length, context, candidates, config)
            ]  # fmt: skip
            for h in range(q.shape[1]):
                weights = [((q[start + i, h] * k[start + j, h // share]).sum() / 5**0.5).exp() for j in seen]
                total = torch.stack(weights).sum()
                rows.append(sum(w / total * v[start + j, h // share] for w, j in zip(weights, seen, strict=True)))
        start += length
    return torch.stack(rows).view(q.shape[0], q.shape[1], -1)


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
    mine = torch.autograd.grad((found * weights).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_those_of_the_definition(variant: str, groups: int) -> None:
    config, leaves = make_config("production", **VARIANTS[variant]), inputs(groups=groups)
    buckets = attention_buckets(lengths_to_offsets(torch.tensor(LENGTHS)), mask_of(config))
    assert len(buckets) > 2
    assert_same(softmax_attention(*leaves, buckets), naive(*leaves, config), leaves)


def test_without_order_every_token_reads_its_whole_sample_and_no_padding() -> None:
    leaves = inputs()
    buckets = attention_buckets(lengths_to_offsets(torch.tensor(LENGTHS)), Mask(causal=False))
    assert_same(softmax_attention(*leaves, buckets), naive(*leaves, None), leaves)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_another_mask_is_caught(variant: str) -> None:
    leaves = inputs()
    buckets = attention_buckets(lengths_to_offsets(torch.tensor(LENGTHS)), mask_of(make_config("production")))
    with pytest.raises(AssertionError):
        assert_same(
            softmax_attention(*leaves, buckets), naive(*leaves, make_config("production", **VARIANTS[variant])), leaves
        )


@pytest.mark.parametrize("lengths", [(0, 0), ()])
def test_nothing_gives_nothing_and_reaches_all_inputs(lengths: tuple[int, ...]) -> None:
    leaves = inputs(groups=2, lengths=lengths)
    out = softmax_attention(
        *leaves, attention_buckets(lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64)), Mask())
    )
    assert out.shape == (0, 4, 3)
    assert all(g is not None for g in torch.autograd.grad(out.sum(), leaves))
