"""Attention gathered share by share is attention over the batch, whatever the number of shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hstu.ops import Mask, attention_buckets, hstu_attention, softmax_attention
from hstu.ops.attention.ring.partial import SharedAttention, SharedHSTU, SharedSoftmax
from hstu.ops.attention.ring.shard import Scene, Share, deal_tokens, pair_pieces, with_padding_row
from tests.ops.attention_cases import CASES, build

HOLDERS = (3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8)))
SOFTMAX = [name for name in CASES if not any(word in name for word in ("segments", "memory", "everything", "bias"))]


def run_shares(kind: type, scene: Scene, tensors: list[Tensor], holders: int, **options: float) -> list[Tensor]:
    """Return output, gradients of q, k, v and of the tables, gathered from all shares."""
    shares = deal_tokens(scene.offsets, holders)
    parts = [[with_padding_row(x[share.tokens]) for x in tensors] for share in shares]
    q, k, v = tensors
    out, grads = (
        torch.full((*q.shape[:2], v.shape[2]), float("nan"), dtype=q.dtype),
        [torch.zeros_like(x) for x in tensors],
    )
    weights = weights_of(out)
    tables = [None if t is None else torch.zeros_like(t) for t in scene.tables]
    runs: list[tuple[SharedAttention, Share, Tensor]] = []
    for share, (own_q, _, _) in zip(shares, parts, strict=True):
        run = kind(scene, share, own_q, **options)
        run.start(v.shape[2])
        for other, (_, *kv) in zip(shares, parts, strict=True):
            run.forward(other, tuple(kv), pair_pieces(share, other, scene.offsets, scene.mask))
        out[share.tokens], kept = run.finish()
        runs.append((run, share, kept))
    for run, share, kept in runs:
        run.start_backward(with_padding_row(weights[share.tokens]), with_padding_row(out[share.tokens]), kept)
        for other, (_, *kv) in zip(shares, parts, strict=True):
            own = tuple(torch.zeros_like(x) for x in kv)
            run.backward(other, tuple(kv), pair_pieces(share, other, scene.offsets, scene.mask), own)
            for total, grad in zip(grads[1:], own, strict=True):
                total[other.tokens] += grad[:-1]
        grads[0][share.tokens] += run.dq[:-1]
        for table, grad in zip(tables, run.table_gradients, strict=True):
            if table is not None:
                table += grad
    return [out, *grads, *(t for t in tables if t is not None)]


def weights_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)


def mask_of(arguments: dict) -> Mask:
    names = ("causal", "candidate_group_size", "max_attn_len", "num_context", "num_candidates", "segments", "is_memory")
    chosen = {name: arguments[name] for name in names if name in arguments}
    return Mask(context_full=arguments.get("context_attention") == "full", **chosen)


@pytest.mark.parametrize("holders", HOLDERS)
@pytest.mark.parametrize("name", CASES)
def test_hstu_shares_add_up_to_the_reference(name: str, holders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.ops.attention.ring.shard.TILE_ELEMENTS", 700)
    tensors, arguments = build(CASES[name], torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    bias = arguments.get("bias")
    tables = [] if bias is None else [t.requires_grad_() for t in (bias.position, bias.time) if t is not None]
    expected = hstu_attention(*leaves, **arguments, backend="reference")
    gradients = torch.autograd.grad((expected * weights_of(expected)).sum(), [*leaves, *tables], allow_unused=True)
    alpha = arguments.get("alpha", tensors[0].shape[2] ** -0.5)
    scene = Scene(offsets=arguments["offsets"], mask=mask_of(arguments), alpha=alpha, bias=bias)
    with torch.no_grad():
        found = run_shares(SharedHSTU, scene, tensors, holders, scaling_seqlen=arguments["scaling_seqlen"])
    for own, other in zip(found, [expected, *gradients], strict=True):
        torch.testing.assert_close(own, torch.zeros_like(own) if other is None else other.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("holders", HOLDERS)
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax_shares_add_up_to_the_whole(
    name: str, groups: int, holders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hstu.ops.attention.ring.shard.TILE_ELEMENTS", 700)
    (q, k, v), arguments = build(CASES[name].named(heads=2), torch.float64)
    leaves = [x.requires_grad_() for x in (q, k[:, :groups].contiguous(), v[:, :groups].contiguous())]
    mask = mask_of(arguments)
    expected = softmax_attention(*leaves, attention_buckets(arguments["offsets"], mask))
    gradients = torch.autograd.grad((expected * weights_of(expected)).sum(), leaves)
    scene = Scene(offsets=arguments["offsets"], mask=mask, alpha=q.shape[2] ** -0.5)
    with torch.no_grad():
        found = run_shares(SharedSoftmax, scene, leaves, holders)
    for own, other in zip(found, [expected, *gradients], strict=True):
        torch.testing.assert_close(own, other.detach(), atol=1e-10, rtol=0)


def test_what_nobody_sees_may_score_without_bound() -> None:
    """Scores of the future far above those of the past: their exponentials overflow unless they are masked first."""
    (q, k, v), arguments = build(CASES["causal"], torch.float64)
    k = k * torch.linspace(0, 2000, k.shape[0], dtype=k.dtype)[:, None, None]
    leaves = [x.requires_grad_() for x in (q, k.detach(), v)]
    expected = softmax_attention(*leaves, attention_buckets(arguments["offsets"], mask_of(arguments)))
    gradients = torch.autograd.grad((expected * weights_of(expected)).sum(), leaves)
    scene = Scene(offsets=arguments["offsets"], mask=mask_of(arguments), alpha=q.shape[2] ** -0.5)
    with torch.no_grad():
        found = run_shares(SharedSoftmax, scene, leaves, 3)
    for own, other in zip(found, [expected, *gradients], strict=True):
        torch.testing.assert_close(own, other.detach(), atol=1e-8, rtol=1e-10)


@pytest.mark.parametrize("holders", HOLDERS)
def test_every_token_has_one_holder_and_work_is_even(holders: int) -> None:
    lengths = torch.tensor([0, 1, 2, 5, 0, 4000, 17, 3001, *[1] * 64])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    shares = deal_tokens(offsets, holders)
    assert torch.equal(torch.cat([share.tokens for share in shares]).sort().values, torch.arange(int(lengths.sum())))
    work = []
    for share in shares:
        place = share.tokens - offsets[torch.searchsorted(offsets, share.tokens, right=True) - 1]
        work.append(int((place + 1).sum()))
        assert share.tokens.numel() <= lengths.sum() / holders + 2 * lengths.numel()
    assert max(work) < 1.02 * sum(work) / holders
