"""The HSTU layer against its definition, and what no row may depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.layers.hstu import HSTUConfig, HSTUStack, hstu_preset
from hstu.layers.tokens import Tokens
from hstu.ops import Layout, Mask, hstu_attention
from tests.layers.naive import may_attend, naive_layer
from tests.layers.streams import at_times, make_block, make_config, make_tokens, subset

LENGTHS, CONTEXT, CANDIDATES = (6, 0, 1, 9, 3, 1), (2, 0, 0, 1, 1, 1), (2, 0, 1, 4, 0, 0)
STREAMS = {
    "plain": (LENGTHS, None, None),
    "context_and_candidates": (LENGTHS, CONTEXT, CANDIDATES),
    "nothing": ((0, 0), None, None),
}
RECOMPUTED = dict(recompute_norm=True, recompute_silu=True, recompute_gate=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "as_published": {},
    "concat": {"gate": "concat"},
    "silu_on_u": {"silu_on": "u"},
    "next_time": {"position_bias": True, "time_bias_buckets": 9, "bias_query_time": "next"},
    "groups": {"mask": Mask(candidate_group_size=2)},
    "window": {"mask": Mask(max_attn_len=2)},
    "full_context": {"mask": Mask(context="full")},
    "fused": {"recompute_silu": True},
    "fused_concat_window": {**RECOMPUTED, "gate": "concat", "silu_on": "u", "mask": Mask(max_attn_len=2)},
}


def outputs_and_gradients(run: Callable[[Tensor], Tensor], block: HSTUStack, values: Tensor) -> dict[str, Tensor]:
    x = values.clone().requires_grad_()
    block.zero_grad()
    out = run(x)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **{name: grad.clone() for name, grad in grads.items()}}


def assert_as_defined(block: HSTUStack, tokens: Tokens, tolerance: float = 1e-9) -> None:
    (layer,) = block.layers
    found = outputs_and_gradients(lambda x: layer(x, tokens), block, tokens.values)
    expected = outputs_and_gradients(lambda x: naive_layer(layer, x, tokens), block, tokens.values)  # type: ignore[arg-type]
    assert found.keys() == {"out", "x", *dict(block.named_parameters())}
    for name, value in found.items():
        truth = expected.get(name, torch.zeros_like(value))  # without tokens the definition reads no table
        torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("preset", ["research", "production"])
def test_forward_and_gradients_are_those_of_the_definition(preset: str, variant: str, stream: str) -> None:
    block = make_block(make_config(preset, **VARIANTS[variant]), dtype=torch.float64)
    assert_as_defined(block, make_tokens(*STREAMS[stream], dtype=torch.float64))


@pytest.mark.parametrize(
    "fault",
    [
        {"alpha": 0.9},
        {"norm_eps": 1e-2},
        {"silu_on": "u"},
        {"scaling_seqlen": 16.0},
        {"mask": Mask(candidate_group_size=2)},
        {"mask": Mask(max_attn_len=2)},
        {"mask": Mask(context="full")},
        {"bias_query_time": "next"},
    ],
    ids=lambda fault: "_".join(map(str, next(iter(fault.items())))),
)
def test_a_layer_with_another_parametrisation_is_caught(fault: dict[str, Any]) -> None:
    block = make_block(make_config("research"), dtype=torch.float64)
    wrong = make_block(make_config("research", **fault), dtype=torch.float64)
    layer = block.layers[0]
    tokens = make_tokens(LENGTHS, CONTEXT, CANDIDATES, dtype=torch.float64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong(tokens), naive_layer(layer, tokens.values, tokens), rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]


def test_the_presets_are_the_published_parametrisations() -> None:
    research, production = hstu_preset("research"), hstu_preset("production")
    assert research["alpha"] == 1.0 and production["alpha"] is None
    assert not research["affine_norm"] and production["affine_norm"]
    assert research["silu_on"] == production["silu_on"] == "uvqk"
    assert not research["projection_bias"] and production["projection_bias"]


@pytest.mark.parametrize("preset", ["research", "production"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near(preset: str, dtype: torch.dtype) -> None:
    tokens = make_tokens(LENGTHS, CONTEXT, CANDIDATES, dtype=torch.float64)
    exact = make_block(make_config(preset), 2, torch.float64)(tokens)
    block = make_block(make_config(preset), 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        low = block(tokens.with_values(tokens.values.float()))
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (low.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("preset", ["research", "production"])
def test_the_fused_layer_under_autocast_is_as_near_as_the_plain_one(preset: str) -> None:
    """Outputs and gradients in the same types, as far from float64 as what bfloat16 loses in the plain layer."""
    tokens = make_tokens(LENGTHS, CONTEXT, CANDIDATES, dtype=torch.float64)
    block = make_block(make_config(preset), dtype=torch.float64)
    exact = outputs_and_gradients(lambda x: block(tokens.with_values(x)), block, tokens.values)
    found = []
    for options in ({}, RECOMPUTED):
        block = make_block(make_config(preset, **options))
        with torch.autocast("cpu", torch.bfloat16):
            run = outputs_and_gradients(lambda x, b=block: b(tokens.with_values(x)), block, tokens.values.float())
        found.append(run)
    for name, truth in exact.items():
        plain, fused = (run[name] for run in found)
        error, allowed = ((x.double() - truth).abs().max() for x in (fused, plain))
        assert fused.dtype == plain.dtype and error <= 2 * allowed, name


def test_recomputing_keeps_less_for_the_backward() -> None:
    kept = []
    for options in ({}, dict(recompute_norm=True), RECOMPUTED):
        block, tokens, sizes = make_block(make_config("production", **options)), make_tokens(LENGTHS), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x) or x, lambda x: x):
            block(tokens.with_values(tokens.values.clone().requires_grad_()))
        kept.append(sum(x.numel() for x in {x.data_ptr(): x for x in sizes}.values()))
    assert kept[0] > kept[1] > kept[2]


def test_the_fused_layer_drops_in_training_alone() -> None:
    block = make_block(make_config("production", dropout=0.5, **RECOMPUTED))
    tokens = make_tokens(LENGTHS)
    assert not torch.equal(block(tokens), block(tokens))
    block.eval()
    assert torch.equal(block(tokens), block(tokens))


# What no row may depend on


def reachable(tokens: Tokens, config: HSTUConfig, num_layers: int) -> Tensor:
    """[T, T] bool: whether row i of the last layer may depend on input j, by the definition of the mask."""
    total = tokens.values.shape[0]
    direct = torch.eye(total, dtype=torch.bool)
    layout, bounds = tokens.layout, tokens.layout.offsets.tolist()
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        context, candidates = int(layout.context[b]), stop - start - int(layout.history[b])
        for i in range(stop - start):
            for j in range(stop - start):
                direct[start + i, start + j] |= may_attend(i, j, stop - start, context, candidates, config.mask)
    reach = direct.float()
    for _ in range(num_layers - 1):
        reach = ((reach @ direct.float()) > 0).float()
    return reach > 0


@torch.no_grad()
def assert_rows_attend_to_what_they_may(block: HSTUStack, tokens: Tokens, config: HSTUConfig) -> None:
    before = block(tokens)
    reach = reachable(tokens, config, len(block.layers))
    for j in range(tokens.values.shape[0]):
        changed = tokens.values.clone()
        changed[j] += 1 + torch.arange(changed.shape[1]) % 3
        same = (block(tokens.with_values(changed)) == before).all(1)
        assert bool(same[~reach[:, j]].all()), f"token {j} reaches rows {(~same & ~reach[:, j]).nonzero().tolist()}"
        assert not bool(same[reach[:, j]].any()), f"token {j} does not reach a row that attends to it"


PERTURBED = {
    "plain": {},
    "groups": {"mask": Mask(candidate_group_size=2)},
    "window": {"mask": Mask(max_attn_len=3)},
    "full_context": {"mask": Mask(context="full")},
    "fused": {"recompute_silu": True},
    "fused_concat_window": {**RECOMPUTED, "gate": "concat", "silu_on": "u", "mask": Mask(max_attn_len=2)},
}


@pytest.mark.parametrize("variant", PERTURBED)
@pytest.mark.parametrize("preset", ["research", "production"])
def test_a_changed_token_changes_the_rows_that_may_attend_to_it_and_no_bit_of_others(preset: str, variant: str) -> None:
    config = make_config(preset, **PERTURBED[variant])
    tokens = make_tokens((7, 0, 1, 9, 4), (2, 0, 0, 1, 1), (2, 0, 1, 4, 0))
    assert_rows_attend_to_what_they_may(make_block(config, 2), tokens, config)


@pytest.mark.parametrize("query_time", ["own", "next"])
@torch.no_grad()
def test_a_changed_time_reaches_only_rows_that_attend_to_the_token(query_time: str) -> None:
    config = make_config("research", bias_query_time=query_time)
    block, tokens = make_block(config), make_tokens((7, 0, 1, 9), (1, 0, 0, 0), (0, 0, 1, 4))
    before, reach = block(tokens), reachable(tokens, config, 1)
    starts = set(tokens.layout.offsets.tolist())
    for j in range(tokens.values.shape[0]):
        times = tokens.timestamps.clone()
        times[j] += 10**7
        allowed = reach[:, j].clone()
        if query_time == "next" and j not in starts:
            allowed[j - 1] = True  # the published option: a row knows when the next event happens
        same = (block(at_times(tokens, times)) == before).all(1)
        assert bool(same[~allowed].all())


def plant(stack: HSTUStack, change: Callable[[dict[str, Any]], None]) -> HSTUStack:
    """Make the layers of ``stack`` attend with other arguments."""

    def faulty(q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask, **options: Any) -> Tensor:
        options = {"layout": layout, "mask": mask, **options}
        change(options)
        return hstu_attention(q, k, v, **options)

    for layer in stack.layers:
        layer.attention = faulty  # type: ignore[assignment]
    return stack


def with_layout(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda o: o.update(layout=replace(o["layout"], **changes))


def with_mask(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda o: o.update(mask=replace(o["mask"], **changes))


@pytest.mark.parametrize(
    "change",
    [
        with_mask(causal=False),
        with_layout(num_candidates=None),
        lambda o: (with_layout(num_context=None)(o), with_mask(max_attn_len=1)(o)),
        with_mask(context="full"),
        with_mask(candidate_group_size=9),
    ],
    ids=["future", "candidates_as_history", "context_in_the_window", "context_sees_history", "candidates_together"],
)
def test_a_wrong_mask_is_caught(change: Callable[[dict[str, Any]], None]) -> None:
    config = make_config("research")
    tokens = make_tokens((7, 0, 1, 9, 4), (2, 0, 0, 1, 1), (2, 0, 1, 4, 0))
    with pytest.raises(AssertionError, match=r"token \d+"):
        assert_rows_attend_to_what_they_may(plant(make_block(config, 2), change), tokens, config)


@torch.no_grad()
def test_full_context_shows_the_future_to_history_rows_from_the_second_layer_on() -> None:
    # Why a config that puts a loss on history rows is refused with such a mask.
    tokens = make_tokens((6,), (1,))
    changed = tokens.with_values(torch.cat([tokens.values[:-1], -tokens.values[-1:]]))
    for mask, leaks in ((Mask(), False), (Mask(context="full"), True)):
        config = make_config("production", mask=mask)
        one, two = make_block(config, 1), make_block(config, 2)
        assert torch.equal(one(tokens)[1:-1], one(changed)[1:-1])
        assert torch.equal(two(tokens)[1:-1], two(changed)[1:-1]) != leaks


@torch.no_grad()
def assert_samples_do_not_matter_to_each_other(block: HSTUStack, tokens: Tokens) -> None:
    """Rows are those of the sample alone, to rounding: matrix products of another size add up in another order."""
    everyone = block(tokens)
    unit = torch.finfo(everyone.dtype).eps * everyone.abs().max()
    for samples in ((0,), (3,), (0, 3), (1, 2, 3, 4), (4, 0)):
        part, rows = subset(tokens, samples)
        assert (block(part) - everyone[rows]).abs().max() <= 16 * unit, samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", ["research", "production"])
def test_other_samples_change_nothing(preset: str, dtype: torch.dtype) -> None:
    tokens = make_tokens((7, 0, 1, 30, 4), (2, 0, 0, 1, 1), (2, 0, 1, 4, 0), dtype=dtype)
    assert_samples_do_not_matter_to_each_other(make_block(make_config(preset), 2, dtype), tokens)


@pytest.mark.parametrize("preset", ["research", "production"])
def test_attention_divided_by_the_longest_of_the_batch_is_caught(preset: str) -> None:
    tokens = make_tokens((7, 0, 1, 30, 4), (2, 0, 0, 1, 1), (2, 0, 1, 4, 0))
    # The norm after attention hides most of a wrong factor; its epsilon and "concat" do not.
    block = make_block(make_config(preset, gate="concat"), 2)
    assert_samples_do_not_matter_to_each_other(block, tokens)
    plant(block, lambda o: o.update(scaling_seqlen=float(o["layout"].longest)))
    with pytest.raises(AssertionError):
        assert_samples_do_not_matter_to_each_other(block, tokens)


@torch.no_grad()
def test_the_bound_on_tokens_does_not_scale_attention() -> None:
    tokens = make_tokens((7, 30))
    small, large = (make_block(make_config("production", max_tokens=n)) for n in (30, 300))
    assert torch.equal(small(tokens), large(tokens))


@pytest.mark.parametrize("preset", ["research", "production"])
@torch.no_grad()
def test_a_candidates_row_does_not_depend_on_its_place_or_company(preset: str) -> None:
    tokens = make_tokens((9,), (1,), (4,), dtype=torch.float64)
    block = make_block(make_config(preset, bias_query_time="own"), 2, torch.float64)
    rows = block(tokens)
    for order in ([0, 1, 2, 3, 4, 8, 6, 5, 7], [0, 1, 2, 3, 4, 6, 7, 8, 5]):
        moved = at_times(tokens.with_values(tokens.values[order]), tokens.timestamps[order])
        # Sums over the history are added up in another order: rounding may differ, nothing else.
        torch.testing.assert_close(block(moved), rows[order], rtol=1e-12, atol=1e-12)
    for candidate in range(5, 9):
        kept = [0, 1, 2, 3, 4, candidate]
        alone = make_tokens((6,), (1,), (1,)).with_values(tokens.values[kept])
        alone = at_times(alone, tokens.timestamps[kept])
        torch.testing.assert_close(block(alone), rows[kept], rtol=1e-12, atol=1e-12)


def test_dropout_only_while_training() -> None:
    block, tokens = make_block(make_config("production", dropout=0.5)), make_tokens((8,))
    assert not torch.equal(block(tokens), block(tokens))
    block.eval()
    assert torch.equal(block(tokens), block(tokens))
