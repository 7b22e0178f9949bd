"""Softmax attention on jagged tensors against a loop over tokens in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.ops import Layout, Mask, lengths_to_offsets, softmax_attention
from hstu.ops.attention.softmax import attention_buckets
from tests.layers.naive import may_attend
from tests.ops.attention_cases import CASES, build, outputs_and_gradients

LENGTHS, CONTEXT, CANDIDATES = (6, 0, 1, 9, 3, 1, 20), (2, 0, 0, 1, 1, 1, 0), (2, 0, 1, 4, 0, 0, 19)
VARIANTS = {
    "plain": Mask(),
    "groups": Mask(candidate_group_size=2),
    "window": Mask(max_attn_len=2),
    "full_context": Mask(context="full"),
}
BACKENDS = ("reference", "cpu")


def inputs(heads: int = 4, groups: int = 4, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, 5), (groups, 5), (groups, 3)]
    return [torch.randn(sum(lengths), *s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def layout_of(lengths: tuple[int, ...] = LENGTHS) -> Layout:
    return Layout(
        lengths_to_offsets(torch.tensor(lengths)),
        num_context=torch.tensor(CONTEXT),
        num_candidates=torch.tensor(CANDIDATES),
    )


def naive(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    rows, start, share = [], 0, q.shape[1] // k.shape[1]
    for length, context, candidates in zip(LENGTHS, CONTEXT, CANDIDATES, strict=True):
        for i in range(length):
            seen = range(length) if mask is None else [
                j for j in range(length) if may_attend(i, j, length, context, candidates, mask)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_those_of_the_definition(variant: str, groups: int, backend: str) -> None:
    mask, leaves, layout = VARIANTS[variant], inputs(groups=groups), layout_of()
    assert len(attention_buckets(layout, mask, layout)) > 2
    assert_same(softmax_attention(*leaves, layout, mask, backend=backend), naive(*leaves, mask), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_order_every_token_attends_to_its_whole_sample_and_no_padding(backend: str) -> None:
    leaves, layout = inputs(), Layout(lengths_to_offsets(torch.tensor(LENGTHS)))
    assert_same(softmax_attention(*leaves, layout, Mask(causal=False), backend=backend), naive(*leaves, None), leaves)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_another_mask_is_caught(variant: str) -> None:
    leaves = inputs()
    with pytest.raises(AssertionError):
        assert_same(softmax_attention(*leaves, layout_of()), naive(*leaves, VARIANTS[variant]), leaves)


@pytest.mark.parametrize("name", [name for name in CASES if "bias" not in name and name not in ("position", "time")])
def test_every_mask_and_cut_of_the_keys(name: str) -> None:
    """Segments, memory, windows and keys of another length, against the reference: output and every gradient."""

    def attention(q: Tensor, k: Tensor, v: Tensor, scaling_seqlen: float, **arguments: Any) -> Tensor:
        return softmax_attention(q, k, v, **arguments)

    tensors, arguments = build(CASES[name].named(position=False, time=False), torch.float64)
    expected, found = (outputs_and_gradients(tensors, arguments, b, torch.float64, attention) for b in BACKENDS)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(0, 0), ()])
def test_nothing_gives_nothing_and_reaches_all_inputs(lengths: tuple[int, ...], backend: str) -> None:
    leaves = inputs(groups=2, lengths=lengths)
    layout = Layout(lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64)))
    out = softmax_attention(*leaves, layout, backend=backend)
    assert out.shape == (0, 4, 3)
    if backend == "cpu":
        assert all(g is not None for g in torch.autograd.grad(out.sum(), leaves))


def test_buckets_are_laid_out_once_for_all_layers() -> None:
    layout = layout_of()
    first = attention_buckets(layout, Mask(max_attn_len=2), layout)
    assert attention_buckets(layout, Mask(max_attn_len=2), layout) is first
    assert attention_buckets(layout, Mask(), layout) is not first
