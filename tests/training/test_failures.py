"""What happens when one rank of several fails: it hangs, dies, errs, or meets a loss that is not a number."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.launch import ROOT, run, started, torchrun_command
from tests.training.runs import losses, trainer, worst
from tests.training.test_interruption import flags

WORKER = Path(__file__).with_name("failure_worker.py")


def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(data: Path, tmp_path: Path) -> None:
    done = run(torchrun_command(2, WORKER, "skip", str(data), str(tmp_path)), timeout=100, cwd=tmp_path)
    (first, _), (second, rows) = (json.loads((tmp_path / f"progress{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and (first["step"], first["dense_steps"], first["table_steps"]) == (6, 5, 5)
    named = re.search(
        r"not finite at step 3: .*; users of the batch: ([\d, ]+) and 6 more in train.log; the step is", done.out
    )
    with trainer(data, tmp_path / "own") as one:
        originals = one.dataset.vocabulary(one.dataset.schema.user.name)
    assert named is not None, done.out + done.err
    assert named[1] == ", ".join(str(originals[row]) for row in rows[:10]), "those of rank 1 alone"
    assert done.code != 0 and done.err.count("error on rank 1: TrainerArgs.seed = 7: only here") == 1, done.err


@pytest.mark.slow
def test_a_mistake_of_all_ranks_is_printed_once(data: Path, tmp_path: Path) -> None:
    done = run(torchrun_command(2, WORKER, "everywhere", str(data), str(tmp_path)), timeout=100, cwd=tmp_path)
    assert done.code != 0 and done.err.count("TrainerArgs.seed = 8: everywhere") == 1
    assert "\nerror: TrainerArgs.seed" in "\n" + done.err


def test_a_hanging_rank_ends_the_job_and_leaves_stacks(data: Path, tmp_path: Path) -> None:
    done = run(torchrun_command(2, WORKER, "hang", str(data), str(tmp_path)), timeout=100, cwd=tmp_path)
    assert done.code != 0
    stacks = [(tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "in sleeping" in stacks[1] and "failure_worker.py" in stacks[1]
    assert "in take" in stacks[0] and "in take" not in stacks[1]


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(data: Path, tmp_path: Path) -> None:
    limits = ("TrainerArgs.max_train_iters=30", "TrainerArgs.ckpt_save_interval=4", "TrainerArgs.eval_interval=30")
    with trainer(data, tmp_path / "whole", "ranking", *limits, "NetworkArgs.hidden_dropout=0.0") as whole:
        whole.train()
    script = ROOT / "examples" / "pretrain_gr_ranking.py"
    command = torchrun_command(2, script, *flags(data, *limits, "NetworkArgs.hidden_dropout=0.0", batch=16))
    place = command.index("--standalone")
    command.insert(place, "--max-restarts=1")
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 100
    with started(command, cwd=tmp_path) as process:
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 11):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(process.pid).children() if "pretrain_gr_ranking.py" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks[1].send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    resumed = re.findall(r"resumed from .* at step (\d+)", out)
    assert len(resumed) == 1 and int(resumed[0]) >= 4, out
    assert worst(losses(tmp_path / "run"), losses(tmp_path / "whole")) < 1e-5
    assert not list((tmp_path / "run" / "stacks").iterdir()), "nothing is left of the ranks that were ended"


def test_restarts_need_a_run_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu.cli import train

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setattr(train, "FLAGS", type("Flags", (), {"run_dir": None, "mode": "train"})())
    with pytest.raises(ValueError, match="--run-dir is required with torchrun --max-restarts"):
        train._run_path()
