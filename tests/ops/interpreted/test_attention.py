"""The Triton attention, HSTU's and softmax, against the float64 reference: output and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import hstu.ops.attention.triton.launch as attention
from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from hstu.ops.attention.triton.config import TileConfig
from hstu.ops.attention.triton.hstu import TritonAttention
from tests.ops.attention_cases import CASES, Case, build, check, outputs_and_gradients

SHORT = {
    (5, 0, 1, 70, 3, 130, 2): (5, 0, 1, 20, 3, 35, 2),
    (2, 0, 1, 33, 3, 7, 1): (2, 0, 1, 17, 3, 7, 1),
    (0, 0, 1, 40, 0, 129, 2): (0, 0, 1, 20, 0, 34, 2),
}
QUICK = ["causal", "empty", "no_samples", "one_token", "not_causal", "everything", "keys_some_samples"]
Attention = Callable[..., torch.Tensor]


def shorter(case: Case) -> Case:
    """The same options on sequences that the interpreter gets through soon."""
    queries = None if case.queries is None else SHORT.get(case.queries, case.queries)
    return case.named(lengths=SHORT.get(case.lengths, case.lengths), queries=queries, heads=1)


def small_tiles(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int] = (16, 32), *, split: bool = False) -> None:
    monkeypatch.setattr(attention, "tile_config", lambda *_, **__: TileConfig(*tile, warps=4, stages=1, split=split))


@pytest.mark.parametrize("name", QUICK)
def test_quick_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    check(shorter(CASES[name]), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (32, 32)])
@pytest.mark.parametrize("name", CASES)
def test_all_cases(name: str, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, tile, split=tile == (32, 16))
    check(CASES[name], torch.float32)


@pytest.mark.parametrize("name", ["causal", "everything", "keys_some_samples"])
def test_softmax_with_shared_heads_of_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, split=name == "everything")
    check(shorter(CASES[name]).named(width=16, value_width=16), torch.float32, softmax_attention, groups=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_softmax_in_all_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    check(CASES[name], torch.float32, softmax_attention)


@pytest.mark.parametrize("width", [16, 25, 256])
def test_head_widths(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tensor descriptors (16, 256) and by pointers (25)."""
    small_tiles(monkeypatch, split=width == 256)
    check(Case((17, 1, 0, 34), heads=1, width=width, value_width=width), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("run", [hstu_attention, softmax_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 25, 32, 50, 64, 128, 256])
def test_more_head_widths(width: int, dtype: torch.dtype, run: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    for value_width in {width, min(256, width + 7)}:
        case = Case((17, 1, 0, 66), heads=2, width=width, value_width=value_width, position=True, time=True)
        check(case, dtype, run)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "bias_next")) for n in CASES])
def test_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch, bfloat16: None) -> None:
    small_tiles(monkeypatch)
    check(shorter(CASES[name]), torch.bfloat16)


def test_bias_in_more_parts_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, (16, 16))
    monkeypatch.setattr(attention, "CHUNK_BYTES", 10_000)
    check(shorter(CASES["candidates"]).named(position=True, time=True), torch.float32)


