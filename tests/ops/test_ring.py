"""Attention gathered shard by shard is attention over the batch, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from hstu.ops.attention.ring.partial import PartialAttention, PartialHSTU, PartialSoftmax
from hstu.ops.attention.ring.shard import AttentionSpec, TokenShard, shard_zigzag, with_padding_row
from tests.ops.attention_cases import CASES, build

RANKS = (3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8)))
WHOLE = [name for name, case in CASES.items() if case.queries is None]
SOFTMAX = [name for name in WHOLE if "bias" not in name]


def run_shards(kind: type, spec: AttentionSpec, tensors: list[Tensor], ranks: int, **options: float) -> list[Tensor]:
    """Return output, gradients of q, k, v and of the tables, gathered from all shards."""
    shards = shard_zigzag(spec.layout, ranks)
    parts = [[with_padding_row(x[shard.tokens]) for x in tensors] for shard in shards]
    q, k, v = tensors
    out, grads = (
        torch.full((*q.shape[:2], v.shape[2]), float("nan"), dtype=q.dtype),
        [torch.zeros_like(x) for x in tensors],
    )
    weights = weights_of(out)
    tables = [None if t is None else torch.zeros_like(t) for t in spec.tables]
    runs: list[tuple[PartialAttention, TokenShard, Tensor]] = []
    for rank, (shard, (own_q, _, _)) in enumerate(zip(shards, parts, strict=True)):
        run = kind(spec, shard, own_q, **options)
        run.start(v.shape[2])
        for other, (_, *kv), blocks in zip(shards, parts, spec.blocks(rank, ranks), strict=True):
            run.forward(other, tuple(kv), blocks)
        out[shard.tokens], kept = run.finish()
        runs.append((run, shard, kept))
    for rank, (run, shard, kept) in enumerate(runs):
        run.start_backward(with_padding_row(weights[shard.tokens]), with_padding_row(out[shard.tokens]), kept)
        for other, (_, *kv), blocks in zip(shards, parts, spec.blocks(rank, ranks), strict=True):
            own = tuple(torch.zeros_like(x) for x in kv)
            run.backward(other, tuple(kv), blocks, own)
            for total, grad in zip(grads[1:], own, strict=True):
                total[other.tokens] += grad[:-1]
        grads[0][shard.tokens] += run.dq[:-1]
        for table, grad in zip(tables, run.table_gradients, strict=True):
            if table is not None:
                table += grad
    return [out, *grads, *(t for t in tables if t is not None)]


def weights_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", WHOLE)
def test_hstu_shards_add_up_to_the_reference(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.ops.attention.ring.shard.TILE_ELEMENTS", 700)
    tensors, arguments = build(CASES[name], torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    bias = arguments.get("bias")
    tables = [] if bias is None else [t.requires_grad_() for t in (bias.position, bias.time) if t is not None]
    expected = hstu_attention(*leaves, **arguments, backend="reference")
    gradients = torch.autograd.grad((expected * weights_of(expected)).sum(), [*leaves, *tables], allow_unused=True)
    alpha = arguments.get("alpha", tensors[0].shape[2] ** -0.5)
    spec = AttentionSpec(layout=arguments["layout"], mask=arguments["mask"], alpha=alpha, bias=bias or RelativeBias())
    with torch.no_grad():
        found = run_shards(PartialHSTU, spec, tensors, ranks, scaling_seqlen=arguments["scaling_seqlen"])
    for own, other in zip(found, [expected, *gradients], strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_shards_add_up_to_the_whole(
    name: str, groups: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hstu.ops.attention.ring.shard.TILE_ELEMENTS", 700)
    (q, k, v), arguments = build(CASES[name].named(heads=2), torch.float64)
    leaves = [x.requires_grad_() for x in (q, k[:, :groups].contiguous(), v[:, :groups].contiguous())]
    layout, mask = arguments["layout"], arguments["mask"]
    expected = softmax_attention(*leaves, layout, mask, backend="reference")
    gradients = torch.autograd.grad((expected * weights_of(expected)).sum(), leaves, allow_unused=True)
    spec = AttentionSpec(layout=layout, mask=mask, alpha=q.shape[2] ** -0.5)
    with torch.no_grad():
        found = run_shards(PartialSoftmax, spec, leaves, ranks)
    for own, other in zip(found, [expected, *gradients], strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other.detach(), atol=1e-10, rtol=0)


def test_what_nobody_sees_may_score_without_bound() -> None:
    """Scores of the future far above those of the past: their exponentials overflow unless they are masked first."""
    (q, k, v), arguments = build(CASES["causal"], torch.float64)
    k = k * torch.linspace(0, 2000, k.shape[0], dtype=k.dtype)[:, None, None]
    leaves = [x.requires_grad_() for x in (q, k.detach(), v)]
    expected = softmax_attention(*leaves, arguments["layout"], backend="reference")
    gradients = torch.autograd.grad((expected * weights_of(expected)).sum(), leaves)
    spec = AttentionSpec(layout=arguments["layout"], mask=Mask(), alpha=q.shape[2] ** -0.5)
    with torch.no_grad():
        found = run_shards(PartialSoftmax, spec, leaves, 3)
    for own, other in zip(found, [expected, *gradients], strict=True):
        torch.testing.assert_close(own, other.detach(), atol=1e-8, rtol=1e-10)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_token_is_on_one_rank_and_work_is_even(ranks: int) -> None:
    lengths = torch.tensor([0, 1, 2, 5, 0, 4000, 17, 3001, *[1] * 64])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    shards = shard_zigzag(Layout(offsets), ranks)
    assert torch.equal(torch.cat([shard.tokens for shard in shards]).sort().values, torch.arange(int(lengths.sum())))
    work = []
    for shard in shards:
        place = shard.tokens - offsets[torch.searchsorted(offsets, shard.tokens, right=True) - 1]
        work.append(int((place + 1).sum()))
        assert shard.tokens.numel() <= lengths.sum() / ranks + 2 * lengths.numel()
    assert max(work) < 1.02 * sum(work) / ranks


def test_two_masks_on_one_batch() -> None:
    """Blocks are kept on the layout by mask: a second mask neither finds nor spoils those of the first."""
    (q, k, v), arguments = build(CASES["candidates"], torch.float64)
    layout, order = arguments["layout"], (Mask(max_attn_len=3), Mask(causal=False), Mask(max_attn_len=3))
    for mask in order:
        for kind, attention, options in (
            (PartialHSTU, hstu_attention, {"scaling_seqlen": 9.0}),
            (PartialSoftmax, softmax_attention, {}),
        ):
            spec = AttentionSpec(layout=layout, mask=mask, alpha=0.4)
            with torch.no_grad():
                out, *_ = run_shards(kind, spec, [q, k, v], 3, **options)
            expected = attention(q, k, v, layout, mask, alpha=0.4, backend="reference", **options)
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    first, again = (AttentionSpec(layout=layout, mask=Mask(max_attn_len=3), alpha=a).blocks(0, 3) for a in (0.4, 1.0))
    assert first is again and first is not AttentionSpec(layout=layout, mask=Mask(), alpha=0.4).blocks(0, 3)


@pytest.mark.parametrize("name", ["causal", "window", "segments"])
def test_pieces_that_cannot_attend_are_not_paired(name: str) -> None:
    _, arguments = build(CASES[name])
    spec = AttentionSpec(layout=arguments["layout"], mask=arguments["mask"], alpha=1.0)
    every = AttentionSpec(layout=Layout(spec.layout.offsets), mask=Mask(causal=False), alpha=1.0)

    def pairs(spec: AttentionSpec) -> int:
        return sum(b.sequence.numel() for rank in range(4) for blocks in spec.blocks(rank, 4) for b in blocks)

    assert pairs(spec) < 0.75 * pairs(every)
