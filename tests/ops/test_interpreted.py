"""Run the tests of ``interpreted/`` in a process of their own, where Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[2]


def run(*options: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-x", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.timeout(900)
def test_quick() -> None:
    run("-m", "not slow")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_wide() -> None:
    run("-m", "slow")
