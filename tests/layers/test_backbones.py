"""Backbones against their definitions, one token at a time in float64, and what no row may attend to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hstu.config.backbones import swiglu_size
from hstu.layers.llama import LLaMAConfig, LLaMAStack, rotate, rotation
from hstu.layers.mean import MeanStack
from hstu.layers.mlp import initialize
from hstu.layers.recurrent import RecurrentStack
from hstu.layers.tokens import Tokens
from hstu.layers.transformer import TransformerConfig, TransformerStack
from hstu.ops import Mask
from tests.layers.naive import may_attend, norm, silu
from tests.layers.streams import make_tokens, subset

STREAM: tuple[Any, ...] = ((6, 0, 1, 9, 3, 1), (2, 0, 0, 1, 1, 1), (2, 0, 1, 4, 0, 0))
KINDS = ["pre", "post", "llama", "gru", "lstm", "mean"]
MASKS = {
    "plain": Mask(),
    "groups": Mask(candidate_group_size=2),
    "window": Mask(max_attn_len=2),
    "full_context": Mask(context="full"),
}


def make(kind: str, num_layers: int = 2, dtype: torch.dtype = torch.float64, mask: Mask = MASKS["plain"]) -> nn.Module:
    """A backbone whose every parameter is random."""
    torch.manual_seed(3)
    shape = dict(hidden_size=10, num_heads=2, head_channels=4, ffn_size=7, mask=mask)
    if kind in ("gru", "lstm"):
        block: nn.Module = RecurrentStack(kind, 10, num_layers)  # type: ignore[arg-type]
    elif kind == "mean":
        block = MeanStack(10, mask)
    elif kind == "llama":
        block = LLaMAStack(LLaMAConfig(**shape, num_groups=1), num_layers)  # type: ignore[arg-type]
    else:
        activation = "gelu" if kind == "post" else "relu"
        block = TransformerStack(TransformerConfig(**shape, norm=kind, activation=activation), num_layers)  # type: ignore[arg-type]
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    return block.to(dtype)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    out = x @ layer.weight.T
    return out if layer.bias is None else out + layer.bias


def attend(q: Tensor, k: Tensor, v: Tensor, seen: list[list[int]]) -> Tensor:
    """[n, H, d]: softmax over ``seen[i]``."""
    rows = []
    for i, columns in enumerate(seen):
        for h in range(q.shape[1]):
            scores = torch.stack([(q[i, h] * k[j, h]).sum() / math.sqrt(q.shape[2]) for j in columns]).exp()
            rows.append((scores[:, None] / scores.sum() * v[columns, h]).sum(0))
    return torch.stack(rows).view(q.shape[0], -1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def naive_transformer(layer: Any, x: Tensor, seen: list[list[int]]) -> Tensor:
    def ln(x: Tensor, module: nn.LayerNorm) -> Tensor:
        return norm(x, 1e-5, module.weight, module.bias)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (part.view(-1, 2, 4) for part in linear(x, layer.qkv).split(8, dim=1))
        return linear(attend(q, k, v, seen), layer.output)

    def feed_forward(x: Tensor) -> Tensor:
        inner = linear(x, layer.expand)
        return linear(inner.clamp(min=0) if layer.config.activation == "relu" else gelu(inner), layer.contract)

    if layer.config.norm == "pre":
        x = x + attention(ln(x, layer.attention_norm))
        return x + feed_forward(ln(x, layer.ffn_norm))
    x = ln(x + attention(x), layer.attention_norm)
    return ln(x + feed_forward(x), layer.ffn_norm)


def rms(x: Tensor, module: nn.RMSNorm) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight


def naive_rotation(x: Tensor, positions: list[int]) -> Tensor:
    """[n, H, 4]: pairs of channels as complex numbers, times e^(i p theta^(-2c/d))."""
    rows = []
    for row, p in zip(x, positions, strict=True):
        turned = []
        for pair in range(2):
            a, b, angle = row[:, 2 * pair], row[:, 2 * pair + 1], p * 10000 ** (-2 * pair / 4)
            turned += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        rows.append(torch.stack(turned, dim=-1))
    return torch.stack(rows)


def naive_llama(layer: Any, x: Tensor, seen: list[list[int]], positions: list[int]) -> Tensor:
    q, k, v = linear(rms(x, layer.attention_norm), layer.qkv).split([8, 4, 4], dim=1)
    q, k = naive_rotation(q.view(-1, 2, 4), positions), naive_rotation(k.view(-1, 1, 4), positions)
    x = x + linear(attend(q, k.expand(-1, 2, -1), v.view(-1, 1, 4).expand(-1, 2, -1), seen), layer.wo)
    normed = rms(x, layer.ffn_norm)
    return x + linear(silu(linear(normed, layer.w1)) * linear(normed, layer.w3), layer.w2)


def naive_gru_step(gru: nn.GRU, layer: int, x: Tensor, h: Tensor) -> Tensor:
    w_i, w_h, b_i, b_h = (getattr(gru, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    i_r, i_z, i_n = (w_i @ x + b_i).split(len(h))
    h_r, h_z, h_n = (w_h @ h + b_h).split(len(h))
    z = torch.sigmoid(i_z + h_z)
    return (1 - z) * torch.tanh(i_n + torch.sigmoid(i_r + h_r) * h_n) + z * h


def naive_lstm_step(lstm: nn.LSTM, layer: int, x: Tensor, state: Tensor) -> Tensor:
    """From [hidden | cell] to the next one."""
    w_i, w_h, b_i, b_h = (
        getattr(lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden, cell = state.chunk(2)
    i, f, g, o = (w_i @ x + b_i + w_h @ hidden + b_h).chunk(4)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.cat([torch.sigmoid(o) * torch.tanh(cell), cell])


def naive_recurrence(unit: Any, x: Tensor, candidates: int) -> Tensor:
    step, width = (naive_lstm_step, 2) if isinstance(unit, nn.LSTM) else (naive_gru_step, 1)
    states, rows = [torch.zeros(width * x.shape[1], dtype=x.dtype)] * unit.num_layers, []
    for i, value in enumerate(x):
        new = []
        for layer, state in enumerate(states):
            new.append(step(unit, layer, value, state))
            value = new[-1][: x.shape[1]]
        if i < len(x) - candidates:
            states = new
        rows.append(value)
    return torch.stack(rows)


def naive(block: Any, tokens: Tokens, mask: Mask) -> Tensor:
    outputs, layout, bounds = [], tokens.layout, tokens.layout.offsets.tolist()
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if start == stop:
            continue
        n, context, m = stop - start, int(layout.context[b]), int(layout.lengths[b] - layout.history[b])
        seen = [[j for j in range(n) if may_attend(i, j, n, context, m, mask)] for i in range(n)]
        x = tokens.values[start:stop]
        if isinstance(block, RecurrentStack):
            x = naive_recurrence(block.unit, x, m)
        elif isinstance(block, MeanStack):
            x = torch.stack([x[columns].mean(0) for columns in seen])
            x = norm(x, 1e-5, block.norm.weight, block.norm.bias)
        elif isinstance(block, LLaMAStack):
            for layer in block.layers:
                x = naive_llama(layer, x, seen, [min(i, n - m) for i in range(n)])
            x = rms(x, block.final_norm)
        else:
            for layer in block.layers:
                x = naive_transformer(layer, x, seen)
            if block.config.norm == "pre":
                x = norm(x, 1e-5, block.final_norm.weight, block.final_norm.bias)
        outputs.append(x)
    return torch.cat(outputs)


EVERY = [(kind, mask) for kind in KINDS for mask in MASKS if kind not in ("gru", "lstm") or mask == "plain"]


@pytest.mark.parametrize(("kind", "mask"), EVERY)
def test_forward_and_gradients_are_those_of_the_definition(kind: str, mask: str) -> None:
    block, tokens = make(kind, mask=MASKS[mask]), make_tokens(*STREAM, dtype=torch.float64)
    tokens = tokens.with_values(tokens.values.requires_grad_())
    leaves = [tokens.values, *block.parameters()]
    found, expected = block(tokens), naive(block, tokens, MASKS[mask])
    # Angles are rounded to float32.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "llama" else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **tolerance)
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
    truth = torch.autograd.grad((expected * weights).sum(), leaves)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), leaves), truth, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(("kind", "mask"), EVERY)
@torch.no_grad()
def test_a_changed_token_changes_the_rows_that_may_attend_to_it_and_no_bit_of_others(kind: str, mask: str) -> None:
    tokens = make_tokens((7, 0, 1, 9, 4), (2, 0, 0, 1, 1), (2, 0, 1, 4, 0))
    block = make(kind, 1, torch.float32, MASKS[mask])
    before, owner, place = block(tokens), [], []
    layout = tokens.layout
    for b, length in enumerate(layout.lengths.tolist()):
        owner += [b] * length
        place += range(length)
    for j in range(len(owner)):
        values = tokens.values.clone()
        values[j] += 1 + torch.arange(values.shape[1]) % 3
        same = (block(tokens.with_values(values)) == before).all(1)
        for i in range(len(owner)):
            b, n = owner[j], int(layout.lengths[owner[j]])
            context, m = int(layout.context[b]), n - int(layout.history[b])
            may = owner[i] == b and may_attend(place[i], place[j], n, context, m, MASKS[mask])
            assert bool(same[i]) != may, (b, place[i], place[j])


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_without_order_every_token_attends_to_its_whole_sample(kind: str) -> None:
    block: Any = make(kind, mask=Mask(causal=False))
    tokens = make_tokens((6, 0, 1, 9), (2, 0, 0, 1), dtype=torch.float64)
    expected = []
    for x in tokens.values.split([6, 1, 9]):
        for layer in block.layers:
            x = naive_transformer(layer, x, [list(range(len(x)))] * len(x))
        if kind == "pre":
            x = norm(x, 1e-5, block.final_norm.weight, block.final_norm.bias)
        expected.append(x)
    torch.testing.assert_close(block(tokens), torch.cat(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_other_samples_change_nothing(kind: str) -> None:
    tokens, block = make_tokens((7, 0, 1, 30, 4), (2, 0, 0, 1, 1), (2, 0, 1, 4, 0), dtype=torch.float64), make(kind)
    everyone = block(tokens)
    for samples in ((0,), (3,), (0, 3), (1, 2, 3, 4), (4, 0)):
        part, rows = subset(tokens, samples)
        torch.testing.assert_close(block(part), everyone[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_candidates_row_does_not_depend_on_its_place_or_company(kind: str) -> None:
    tokens, block = make_tokens((9,), (1,), (4,), dtype=torch.float64), make(kind)
    rows, order = block(tokens), [0, 1, 2, 3, 4, 8, 6, 5, 7]
    torch.testing.assert_close(block(tokens.with_values(tokens.values[order])), rows[order], rtol=1e-9, atol=1e-9)
    alone = make_tokens((6,), (1,), (1,)).with_values(tokens.values[[0, 1, 2, 3, 4, 7]])
    torch.testing.assert_close(block(alone)[-1], rows[7], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_nothing_reaches_every_parameter_and_moves_none(kind: str) -> None:
    block, tokens = make(kind, dtype=torch.float32), make_tokens((0, 0))
    out = block(tokens.with_values(tokens.values.requires_grad_()))
    assert out.shape == (0, 10)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


def test_llama_starts_as_published() -> None:
    assert [swiglu_size(d) for d in (36, 48, 64, 512)] == [96, 128, 192, 1376]
    torch.manual_seed(0)
    block = LLaMAStack(LLaMAConfig(hidden_size=256, num_heads=4, num_groups=4, head_channels=64, ffn_size=704), 8)
    initialize(block, "normal", 0.02)
    small = 0.02 / math.sqrt(2 * 8)
    for name, parameter in block.named_parameters():
        if parameter.dim() == 2:
            wanted = small if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert float(parameter.detach().std()) == pytest.approx(wanted, rel=0.02), name


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def score(p_q: int, p_k: int) -> float:
        turned = [rotate(x, rotation(torch.tensor([p]), 8)) for x, p in ((q, p_q), (k, p_k))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), rel=1e-5) != pytest.approx(score(9, 5), rel=1e-2)
