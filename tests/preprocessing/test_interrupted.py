"""Runs that are stopped, killed or come two at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hstu.data import SequenceDataset

from .conftest import ROOT, events, ratings, write_ml_100k

# The command with blocks of a few lines, which sends itself a signal while it reads the fourth.
STOPPED = """
import os, sys
sys.path.insert(0, {root!r})
import hstu.cli.preprocess as command, hstu.preprocessing.layout as layout, hstu.preprocessing.progress as progress
layout._CHUNK, progress._NOTE_SECONDS, parse = 300, 0, layout.Layout.parse
calls = 0
def stopped(*args):
    global calls
    calls += 1
    if calls == 4:
        os.kill(os.getpid(), {signal})
    return parse(*args)
layout.Layout.parse = stopped
command.main()
"""


def run(folder: Path, signal: int | None = None) -> subprocess.CompletedProcess[str]:
    flags = ["--dataset_name=ml-100k", "--data_dir=data", "--raw_dir=raw", "--check_counts=false"]
    script = [str(ROOT / "preprocessing" / "preprocessor.py")]
    if signal:
        script = ["-c", STOPPED.format(root=str(ROOT), signal=signal)]
    return subprocess.run([sys.executable, *script, *flags], cwd=folder, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("signal", [2, 15])
def test_an_interrupted_run_says_where_and_leaves_everything_as_it_was(tmp_path: Path, signal: int) -> None:
    write_ml_100k(tmp_path / "raw", ratings())
    result = run(tmp_path, signal)
    assert result.returncode == 128 + signal, result
    assert result.stderr.startswith("interrupted while reading u.data (event ")
    assert result.stderr.endswith("): data/ml-100k is as it was\n") and result.stderr.count("\n") == 1
    assert list((tmp_path / "data").iterdir()) == []


def test_a_killed_run_leaves_the_old_data_set_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    write_ml_100k(tmp_path / "raw", ratings(seed=1))
    assert run(tmp_path).returncode == 0
    old = events(SequenceDataset.open(tmp_path / "data" / "ml-100k"))
    write_ml_100k(tmp_path / "raw", ratings(seed=2))
    assert run(tmp_path, 9).returncode == -9
    assert (tmp_path / "data" / ".ml-100k.partial").is_dir()
    assert events(SequenceDataset.open(tmp_path / "data" / "ml-100k")) == old
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "an earlier run was stopped while reading u.data (event " in result.stdout
    assert events(SequenceDataset.open(tmp_path / "data" / "ml-100k")) != old
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ml-100k"]
