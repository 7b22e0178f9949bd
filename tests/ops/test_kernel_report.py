"""The kernels of the default configurations, compiled for GPUs that need not be here: next to nothing spills."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.ops import Layout, RelativeBias, hstu_attention

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("kernel_report")
    for name in ("kernel_report", "null_driver"):
        sys.modules.pop(name, None)


def check(report: ModuleType, kernel: str, width: int, options: str, arch: int, dtype: str) -> None:
    compiled = report.compile_kernel(kernel, width, options, arch, dtype=dtype)
    # Four of 255 registers a thread; tiles without any take twice the instructions. With every kind of mask at once
    # and both tables tiles are as without, and may spill.
    assert compiled.spilled_bytes <= (16 if options != "all" else 192)
    assert compiled.shared_bytes <= report.SHARED_LIMIT[arch]
    if dtype != "fp32":
        assert compiled.hgmma + compiled.hmma > 0
    if arch == 90 and dtype != "fp32" and width in (64, 128, 256):
        assert compiled.hgmma > 0 and compiled.tma > 0
    if dtype != "fp32" and width not in (64, 128, 256):
        assert compiled.tma == 0


@pytest.mark.parametrize("kernel, width", [("forward", 128), ("columns", 64), ("rows", 256)])
def test_some_for_hopper(report: ModuleType, kernel: str, width: int) -> None:
    check(report, kernel, width, "causal", 90, "bf16")


def test_each_architecture_has_kernels_of_its_own(report: ModuleType) -> None:
    older, newer = (report.compile_kernel("forward", 64, "causal", arch) for arch in (80, 90))
    assert older.hmma > 0 == older.hgmma and newer.hgmma > 0 == newer.hmma


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("options", ["causal", "bias", "candidates", "all"])
@pytest.mark.parametrize("width", [25, 32, 50, 64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "columns", "rows"])
def test_all(report: ModuleType, kernel: str, width: int, options: str, arch: int, dtype: str) -> None:
    check(report, kernel, width, options, arch, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["forward", "columns", "rows"])
def test_the_bias_adds_little_to_the_hottest_loop(report: ModuleType, kernel: str) -> None:
    plain, biased = (report.compile_kernel(kernel, 128, options, 90) for options in ("causal", "bias"))
    assert biased.loop_a_part <= 1.6 * plain.loop_a_part


class Launches:
    """What is launched: the compiled kernel, its grid, and its arguments, of tensors what Triton looks at."""

    def __init__(self, null_driver: ModuleType) -> None:
        self.all: list[Any] = []

        class Driver(null_driver.NullDriver):  # type: ignore[name-defined]
            def launcher_cls(_, source: Any, metadata: Any) -> Any:
                return lambda *values: self.all.append(
                    (metadata.name, metadata.hash, values[:3], *map(self.told, values[9:]))
                )

        self.driver = Driver

    def told(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype, value.shape, value.stride(), value.data_ptr() % 16
        if isinstance(value, tuple):
            return tuple(map(self.told, value))
        if hasattr(value, "block_shape"):
            return self.told(value.base), value.shape, value.strides, value.block_shape, value.padding
        return getattr(value, "value", value)


def operands_of_several_kinds() -> dict[str, tuple[list[Tensor], RelativeBias | None, float]]:
    """q, k and v on one layout that Triton compiles different kernels for, tables, and alpha."""

    def shifted(width: int, *first: int) -> list[Tensor]:
        return [torch.zeros(9 * 2 * width + 8)[n : n + 18 * width].view(9, 2, width) for n in first]

    whole = [torch.zeros(9, 2, 16, dtype=torch.bfloat16) for _ in "qkv"]
    packed = torch.zeros(9, 4, 2, 16, dtype=torch.bfloat16)
    tables = torch.zeros(30), torch.zeros(9)
    return {
        "whole": (whole, None, 0.5),
        "a whole number": (whole, None, 1),
        "parts of one tensor": ([packed[:, n] for n in (3, 1, 2)], None, 0.5),
        "q off its place": (shifted(25, 1, 0, 0), None, 0.5),
        "k off its place": (shifted(25, 0, 1, 0), None, 0.5),
        "tables": (whole, RelativeBias(position=tables[0][:-1], time=tables[1]), 0.5),
        "a longer table": (whole, RelativeBias(position=torch.zeros(41), time=tables[1]), 0.5),
        "a table off its place": (whole, RelativeBias(position=tables[0][1:], time=tables[1]), 0.5),
        "bfloat16 tables": (whole, RelativeBias(position=torch.zeros(29).bfloat16(), time=tables[1].bfloat16()), 0.5),
    }


def check_later_launches(report: ModuleType, monkeypatch: pytest.MonkeyPatch, names: list[str], grad: bool) -> None:
    """Layers after the first launch what Triton would have chosen for each on a layout of its own."""
    null_driver = sys.modules["null_driver"]
    launches, kinds = Launches(null_driver), operands_of_several_kinds()
    monkeypatch.setattr(null_driver, "NullDriver", launches.driver)

    def run(layout: Layout, name: str) -> list[Any]:
        tensors, bias, alpha = kinds[name]
        tensors = [x.detach().requires_grad_(grad) for x in tensors]
        if bias is not None:
            parts = {part: getattr(bias, part).detach().requires_grad_(grad) for part in ("position", "time")}
            bias = RelativeBias(**parts)
        launches.all.clear()
        out = hstu_attention(*tensors, layout, scaling_seqlen=9.0, alpha=alpha, bias=bias, backend="triton")
        if grad:
            out.backward(torch.ones_like(out))
        return [one for one in launches.all if one[0] != "plan_blocks"]  # once a layout

    def layout() -> Layout:
        return Layout(torch.tensor([0, 5, 9]), timestamps=torch.arange(9))

    with null_driver.null_driver(90):
        kept = layout()
        first = [run(kept, name) for name in names]
        again, alone = [run(kept, name) for name in names], [run(layout(), name) for name in names]
    for name, *found in zip(names, first, again, alone, strict=True):
        assert found[0] and found[0] == found[1] == found[2], name


def test_later_layers_launch_what_triton_would_choose(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    check_later_launches(report, monkeypatch, ["q off its place", "k off its place"], grad=False)


@pytest.mark.slow
def test_later_layers_of_every_kind(report: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    check_later_launches(report, monkeypatch, list(operands_of_several_kinds()), grad=True)