def test_times_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, (16, 16))
    case = Case((40, 3), heads=1, time=True)
    tensors, arguments = build(case)
    times = torch.randint(0, 10**7, (43,), generator=torch.Generator().manual_seed(5))
    arguments["layout"] = Layout(arguments["layout"].offsets, timestamps=times)
    exact, kernel = (
        outputs_and_gradients(tensors, arguments, backend, dtype)
        for backend, dtype in (("reference", torch.float64), ("triton", torch.float32))
    )
    for key, truth in exact.items():
        torch.testing.assert_close(kernel[key].double(), truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


def test_table_sums_in_fixed_point_do_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reversing the batch reverses the order of the additions: bit for bit the same table gradients."""
    small_tiles(monkeypatch, (16, 16))
    case = Case((20, 33, 9), heads=1, position=True, time=True)
    tensors, arguments = build(case)
    times = arguments["layout"].timestamps
    grads: list[list[torch.Tensor]] = []
    for turn in (1, -1):
        q, k, v, stamps = (torch.cat(x.split(case.lengths)[::turn]) for x in (*tensors, times))
        lengths = torch.tensor(case.lengths[::turn])
        layout = Layout(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), timestamps=stamps)
        tables = [t.clone().requires_grad_() for t in (arguments["bias"].position, arguments["bias"].time)]
        bias = RelativeBias(position=tables[0], time=tables[1])
        out = hstu_attention(q, k, v, layout, scaling_seqlen=12.5, bias=bias, backend="triton")
        out.square().sum().backward()
        grads.append([t.grad for t in tables])
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other) and bool(one.any())


def test_strided_inputs_and_gradients_into_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, (16, 16))
    tensors, arguments = build(Case((20, 3), heads=2, width=8, value_width=8))
    q, k, v = tensors
    packed = torch.stack([v, q, k], 1).reshape(23, 3, 16)
    v2, q2, k2 = (packed[:, part].view(23, 2, 8) for part in range(3))
    expected = outputs_and_gradients(tensors, arguments, "reference", torch.float64)
    layout = arguments["layout"]
    run = TritonAttention(layout, Mask(), scaling_seqlen=12.5, alpha=8**-0.5, bias=RelativeBias(), keys=layout)
    out = run.forward(q2, k2, v2, None, None)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    into = torch.full((23, 3, 16), float("nan"))
    dv, dq, dk = (into[:, part].view(23, 2, 8) for part in range(3))
    run.backward(weights, (q2, k2, v2), (None, None), (dq, dk, dv), (False, False))
    for name, value in {"out": out, "d_q": dq, "d_k": dk, "d_v": dv}.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)


def test_layers_of_a_batch_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, (16, 16))
    made: list[tuple[int, int, bool]] = []
    honest = attention.Batch._make_plan
    monkeypatch.setattr(attention.Batch, "_make_plan", lambda self, *key: made.append(key) or honest(self, *key))
    q = torch.randn(20, 1, 16, requires_grad=True)
    layout = Layout(torch.tensor([0, 20]))
    out = q
    for _ in range(3):
        out = hstu_attention(out, q, q, layout, scaling_seqlen=20.0, backend="triton")
    out.sum().backward()
    assert len(made) == 2  # by rows and by columns
    hstu_attention(q, q, q, layout, Mask(max_attn_len=3), scaling_seqlen=20.0, backend="triton")
    assert len(made) == 3


def test_tiles_that_no_pair_can_attend_are_skipped() -> None:
    """Segments of 32 tokens in tiles of 16: a block has its own segment's tiles at most, and no mask for whole ones."""
    layout = Layout(torch.tensor([0, 128]), segments=(torch.arange(128) // 32).int())
    plan, number = attention.Batch.of(layout, layout, (128, 128), Mask()).plan(16, 16, by_rows=True)
    first, stop, listed = (plan.blocks[: number - 1, field] for field in (7, 8, 9))
    assert (stop - first + listed).tolist() == [2, 1] * 4  # the last block comes first
    assert listed.tolist() == [1, 1] * 4


def test_times_that_span_more_than_the_kernel_counts_are_refused() -> None:
    layout = Layout(torch.tensor([0, 2]), timestamps=torch.tensor([0, 2**32]))
    q = torch.zeros(2, 1, 4)
    with pytest.raises(ValueError, match="34 years"):
        hstu_attention(
            q, q, q, layout, scaling_seqlen=1.0, bias=RelativeBias(time=torch.zeros(3)), backend="triton"
        )  # fmt: skip


@pytest.mark.parametrize("run", [hstu_attention, softmax_attention])
def test_double_precision_is_refused(run: Attention) -> None:
    q = torch.zeros(2, 1, 4, dtype=torch.float64)
    scaling = {"scaling_seqlen": 1.0} if run is hstu_attention else {}
    with pytest.raises(ValueError, match="float64"):
        run(q, q, q, Layout(torch.tensor([0, 2])), backend="triton", **scaling)


@pytest.mark.parametrize("run", [hstu_attention, softmax_attention])
def test_heads_of_one_value_are_refused_where_triton_loses_their_stride(
    run: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.triton, "__version__", "3.6.0")
    q, v = torch.zeros(2, 1, 4), torch.zeros(2, 1, 1)
    scaling = {"scaling_seqlen": 1.0} if run is hstu_attention else {}
    with pytest.raises(ValueError, match="head width is 1, which triton 3.6.0"):
        run(q, q, v, Layout(torch.tensor([0, 2])), backend="triton", **scaling)
