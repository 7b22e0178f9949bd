"""The kernels of the default configurations, compiled for GPUs that need not be here: nothing spills."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    pytest.importorskip("triton")
    specification = importlib.util.spec_from_file_location("kernel_report", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["kernel_report"] = module
    specification.loader.exec_module(module)
    return module


def check(report: ModuleType, kernel: str, width: int, options: str, arch: int, dtype: str) -> None:
    compiled = report.compile_kernel(kernel, width, options, arch, dtype=dtype)
    assert compiled.spilled_bytes == 0
    assert compiled.shared_bytes <= report.SHARED_LIMIT[arch]
    if dtype != "fp32":
        assert compiled.hgmma + compiled.hmma > 0
    if arch == 90 and kernel == "forward" and dtype != "fp32":
        assert compiled.hgmma > 0


@pytest.mark.parametrize(
    "kernel, width, options",
    [("forward", 128, "causal"), ("backward_columns", 64, "bias"), ("backward_rows", 256, "causal")],
)
def test_some_for_hopper(report: ModuleType, kernel: str, width: int, options: str) -> None:
    check(report, kernel, width, options, 90, "bf16")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("options", ["causal", "bias", "candidates", "all"])
@pytest.mark.parametrize("width", [25, 32, 50, 64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "backward_columns", "backward_rows"])
def test_all(report: ModuleType, kernel: str, width: int, options: str, arch: int, dtype: str) -> None:
    check(report, kernel, width, options, arch, dtype)
