"""Compiled loops on a CPU: their threads, their cache, and the torch path that stands in for them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.ops import Mask, hstu_attention, loops
from hstu.ops.attention.cpu import runs
from hstu.ops.attention.cpu.compiled import CompiledAttention
from tests.ops.attention_cases import CASES, RAGGED, build, outputs_and_gradients
from tests.ops.test_attention_cpu import assert_as_good_as_reference

WIDE = CASES["everything"].named(lengths=(300, 0, 1, 520, 257), context=(2, 0, 0, 3, 0), candidates=(5, 0, 1, 70, 3))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def many_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "SHARE_WORK", 64)
    monkeypatch.setattr(runs, "PART_ROWS", 40)


def test_float32_on_a_cpu_takes_them() -> None:
    x = torch.zeros(1)
    assert loops.compiled_loops_for(x, None)
    assert not loops.compiled_loops_for(x, x.double())
    assert not loops.compiled_loops_for(x.bfloat16())
    assert not loops.compiled_loops_for(x.to("meta"))
    with loops.torch_only():
        assert not loops.compiled_loops_for(x)


@pytest.mark.parametrize("name", ["everything", "bias_next", "keys_everything", "not_causal"])
def test_sequences_in_parts(name: str, many_shares: None) -> None:
    assert_as_good_as_reference(name, torch.float32)


@pytest.mark.parametrize("mask", [WIDE.mask, Mask(max_attn_len=20), Mask(causal=False)])
def test_columns_in_several_tiles(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "wide", WIDE.named(mask=mask, segments=mask is WIDE.mask, memory=mask is WIDE.mask))
    assert_as_good_as_reference("wide", torch.float32)


def test_buckets_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu.ops.attention.cpu.compiled.KEPT_PER_TOKEN", 20)
    for name in ("bias_next", "everything", "keys_bias"):
        assert_as_good_as_reference(name, torch.float32)


@pytest.mark.parametrize("name", ["everything", "bias", "keys_everything"])
def test_threads_change_no_bit(name: str, threads: None, many_shares: None) -> None:
    tensors, arguments = build(CASES[name])
    found, shares = [], set()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        shares.add(loops.shares_of(1000))  # the order of sums
        found.append(outputs_and_gradients(tensors, arguments, "cpu", torch.float32))
    assert shares == {15}
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in found[0])


def test_callers_in_several_threads(threads: None, many_shares: None) -> None:
    torch.set_num_threads(2)
    tensors, arguments = build(CASES["bias"])
    expected = outputs_and_gradients(tensors, arguments, "cpu", torch.float32)

    def call(_: int) -> dict[str, torch.Tensor]:
        return outputs_and_gradients(tensors, build(CASES["bias"])[1], "cpu", torch.float32)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(8)):
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_error_in_a_share_is_raised_when_all_threads_are_done(threads: None) -> None:
    torch.set_num_threads(3)

    def run(share: int) -> None:
        if share == 7:
            raise ValueError("share 7")

    with pytest.raises(ValueError, match="share 7"):
        loops.run_shares(20, run)


@pytest.mark.parametrize("name", ["everything", "keys_some_samples"])
def test_every_entry_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out uninitialised is full of NaN here."""
    empty = torch.empty

    def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
        x = empty(*shape, **options)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    tensors, arguments = build(CASES[name])
    expected = outputs_and_gradients(tensors, arguments, "cpu", torch.float32)
    arguments = build(CASES[name])[1]
    monkeypatch.setattr(torch, "empty", poisoned)
    found = outputs_and_gradients(tensors, arguments, "cpu", torch.float32)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_nan_stays_in_its_rows() -> None:
    (q, k, v), arguments = build(RAGGED)
    q[9] = torch.nan
    out = hstu_attention(q, k, v, **arguments, backend="cpu")
    assert out[9].isnan().all() and out.isnan().sum() == out[9].numel()


def test_strides_of_gradients_that_are_written_in_place() -> None:
    (q, k, v), arguments = build(RAGGED.named(value_width=8))
    attention = CompiledAttention(arguments["layout"], Mask(), arguments["layout"], "own", alpha=1.0, scale=0.1)
    packed = torch.full((*q.shape[:2], 24), torch.nan)
    into = packed[..., 8:16], packed[..., 16:], packed[..., :8]
    attention.backward(v, (q, k, v), (None, None), into, (False, False))
    apart = tuple(torch.empty_like(x) for x in into)
    attention.backward(v, (q, k, v), (None, None), apart, (False, False))
    assert all(torch.equal(a, b) for a, b in zip(into, apart, strict=True))


def test_without_numba_torch_stands_in_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tensors, arguments = build(CASES["bias"])
    with loops.torch_only():
        expected = outputs_and_gradients(tensors, arguments, "cpu", torch.float32)
    monkeypatch.setitem(sys.modules, "numba", None)  # what an import finds where it is not installed
    loops._installed.cache_clear()
    with caplog.at_level(logging.INFO):
        found = outputs_and_gradients(tensors, arguments, "cpu", torch.float32)
    loops._installed.cache_clear()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [r.message for r in caplog.records if "CPU loops" in r.message] == [
        "CPU loops: torch's operators (numba is not installed: pip install 'hstu[fast]')"
    ]


def test_loops_that_cannot_be_kept_are_compiled_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    from hstu.ops.numba_lanes import compiled

    names: dict[str, Any] = {}
    exec("def twice(x):\n    return x + x", names)  # of no file: nowhere to keep it
    assert compiled("float32(float32)")(names["twice"])(1.5) == 3.0
    assert "no folder to keep them in can be written" in caplog.text


def test_compiled_loops_are_kept() -> None:
    from hstu.ops.attention.cpu import numba_hstu

    for loop in (numba_hstu.forward, numba_hstu.backward, numba_hstu.keep_buckets):
        assert any(Path(loop.stats.cache_path).glob(f"numba_hstu.{loop.__name__}-*.nbi"))
