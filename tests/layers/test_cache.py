"""Tokens run behind a cache: the rows that one pass over everything gives, wherever the sequence is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu.layers.cache import Cache, alone
from hstu.layers.llama import LLaMAConfig, LLaMAStack
from hstu.layers.memory import MemoryBlocks
from hstu.layers.positions import PositionEncoder, token_positions
from hstu.layers.preprocess import Preprocess
from hstu.layers.tokens import Tokens
from hstu.layers.transformer import TransformerConfig, TransformerStack
from hstu.ops import Mask, positions_in_sequence, sequence_ids
from tests.layers.streams import make_block, make_config

D, N = 10, 8
EVENTS, CANDIDATES = (11, 4, 2, 0, 8, 3), (2, 1, 2, 0, 3, 0)
BLOCKS = MemoryBlocks((2, 5, 8), (1, 2, 2), N, 5)
MASKS = {"plain": Mask(), "groups": Mask(candidate_group_size=2), "window": Mask(max_attn_len=3)}
KINDS = ("research", "next", "production", "pre", "post", "llama")


def make_stack(kind: str, mask: Mask, dtype: torch.dtype = torch.float64, max_tokens: int = 40) -> Any:
    if kind in ("research", "next", "production"):
        fields: dict[str, Any] = {"bias_query_time": "next"} if kind == "next" else {}
        preset = "production" if kind == "production" else "research"
        return make_block(make_config(preset, mask=mask, max_tokens=max_tokens, **fields), 2, dtype)
    shape: dict[str, Any] = dict(hidden_size=D, num_heads=2, head_channels=4, ffn_size=7, mask=mask)
    torch.manual_seed(3)
    stack: nn.Module = TransformerStack(TransformerConfig(**shape, norm=kind), 2) if kind != "llama" else (
        LLaMAStack(LLaMAConfig(**shape, num_groups=1), 2)
    )  # fmt: skip
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.4)
    return stack.to(dtype)


def make_tokens(blocks: MemoryBlocks | None, dtype: torch.dtype = torch.float64) -> Tokens:
    """Samples with context, history, candidates and, with ``blocks``, memory."""
    torch.manual_seed(1)
    preprocess = Preprocess(
        D, {"age": D, "item": D}, item="item", action=None, contexts=("age",), layout="item",
        positions=PositionEncoder(D, 30), max_tokens=40, memory=blocks,
    )  # fmt: skip
    lengths = {"age": torch.tensor([int(n > 0) for n in EVENTS]), "item": torch.tensor(EVENTS)}
    sizes = {name: int(own.sum()) for name, own in lengths.items()}
    embedded = {name: torch.randn(size, D) for name, size in sizes.items()}
    times = 10**9 + torch.randint(1, 5000, (sizes["item"],)).cumsum(0)
    tokens = preprocess(embedded, preprocess.stream(lengths, sizes, torch.tensor(CANDIDATES), times))
    return replace(tokens, values=tokens.values.detach().to(dtype), positions=token_positions(tokens))


def piece(tokens: Tokens, start: Tensor, stop: Tensor) -> tuple[Tokens, Tensor]:
    """Tokens at the places from ``start`` to ``stop`` of each sample, and their rows."""
    total = tokens.values.shape[0]
    owner = sequence_ids(tokens.layout.offsets, total)
    place = positions_in_sequence(tokens.layout.offsets, total)
    rows = ((place >= start[owner]) & (place < stop[owner])).nonzero().squeeze(1)
    assert tokens.positions is not None
    return alone(replace(tokens.shard(rows), values=tokens.values[rows]), tokens.positions[rows]), rows


def run_in_pieces(stack: Any, tokens: Tokens, cuts: list[Tensor]) -> tuple[Tensor, Cache]:
    """Hidden states of every token from extensions up to each of ``cuts``."""
    found, cache = torch.full_like(tokens.values, torch.nan), None
    for cut in [*cuts, tokens.layout.lengths]:
        done = torch.zeros_like(cut) if cache is None else cache.lengths
        new, rows = piece(tokens, done, torch.maximum(cut, done))
        hidden, cache = stack.extend(cache, new)
        found[rows] = hidden
    assert cache is not None
    return found, cache


def random_cuts(tokens: Tokens, count: int, seed: int) -> list[Tensor]:
    """Ascending places of each sample, the last of them not beyond the candidates' first."""
    generator = torch.Generator().manual_seed(seed)
    history = tokens.layout.history
    drawn = torch.rand(count, history.numel(), generator=generator) * (history + 1)
    return list(drawn.long().sort(0).values)


@pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_extensions_give_the_rows_of_one_pass(kind: str, mask: str, memory: bool) -> None:
    stack, tokens = make_stack(kind, MASKS[mask]), make_tokens(BLOCKS if memory else None)
    whole = stack(tokens)
    for seed in range(3):
        found, _ = run_in_pieces(stack, tokens, random_cuts(tokens, 1 + seed, seed))
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rounding_of_extensions_is_that_of_one_pass(kind: str, dtype: torch.dtype) -> None:
    exact = make_stack(kind, MASKS["plain"])(make_tokens(BLOCKS))
    stack, tokens = make_stack(kind, MASKS["plain"], dtype), make_tokens(BLOCKS, dtype)
    found, _ = run_in_pieces(stack, tokens, random_cuts(tokens, 2, 5))
    allowed = (stack(tokens).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 2 * allowed + 8 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_single_cut_and_one_token_at_a_time(kind: str) -> None:
    stack, tokens = make_stack(kind, MASKS["plain"]), make_tokens(BLOCKS)
    whole, history = stack(tokens), tokens.layout.history
    longest = int(history.max())
    for cut in range(longest + 1):
        found, _ = run_in_pieces(stack, tokens, [history.clamp(max=cut)])
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    found, _ = run_in_pieces(stack, tokens, [history.clamp(max=cut) for cut in range(longest + 1)])
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_what_memory_stands_for_is_not_kept() -> None:
    stack, tokens = make_stack("research", MASKS["plain"]), make_tokens(BLOCKS)
    history = tokens.layout.history
    compressed, _ = piece(tokens, torch.zeros_like(history), history)
    _, cache = stack.extend(None, compressed)
    assert cache.places.numel() > 36
    cache = cache.compressed()
    # One context and five memory tokens; the last sample has an event after the last block.
    assert cache.layout.lengths.tolist() == [6, 6, 6, 5, 6, 7]
    assert all(k.shape[0] == v.shape[0] == 36 for k, v in cache.layers) and torch.equal(cache.lengths, history)
    # The distance to what is left out counts.
    closer = replace(cache, lengths=cache.layout.lengths, places=positions_in_sequence(cache.layout.offsets, 36))
    candidates, rows = piece(tokens, history, tokens.layout.lengths)
    whole = stack(tokens)[rows]
    torch.testing.assert_close(stack.extend(cache, candidates)[0], whole, rtol=1e-10, atol=1e-10)
    assert (stack.extend(closer, candidates)[0] - whole).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["research", "llama"])
@torch.no_grad()
def test_candidates_leave_the_cache_as_it_is(kind: str) -> None:
    stack, tokens = make_stack(kind, MASKS["plain"]), make_tokens(None)
    history = tokens.layout.history
    _, cache = stack.extend(None, piece(tokens, torch.zeros_like(history), history)[0])
    rows, after = stack.extend(cache, piece(tokens, history, tokens.layout.lengths)[0])
    assert after is cache and rows.shape[0] == sum(CANDIDATES)


@torch.no_grad()
def test_more_candidates_than_the_position_table_has_places() -> None:
    tokens = make_tokens(None)
    wide, narrow = (make_stack("research", MASKS["plain"], max_tokens=n) for n in (40, 11))
    for layer, other in zip(narrow.layers, wide.layers, strict=True):
        other.load_state_dict(layer.state_dict() | {"position_table": other.position_table})
        other.position_table[29:-29] = layer.position_table
    whole, history = wide(tokens), tokens.layout.history
    assert int(tokens.layout.lengths.max()) > 11 > int(history.max())
    found, _ = run_in_pieces(narrow, tokens, [history])
    torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_context_that_attends_to_later_events_cannot_be_cached() -> None:
    mask = Mask(context="full")
    stack, tokens = make_stack("pre", mask), make_tokens(None)
    history = tokens.layout.history
    with pytest.raises(ValueError, match="context tokens attend to events that come later"):
        run_in_pieces(stack, tokens, [history // 2])
    found, _ = run_in_pieces(stack, tokens, [history])
    torch.testing.assert_close(found, stack(tokens), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="from both sides"):
        make_stack("post", Mask(causal=False)).extend(None, tokens)
