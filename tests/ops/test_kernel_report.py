"""The kernels of the default configurations, compiled for GPUs that need not be here: next to nothing spills."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

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
