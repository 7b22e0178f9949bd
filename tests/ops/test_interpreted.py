"""Run the tests of ``interpreted/`` in processes of their own, where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[2]


def run(name: str, *options: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(FOLDER / name), "-x", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_quick(name: str) -> None:
    run(name, "-m", "not slow")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_wide(name: str) -> None:
    run(name, "-m", "slow")
