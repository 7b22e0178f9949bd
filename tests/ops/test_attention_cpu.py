"""The CPU path against the float64 reference: output and every gradient."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention
from hstu.ops.attention.bias import bucket_thresholds, query_times, time_bucket
from hstu.ops.attention.cpu import plan as cpu_plan
from hstu.ops.attention.cpu.bias import _CELL_SHIFT, _cell_tables
from hstu.ops.loops import torch_only
from tests.ops.attention_cases import CASES, RAGGED, build, outputs_and_gradients


def assert_as_good_as_reference(name: str, dtype: torch.dtype, factor: float = 2.0) -> None:
    tensors, arguments = build(CASES[name])
    exact = outputs_and_gradients(tensors, arguments, "reference", torch.float64)
    plain = outputs_and_gradients(tensors, arguments, "reference", dtype)
    fast = outputs_and_gradients(tensors, arguments, "cpu", dtype)
    for key, truth in exact.items():
        if truth.numel() == 0:
            assert fast[key].shape == truth.shape
            continue
        allowed = (plain[key].double() - truth).abs().max() * factor + 1e-6 * truth.abs().max()
        assert (fast[key].double() - truth).abs().max() <= allowed, key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str, dtype: torch.dtype) -> None:
    # Tiles round the sums of tables in another order, which few entries of bfloat16 show.
    assert_as_good_as_reference(name, dtype, 4.0 if dtype == torch.bfloat16 else 2.0)


@pytest.mark.parametrize(
    "name", ["candidates", "everything", "not_causal", "bias_next", "keys_bias", "keys_everything"]
)
def test_columns_in_several_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_plan, "TILE_ROWS", 16)
    monkeypatch.setattr(cpu_plan, "CHUNK_SCORES", 16 * 32 * 2)
    with torch_only():
        assert_as_good_as_reference(name, torch.float32)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "position", "time", "qv", "kt"])
def test_only_some_gradients_are_asked_for(wanted: str) -> None:
    tensors, arguments = build(CASES["bias"], torch.float64)
    full = outputs_and_gradients(tensors, arguments, "reference", torch.float64)
    wanted_names = {"qv": ["q", "v"], "kt": ["k", "time"]}.get(wanted, [wanted])
    bias = arguments.pop("bias")
    inputs = dict(zip("qkv", tensors, strict=True), position=bias.position, time=bias.time)
    for name in wanted_names:
        inputs[name] = inputs[name].clone().requires_grad_()
    bias = RelativeBias(position=inputs["position"], time=inputs["time"])
    out = hstu_attention(*(inputs[n] for n in "qkv"), **arguments, bias=bias, backend="cpu")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights).sum().backward()
    for name in wanted_names:
        torch.testing.assert_close(inputs[name].grad, full[f"d_{name}"])


def test_low_precision_with_float32_tables() -> None:
    tensors, arguments = build(CASES["bias"], torch.bfloat16)
    bias = arguments.pop("bias")
    results = []
    for backend in ("reference", "cpu"):
        tables = [t.detach().float().requires_grad_() for t in (bias.position, bias.time)]
        own = RelativeBias(position=tables[0], time=tables[1])
        out = hstu_attention(*tensors, **arguments, bias=own, backend=backend)
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and tables[0].grad.dtype == torch.float32
        results.append((out.float(), tables[0].grad, tables[1].grad))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, rtol=0.03, atol=0.03 * reference.detach().abs().max().item())


def test_strided_inputs() -> None:
    (q, k, v), arguments = build(RAGGED.named(value_width=8))
    packed = torch.cat([v, q, k], -1)
    views = packed[..., 8:16], packed[..., 16:], packed[..., :8]
    expected = hstu_attention(q, k, v, **arguments, backend="cpu")
    assert torch.equal(hstu_attention(*views, **arguments, backend="cpu"), expected)


@pytest.mark.parametrize("num_buckets", [1, 5, 40, 128, 200])
def test_bucket_cells_agree_with_the_definition(num_buckets: int) -> None:
    """Around every threshold and every cell border up to 2^62, and for each small difference."""
    thresholds = bucket_thresholds(num_buckets)
    borders = (torch.arange(1 << (31 - _CELL_SHIFT), dtype=torch.int32) << _CELL_SHIFT).view(torch.float32)
    borders = borders[(borders >= 1) & (borders < 2.0**62)].double().long()
    near = torch.cat([thresholds[thresholds < 2**62], borders])[:, None] + torch.arange(-70, 71)
    seconds = torch.cat([near.flatten(), torch.arange(5000)]).clamp(min=0)
    inside, buckets = _cell_tables(num_buckets)
    cell = seconds.float().view(torch.int32).long() >> _CELL_SHIFT
    index = 8 * cell + (seconds >= inside[cell])
    assert torch.equal(buckets[index], time_bucket(seconds, num_buckets))


def test_time_bucket_is_the_published_formula() -> None:
    seconds = torch.cat([torch.arange(-3, 20_000), torch.randint(0, 2**33, (20_000,))])
    formula = (seconds.abs().clamp(min=1).double().log() / 0.301).floor().long().clamp(max=60)
    assert torch.equal(time_bucket(seconds, 60), formula)


def test_time_differences_of_more_than_31_bits() -> None:
    tensors, arguments = build(CASES["time"])
    layout = arguments["layout"]
    arguments["layout"] = replace(layout, timestamps=layout.timestamps * 10_000)
    arguments["bias"] = RelativeBias(time=torch.randn(129))
    reference, fast = (outputs_and_gradients(tensors, arguments, b, torch.float64) for b in ("reference", "cpu"))
    for key in reference:
        torch.testing.assert_close(fast[key], reference[key])


def test_query_times() -> None:
    times = torch.tensor([1, 2, 3, 10, 20, 30, 31])
    layout = Layout(torch.tensor([0, 3, 3, 7]), timestamps=times)
    assert query_times(layout, "own") is times
    assert query_times(layout, "next").tolist() == [2, 3, 3, 20, 30, 31, 31]
    layout = replace(layout, num_candidates=torch.tensor([0, 0, 2]))
    assert query_times(layout, "next").tolist() == [2, 3, 3, 20, 30, 30, 31]


def test_scores_are_not_kept_for_the_backward() -> None:
    """Saved tensors grow with the tokens, not with the squares of the lengths."""
    saved: list[int] = []

    def count(x: torch.Tensor) -> torch.Tensor:
        saved.append(x.numel())
        return x

    q = torch.randn(600, 1, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        hstu_attention(q, q, q, Layout(torch.tensor([0, 600])), scaling_seqlen=1.0)
    assert sum(saved) == 3 * q.numel()


PEAK = """
import re, sys, torch
from hstu.ops import Layout, RelativeBias, hstu_attention, lengths_to_offsets

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

