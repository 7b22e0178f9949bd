"""The table of final scores that ends the demo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hstu.cli import scores


def write(run_dir: Path, record: object) -> str:
    run_dir.mkdir()
    (run_dir / "eval.json").write_text(json.dumps(record))
    return str(run_dir)


def test_scores_stand_beside_the_best_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ranking = write(tmp_path / "a", {"metrics": {"AUC": 0.72, "loss": 0.5}, "best_possible": {"AUC": 0.75}})
    retrieval = write(tmp_path / "b", {"metrics": {"HR@10": 0.2, "MRR": 0.1}})
    assert scores.main([ranking, retrieval]) == 0
    rows = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [["AUC", "0.7200", "0.7500", "96.0%"], ["HR@10", "0.2000"], ["MRR", "0.1000"]]


@pytest.mark.parametrize(("record", "complaint"), [({"kind": "eval"}, "has no 'metrics'"), ([1], "has no 'metrics'")])
def test_a_wrong_record_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], record: object, complaint: str):
    assert scores.main([write(tmp_path / "run", record)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_run_without_scores_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert scores.main([str(tmp_path)]) == 2
    assert "eval.json: not found" in capsys.readouterr().err


def test_runs_over_windows_have_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    about = {"protocol": "windows"}
    runs = [
        write(tmp_path / str(t), about | {"window": t, "metrics": {"HR@10": hr, "MRR": mrr}})
        for t, hr, mrr in ((0, 0.2, 0.1), (1, 0.4, None))
    ]
    assert scores.main(runs) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["mean", "of", "2", "runs", "HR@10", "0.3000"]
    assert scores.main(runs[:1]) == 0 and "mean" not in capsys.readouterr().out
