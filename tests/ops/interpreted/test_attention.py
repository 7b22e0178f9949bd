"""The Triton attention against the float64 reference: output and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hstu.ops.attention.triton.launch as attention
from hstu.ops import hstu_attention
from hstu.ops.attention.triton.config import TileConfig
from tests.ops.attention_cases import CASES, Case, build, outputs_and_gradients

SHORT = {(5, 0, 1, 70, 3, 130, 2): (5, 0, 1, 20, 3, 35, 2)}
QUICK = ["causal", "empty", "no_samples", "one_token", "not_causal", "everything"]


def shorter(case: Case) -> Case:
    """The same options on sequences that the interpreter gets through soon."""
    return case.named(lengths=SHORT.get(case.lengths, case.lengths), heads=1)


def check(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int] = (16, 32)) -> None:
    """The error is at most twice (forward) or three times (backward) that of the plain computation."""
    monkeypatch.setattr(attention, "tile_config", lambda *_, **__: TileConfig(*tile, warps=4, stages=1))
    tensors, arguments = build(case, dtype)
    exact = outputs_and_gradients(tensors, arguments, "reference", torch.float64)
    plain = outputs_and_gradients(tensors, arguments, "reference", dtype)
    kernel = outputs_and_gradients(tensors, arguments, "triton", dtype)
    for key, truth in exact.items():
        assert kernel[key].shape == truth.shape and kernel[key].dtype == dtype
        if truth.numel():
            factor = 2 if key == "out" else 3
            allowed = factor * (plain[key].double() - truth).abs().max() + 1e-6 * truth.abs().max()
            assert (kernel[key].double() - truth).abs().max() <= allowed, key


@pytest.mark.parametrize("name", QUICK)
def test_quick_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(shorter(CASES[name]), torch.float32, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (32, 32)])
@pytest.mark.parametrize("name", CASES)
def test_all_cases(name: str, tile: tuple[int, int], deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(deterministic)
    check(CASES[name], torch.float32, monkeypatch, tile)


@pytest.mark.parametrize("width", [25, 256])
def test_head_widths(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case((17, 1, 0, 34), heads=1, width=width, value_width=width), torch.float32, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 25, 32, 50, 64, 128, 256])
def test_more_head_widths(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for value_width in {width, min(256, width + 7)}:
        case = Case((17, 1, 0, 66), heads=2, width=width, value_width=value_width, position=True, time=True)
        check(case, dtype, monkeypatch)


def test_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    check(shorter(CASES["bias_next"]), torch.float16, monkeypatch)


def test_deterministic_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(True)
    check(shorter(CASES["candidates"]), torch.float32, monkeypatch, (32, 16))


def test_table_sums_in_fixed_point_do_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reversing the batch reverses the order of the additions: bit for bit the same table gradients."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(attention, "tile_config", lambda *_, **__: TileConfig(16, 16, 4, 1))
    case = Case((20, 33, 9), heads=1, position=True, time=True)
    tensors, arguments = build(case)
    pieces = [list(x.split(case.lengths)) for x in (*tensors, arguments["bias"].timestamps)]
    reversed_arguments = dict(arguments, offsets=torch.tensor([0, 9, 42, 62]))
    turned = [torch.cat(own[::-1]) for own in pieces]
    grads: list[list[torch.Tensor]] = []
    for (q, k, v, stamps), options in (
        ((*tensors, arguments["bias"].timestamps), arguments),
        (turned, reversed_arguments),
    ):
        tables = [t.clone().requires_grad_() for t in (arguments["bias"].position, arguments["bias"].time)]
        bias = attention.RelativeBias(position=tables[0], time=tables[1], timestamps=stamps)
        out = hstu_attention(q, k, v, **(options | {"bias": bias}), backend="triton")
        out.square().sum().backward()
        grads.append([t.grad for t in tables])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other) and bool(one.any())


def test_strided_inputs_and_gradients_into_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "tile_config", lambda *_, **__: TileConfig(16, 16, 4, 1))
    (q, k, v), arguments = build(Case((20, 3), heads=2, width=8, value_width=8))
    packed = torch.stack([v, q, k], 1).reshape(23, 3, 16)
    v2, q2, k2 = (packed[:, part].view(23, 2, 8) for part in range(3))
    expected = outputs_and_gradients([q, k, v], arguments, "reference", torch.float64)
    call = prepare(q2, v2, arguments)
    out = attention.forward(q2, k2, v2, None, None, call)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    into = torch.full((23, 3, 16), float("nan"))
    dv, dq, dk = (into[:, part].view(23, 2, 8) for part in range(3))
    attention.backward(weights, q2, k2, v2, None, None, call, into=(dq, dk, dv))
    for name, value in {"out": out, "d_q": dq, "d_k": dk, "d_v": dv}.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)


def prepare(q: torch.Tensor, v: torch.Tensor, arguments: dict[str, Any]) -> attention.AttentionCall:
    return attention.AttentionCall.prepare(
        q,
        v,
        arguments["offsets"],
        arguments["max_seqlen"],
        arguments["scaling_seqlen"],
        q.shape[-1] ** -0.5,
        attention.Mask(),
        attention.RelativeBias(),
    )


def test_times_that_span_more_than_the_kernel_counts_are_refused() -> None:
    stamps = torch.tensor([0, 2**32])
    q = torch.zeros(2, 1, 4)
    bias = attention.RelativeBias(time=torch.zeros(3), timestamps=stamps)
    with pytest.raises(ValueError, match="68 years"):
        hstu_attention(q, q, q, torch.tensor([0, 2]), max_seqlen=2, scaling_seqlen=1.0, bias=bias, backend="triton")


def test_double_precision_is_refused() -> None:
    q = torch.zeros(2, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        hstu_attention(q, q, q, torch.tensor([0, 2]), max_seqlen=2, scaling_seqlen=1.0, backend="triton")
