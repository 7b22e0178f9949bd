"""A data set is made anew every day under its name: yesterday's run is not taken for one of today, and goes on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from hstu.cli import export, predict
from hstu.data.table import preprocess_interactions
from tests.inference.test_predict import planted_log
from tests.launch import Done, entrypoint
from tests.tiny import BINDINGS

NAMES = dict(user_column="who", item_column="what", time_column="when", action_column="did")


@pytest.fixture(autouse=True)
def in_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    log = logging.getLogger("hstu")
    kept = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = kept


def preprocess(events: pl.DataFrame) -> None:
    preprocess_interactions(events, data_dir="tmp_data", name="synthetic", **NAMES)


def train(*flags: str) -> Done:
    lines = [flag for line in BINDINGS["retrieval"] for flag in ("--gin-bindings", line)]
    Path("c.gin").touch()
    config = ["--gin-config-file", "c.gin", *lines, "--gin-bindings", "RetrievalArgs.eval_metrics=('HR@10',)"]
    return entrypoint()("retrieval", *config, *flags, cwd=Path.cwd())


def test_yesterdays_run_is_refused_on_todays_ids_and_goes_on_by_init_from(capsys: pytest.CaptureFixture[str]) -> None:
    events, _ = planted_log()
    preprocess(events.filter(~pl.col("what").is_in(["sku 1", "sku 2"])))
    steps = ("--gin-bindings", "TrainerArgs.max_train_iters=6")
    done = train("--run-dir", "day-1", *steps)
    assert done.code == 0, done.err
    preprocess(events.sort("what", "who", descending=True))  # strings are numbered as they come
    for command, output in ((predict, "o.parquet"), (export, "out")):
        assert command.main(["--run-dir", "day-1", "--output", output]) == 2
        error = capsys.readouterr().err
        assert "was trained on another vocabulary of 'item_id'" in error and "60 values instead of 58" in error
        assert "--init-from" in error and error.count("\n") == 1 and not Path(output).exists()
    for flags in (("--mode", "eval"), ("--gin-bindings", "TrainerArgs.max_train_iters=9")):
        done = train("--run-dir", "day-1", *flags)
        assert done.code == 2 and "another vocabulary of 'item_id'" in done.err and done.err.count("\n") == 1
    done = train("--run-dir", "day-2", "--init-from", "day-1", *steps)
    assert done.code == 0, done.err
    rows = {"kept": 58, "new": 2, "left_out": 0}
    assert json.loads(Path("day-2/environment.json").read_text())["started_from"]["rows"]["item_id"] == rows
    assert "58 kept" in done.out and "58 kept" in Path("day-2/train.log").read_text()
    assert predict.main(["--run-dir", "day-2", "--output", "o.parquet"]) == 0
    shutil.rmtree("day-1")  # a run that has begun needs it no more
    done = train("--run-dir", "day-2", "--init-from", "day-1", "--gin-bindings", "TrainerArgs.max_train_iters=7")
    assert done.code == 0 and "not used again" in done.out, done.err
    records = [json.loads(line) for line in Path("day-2/metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["rows"]["item_id"]) for r in records if r["kind"] == "init"] == [(0, rows)]
    assert json.loads(Path("day-2/environment.json").read_text())["started_from"]["rows"]["item_id"] == rows
    done = train("--run-dir", "day-3", "--init-from", "day-1", *steps)
    assert done.code == 2 and "is neither a run directory with a finished checkpoint" in done.err
    assert not Path("day-3").exists()
