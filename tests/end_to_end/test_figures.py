"""What the documents and the headers of the planted configs say of a run is what a run gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT, entrypoint, run, torchrun_command

METRICS = {"ranking": ("AUC",), "retrieval": ("HR@10", "NDCG@10")}
#: Four standard errors of the difference of two trainings, over the 6,000 users of the planted data: each is 0.0065.
ERROR = 4 * 0.0065 * 2**0.5


def stated() -> Iterator[tuple[str, str, str, float, float]]:
    """Yield where a figure stands, its task and metric, the score and the best possible one."""
    readme, results = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    for task, metric, score, best in re.findall(r"^runs/demo/(\w+) +(\S+) +(0\.\d+) +(0\.\d+) ", readme, re.M):
        yield "README.md, demo", task, metric, float(score), float(best)
    for task in METRICS:
        (row,) = re.findall(rf"^\| `synthetic_{task}\.gin` \|.*$", results, re.M)
        for metric, score, best in re.findall(r"(\S+) (0\.\d+) of (0\.\d+)", row):
            yield "docs/results.md", task, metric, float(score), float(best)
        config = ROOT / "configs" / f"synthetic_{task}.gin"
        (header,) = re.findall(r"^# [\d-]+: test (.*?)\.?$", config.read_text(), re.M)
        scores, best_ones = header.split("; best possible ")
        for (metric, score), best in zip(re.findall(r"(\S+) (0\.\d+)", scores), best_ones.split(", "), strict=True):
            yield config.name, task, metric, float(score), float(best)


def test_every_place_states_every_metric() -> None:
    found = sorted((where, metric) for where, _, metric, _, _ in stated())
    places = ("README.md, demo", "docs/results.md")
    wanted = [(place, metric) for place in places for metrics in METRICS.values() for metric in metrics]
    wanted += [(f"synthetic_{task}.gin", metric) for task, metrics in METRICS.items() for metric in metrics]
    assert found == sorted(wanted)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", METRICS)
def test_a_run_gives_what_is_stated(tmp_path: Path, task: str) -> None:
    script = ROOT / "preprocessing" / "preprocessor.py"
    assert run(torchrun_command(1, script, "--dataset_name", "synthetic"), cwd=tmp_path).code == 0
    flags = (f"--gin-config-file=synthetic_{task}.gin", "--run-dir=run")
    done = entrypoint()(task, *flags, cwd=tmp_path, timeout=3000)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "run" / "eval.json").read_text())
    for where, of, metric, score, best in stated():
        if of == task:
            assert record["best_possible"][metric] == pytest.approx(best, abs=6e-4), where
            assert record["metrics"][metric] == pytest.approx(score, abs=ERROR), where
