"""What a new rule of the mask has to touch: who follows ``Mask.visible`` at once, who is wrong until it follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.ops import Layout, Mask, hstu_attention, softmax_attention
from hstu.ops.attention.cpu import plan as cpu_plan
from hstu.ops.attention.ring.partial import PartialHSTU
from hstu.ops.attention.ring.shard import AttentionSpec
from hstu.ops.flops import visible_pairs
from tests.ops.attention_cases import CASES, build
from tests.ops.test_ring import run_shards


@dataclass(frozen=True, kw_only=True)
class Dilated(Mask):
    """A rule that hides: only every ``step``-th token before a row."""

    step: int = 3

    def visible(self, i: Tensor, j: Tensor, **facts: Any) -> Tensor:
        return super().visible(i, j, **facts) & ((i - j) % self.step == 0)


@dataclass(frozen=True, kw_only=True)
class DilatedCount(Dilated):
    def count(self, i: Tensor, *, context: Tensor, history: Tensor) -> Tensor:
        return i // self.step + 1


@dataclass(frozen=True, kw_only=True)
class Lookahead(Mask):
    """A rule that shows: also the token ``ahead`` places after a row."""

    ahead: int = 40

    def visible(self, i: Tensor, j: Tensor, **facts: Any) -> Tensor:
        return super().visible(i, j, **facts) | (j == i + self.ahead)


@dataclass(frozen=True, kw_only=True)
class LookaheadReach(Lookahead):
    def reachable(self, rows: Any, columns: Any, **facts: Any) -> Tensor:
        ahead = (columns[0] <= rows[1] + self.ahead) & (columns[1] >= rows[0] + self.ahead)
        return super().reachable(rows, columns, **facts) | ahead


def run_cpu(q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask) -> Tensor:
    return hstu_attention(q, k, v, layout, mask, scaling_seqlen=5.0, backend="cpu")


def run_compiled(q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask) -> Tensor:
    return run_cpu(q.float(), k.float(), v.float(), layout, mask).double()


EXACT = {run_compiled: 1e-5}  # in float32; the others are within 1e-12


def run_softmax(q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask) -> Tensor:
    return softmax_attention(q, k, v, layout, mask, backend="cpu")


def run_ring(q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask) -> Tensor:
    spec = AttentionSpec(layout=layout, mask=mask, alpha=q.shape[2] ** -0.5)
    return run_shards(PartialHSTU, spec, [q, k, v], 3, scaling_seqlen=5.0)[0]


def error(run: Callable[..., Tensor], mask: Mask) -> float:
    """How far a backend is from the reference, both under ``mask``."""
    tensors, arguments = build(CASES["causal"], torch.float64)
    layout = arguments["layout"]
    if run is run_softmax:
        expected = softmax_attention(*tensors, layout, mask, backend="reference")
    else:
        expected = hstu_attention(*tensors, layout, mask, scaling_seqlen=5.0, backend="reference")
    return float((run(*tensors, layout, mask) - expected).abs().max())


@pytest.mark.parametrize("run", [run_cpu, run_compiled, run_softmax, run_ring])
@torch.no_grad()
def test_every_backend_follows_a_rule_that_hides(run: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_plan, "TILE_ROWS", 16)
    assert error(run, Dilated()) < EXACT.get(run, 1e-12)
    tensors, arguments = build(CASES["causal"], torch.float64)
    found, plain = (run(*tensors, arguments["layout"], mask) for mask in (Dilated(), Mask()))
    assert float((found - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("run", [run_cpu, run_compiled, run_ring])
@torch.no_grad()
def test_tiles_and_pieces_are_wrong_until_reachable_follows_a_rule_that_shows(
    run: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_plan, "TILE_ROWS", 16)
    assert error(run, Lookahead()) > 1e-3
    assert error(run, LookaheadReach()) < EXACT.get(run, 1e-12)


@torch.no_grad()
def test_softmax_buckets_need_visible_alone() -> None:
    assert error(run_softmax, Lookahead()) < 1e-12


def test_counted_work_is_wrong_until_count_follows() -> None:
    layout = build(CASES["causal"])[1]["layout"]
    every = [sum(len(range(i, -1, -3)) for i in range(n)) for n in layout.lengths.tolist()]
    assert visible_pairs(layout, Dilated()).tolist() != every
    assert visible_pairs(layout, DilatedCount()).tolist() == every
