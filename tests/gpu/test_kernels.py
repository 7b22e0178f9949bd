"""Every kernel on a GPU against the float64 reference, with the tiles that are used there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hstu.ops import Layout, Mask, hstu_attention, softmax_attention
from tests.layers import test_cache as caches
from tests.ops import attention_cases, layer_cases, softmax_cases
from tests.ops.attention_cases import CASES, Case
from tests.ops.moved import moved

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOW = DTYPES[1:]
LONG = Case((300, 0, 1, 517, 129), heads=2)


@pytest.fixture(autouse=True)
def any_order() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, dtype: torch.dtype) -> None:
    attention_cases.check(CASES[name], dtype, device="cuda")


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", CASES)
def test_softmax_attention(name: str, dtype: torch.dtype) -> None:
    attention_cases.check(CASES[name], dtype, softmax_attention, groups=2, device="cuda")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("width", [1, 25, 32, 50, 64, 128, 256])
def test_head_widths(width: int, biased: bool) -> None:
    case = LONG.named(width=width, value_width=width, position=biased, time=biased)
    attention_cases.check(case, torch.bfloat16, device="cuda")
    attention_cases.check(case, torch.bfloat16, softmax_attention, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_gradients(dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    case = LONG.named(width=64, value_width=64, position=True, time=True)
    attention_cases.check(case, dtype, device="cuda")
    tensors, arguments = moved(attention_cases.build(case, dtype), "cuda")
    one, two = (attention_cases.outputs_and_gradients(tensors, arguments, "triton", dtype) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", layer_cases.LAYERS)
def test_layer(name: str, dtype: torch.dtype) -> None:
    layer_cases.check(layer_cases.LAYERS[name], dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", softmax_cases.CASES)
def test_cross_entropy(name: str, dtype: torch.dtype) -> None:
    softmax_cases.check(name, dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", caches.MASKS)
@pytest.mark.parametrize("kind", caches.KINDS)
@torch.no_grad()
def test_extensions_behind_a_cache(kind: str, mask: str, dtype: torch.dtype) -> None:
    exact = caches.make_stack(kind, caches.MASKS[mask])(caches.make_tokens(caches.BLOCKS))
    stack = caches.make_stack(kind, caches.MASKS[mask], dtype).cuda()
    tokens = caches.make_tokens(caches.BLOCKS, dtype)
    cuts = [cut.cuda() for cut in caches.random_cuts(tokens, 2, 5)]
    tokens = moved(tokens, "cuda")
    found, _ = caches.run_in_pieces(stack, tokens, cuts)
    whole = stack(tokens)
    allowed, size = (whole.double().cpu() - exact).abs().max(), exact.abs().max()
    assert allowed <= 64 * torch.finfo(dtype).eps * size
    assert (found.double().cpu() - exact).abs().max() <= 2 * allowed + 8 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("run", [hstu_attention, softmax_attention])
def test_no_call_waits_for_the_device(run: Any) -> None:
    """After the first call, which compiles."""
    lengths = torch.tensor([300, 0, 1, 517])
    layout = Layout(
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).cuda(),
        max_seqlen=517,
        timestamps=torch.arange(int(lengths.sum())).cuda(),
    )
    q, k, v = (torch.randn(int(lengths.sum()), 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    more = {"scaling_seqlen": 517.0} if run is hstu_attention else {}
    inputs = [x.requires_grad_() for x in (q, k, v)]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run(*inputs, layout, Mask(), backend="triton", **more).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