def step(lengths):
    total, longest = sum(lengths), max(lengths)
    q, k, v = (torch.randn(total, 2, 16, requires_grad=True) for _ in range(3))
    position = torch.zeros(2 * longest - 1, requires_grad=True)
    bias = RelativeBias(position=position, time=torch.zeros(65, requires_grad=True))
    layout = Layout(lengths_to_offsets(torch.tensor(lengths)), timestamps=torch.arange(total))
    hstu_attention(q, k, v, layout, scaling_seqlen=1.0, bias=bias).sum().backward()

torch.set_num_threads(1)
step([300])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from what is resident
before = resident("VmRSS")
step(eval(sys.argv[1]))
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux' /proc")
@pytest.mark.parametrize("lengths", [[2048] + [32] * 64, [8192]])
def test_peak_memory_grows_with_the_tokens_not_with_the_square_of_the_length(lengths: list[int]) -> None:
    """One padded float32 matrix of all scores would take 2.2 GB for the first batch, 540 MB for the second."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(lengths)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32e6 + 6000 * sum(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random_shapes(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(9, generator=rng).mul(1.2).add(3).exp()).long().clamp(max=500)
    ends = [(lengths * x).long().tolist() for x in (0.1, 0.3)]
    case = RAGGED.named(
        lengths=tuple(lengths.tolist()),
        heads=1 + seed % 4,
        width=1 + 7 * seed % 60,
        value_width=1 + 11 * seed % 70,
        context=tuple(ends[0]),
        candidates=tuple(ends[1]),
        segments=seed % 2 == 0,
        memory=seed % 3 == 0,
        position=seed % 4 != 0,
        time=seed % 5 != 0,
        mask=Mask(max_attn_len=40 if seed % 7 == 0 else None, causal=seed % 6 != 0),
        queries=None if seed % 2 else tuple((lengths * torch.rand(9, generator=rng)).ceil().long().tolist()),
    )
    tensors, arguments = build(case, torch.float64, seed)
    reference, fast = (outputs_and_gradients(tensors, arguments, b, torch.float64) for b in ("reference", "cpu"))
    for key in reference:
        torch.testing.assert_close(fast[key], reference[key])
