"""Where a run goes on when its batches have another size than those of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launch import ROOT, entrypoint, run, torchrun_command
from tests.tiny import BINDINGS, write_tiny


def flags(folder: Path, *bindings: str) -> list[str]:
    data = f"DatasetArgs.dataset_path='{folder / 'synthetic'}'"
    lines = (*BINDINGS["retrieval"], data, "TrainerArgs.log_interval=1", *bindings)
    given = [word for line in lines for word in ("--gin_bindings", line)]
    return ["--gin_config_file", str(folder / "empty.gin"), "--run_dir", str(folder / "run"), *given]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_another_global_batch_goes_on_at_the_same_sample(tmp_path: Path, ranks: int) -> None:
    write_tiny(tmp_path / "synthetic", 200)
    (tmp_path / "empty.gin").write_text("")
    started = entrypoint()("retrieval", *flags(tmp_path, "TrainerArgs.max_train_iters=3"), cwd=tmp_path)
    assert started.code == 0, started.err
    # 96 of 200 samples are taken: 104 left, then a whole epoch, in batches of 50.
    again = flags(tmp_path, "TrainerArgs.max_epochs=2", f"TrainerArgs.train_batch_size={50 // ranks}")
    if ranks == 1:
        resumed = entrypoint()("retrieval", *again, cwd=tmp_path)
    else:
        script = ROOT / "examples" / "pretrain_gr_retrieval.py"
        resumed = run(torchrun_command(ranks, script, *again), cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert "goes on at sample 96 of epoch 0 with 50 samples a step, 10 steps in all" in resumed.out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(record["step"], record["epoch"]) for record in records if record["kind"] == "train"]
    assert steps == [(step, int(step > 6)) for step in range(1, 11)]
    marker = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "complete.json").read_text())
    assert (marker["progress"]["step"], marker["progress"]["samples"]) == (10, 400)


def test_the_same_global_batch_says_nothing_of_it(tmp_path: Path) -> None:
    write_tiny(tmp_path / "synthetic", 200)
    (tmp_path / "empty.gin").write_text("")
    into_the_second = "TrainerArgs.max_train_iters=8", "TrainerArgs.max_epochs=2"
    started = entrypoint()("retrieval", *flags(tmp_path, *into_the_second), cwd=tmp_path)
    assert started.code == 0, started.err
    resumed = entrypoint()("retrieval", *flags(tmp_path, "TrainerArgs.max_epochs=2"), cwd=tmp_path)
    assert resumed.code == 0 and "another size" not in resumed.out
    marker = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "complete.json").read_text())
    assert (marker["progress"]["step"], marker["progress"]["samples"]) == (14, 400)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(record["step"], record["epoch"]) for record in records if record["kind"] == "train"]
    assert steps == [(step, int(step > 7)) for step in range(1, 15)]
