"""What happens when one rank of several fails: it hangs, dies, errs, or meets a loss that is not a number."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from hstu.cli.command import run_on_mesh
from hstu.config import load_config
from hstu.models import RetrievalModel
from hstu.parallel import Mesh
from hstu.training import evaluate, watchdog
from hstu.training.checkpoint import Checkpointer
from hstu.training.checkpoint_files import read_marker
from hstu.training.meter import TrainingError
from hstu.training.run_data import find_dataset
from hstu.training.run_directory import RunDirectory, configure_logging, kept_logging
from hstu.training.step import Stepper
from tests.launch import ROOT, Done, forked, run, started, torchrun_command
from tests.tiny import BINDINGS
from tests.training.runs import losses, trainer, worst
from tests.training.test_interruption import flags

WORKER = Path(__file__).with_name("failure_worker.py")
LAUNCHED = pytest.mark.parametrize("launch", ["forked", pytest.param("torchrun", marks=pytest.mark.slow)])


def two_ranks(launch: str, mode: str, data: Path, out: Path) -> Done:
    """Run a mode of the worker on two ranks, which torchrun takes ten seconds to start."""
    if launch == "forked":
        return forked(WORKER, mode, str(data), str(out), ranks=2, cwd=out)
    return run(torchrun_command(2, WORKER, mode, str(data), str(out)), cwd=out)


@LAUNCHED
def test_a_step_that_is_bad_on_one_rank_is_skipped_on_all(launch: str, data: Path, tmp_path: Path) -> None:
    done = two_ranks(launch, "skip", data, tmp_path)
    (first, _), (second, rows) = (json.loads((tmp_path / f"progress{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and (first["step"], first["dense_steps"], first["table_steps"]) == (6, 5, 5)
    named = re.search(
        r"not finite at step 3: .*; users of the batch: ([\d, ]+) and 6 more in train.log; the step is", done.out
    )
    with trainer(data, tmp_path / "own") as one:
        originals = one.dataset.vocabulary(one.dataset.schema.user.name)
    assert named is not None, done.out + done.err
    assert named[1] == ", ".join(str(originals[row]) for row in rows[:10]), "those of rank 1 alone"
    lines = done.err.splitlines()
    assert done.code != 0 and lines.count("error on rank 1: TrainerArgs.seed = 7: only here") == 1, done.err
    assert "of 2 failed" not in done.err and "waitForInput" not in done.err, "nothing else hides it"


@pytest.mark.slow
def test_a_mistake_of_all_ranks_is_printed_once(data: Path, tmp_path: Path) -> None:
    done = run(torchrun_command(2, WORKER, "everywhere", str(data), str(tmp_path)), cwd=tmp_path)
    assert done.code != 0 and done.err.count("TrainerArgs.seed = 8: everywhere") == 1
    assert "\nerror: TrainerArgs.seed" in "\n" + done.err


@LAUNCHED
def test_a_hanging_rank_ends_the_job_and_leaves_stacks(launch: str, data: Path, tmp_path: Path) -> None:
    done = two_ranks(launch, "hang", data, tmp_path)
    assert done.code != 0
    stacks = [(tmp_path / "run" / "stacks" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "in sleeping" in stacks[1] and "failure_worker.py" in stacks[1]
    assert "in take" in stacks[0] and "in take" not in stacks[1]
    log = done.out.partition("rank 1 ends the job: no progress for 8 s")[2]
    assert "in sleeping" in log, done.out


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_rank_was_killed(data: Path, tmp_path: Path) -> None:
    limits = ("TrainerArgs.max_train_iters=30", "TrainerArgs.ckpt_save_interval=4", "TrainerArgs.eval_interval=30")
    with trainer(data, tmp_path / "whole", "ranking", *limits, "NetworkArgs.hidden_dropout=0.0") as whole:
        whole.train()
    script = ROOT / "examples" / "pretrain_gr_ranking.py"
    given = flags(data, *limits, "NetworkArgs.hidden_dropout=0.0", batch=16)
    command = torchrun_command(2, script, *given, "--resume=never")  # which concerns the first attempt
    place = command.index("--standalone")
    command.insert(place, "--max-restarts=1")
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    with started(command, cwd=tmp_path) as process:
        while not (metrics.exists() and len(metrics.read_bytes().splitlines()) >= 11):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        ranks = [p for p in psutil.Process(process.pid).children() if "pretrain_gr_ranking.py" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks[1].send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    resumed = re.findall(r"resumed from .* at step (\d+)", out)
    assert len(resumed) == 1 and int(resumed[0]) >= 4, out
    assert worst(losses(tmp_path / "run"), losses(tmp_path / "whole")) < 1e-5
    (left,) = (tmp_path / "run" / "stacks").iterdir()
    assert left.name == "rank0.1.txt", "of the rank that was ended, not of the one that was killed"
    assert left.read_text().strip() in (tmp_path / "run" / "train.log").read_text()


def test_only_a_restart_of_the_same_job_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(tmp_path)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    directory.begin()
    assert not directory.has_begun(), "no launcher restarts it"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert not directory.has_begun()
    directory.begin()
    assert directory.has_begun()
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert not directory.has_begun(), "another launcher"


def test_restarts_need_a_run_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu.cli import train

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setattr(train, "FLAGS", type("Flags", (), {"run_dir": None, "mode": "train"})())
    with pytest.raises(ValueError, match="--run-dir is required with torchrun --max-restarts"):
        train._run_path()


def test_stacks_of_earlier_attempts_are_kept(tmp_path: Path) -> None:
    for attempt in range(8):
        watchdog.keep_stacks(tmp_path)
        with contextlib.suppress(KeyError), watchdog.watchdog(tmp_path, 0, 60):
            raise KeyError(f"attempt {attempt}")
    watchdog.keep_stacks(tmp_path)
    (tmp_path / "rank1.txt").write_text("rank 1 was killed: a header alone\n")
    watchdog.keep_stacks(tmp_path)
    with watchdog.watchdog(tmp_path, 0, 60), watchdog.watchdog(tmp_path, 1, 60):
        pass
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(kept) == {f"rank0.{number}.txt" for number in range(1, 6)}
    assert all(f"attempt {8 - number}" in kept[f"rank0.{number}.txt"] for number in range(1, 6))


class _Interrupted(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Raise in the step after ``step``."""
    take = Stepper.take

    def stopping(self: Stepper, batches: Any, progress: Any) -> float:
        if progress.step == step:
            raise _Interrupted("in a step")
        return take(self, batches, progress)

    monkeypatch.setattr(Stepper, "take", stopping)


def test_a_checkpoint_that_fails_while_a_run_fails_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And its writer, which may hang, is waited for under the watchdog."""
    armed, leave = [], Checkpointer.__exit__

    def leaving(self: Checkpointer, *error: Any) -> None:
        armed.append(watchdog._armed is not None)
        leave(self, *error)

    def failing(*_: object) -> None:
        for _ in range(60_000):
            if "still being written" in caplog.text:
                break
            time.sleep(0.001)
        raise OSError("the disk is full")

    monkeypatch.setattr(Checkpointer, "__exit__", leaving)
    monkeypatch.setattr(Checkpointer, "_write", failing)
    stop_at(monkeypatch, 2)
    with trainer(data, tmp_path, "ranking", "TrainerArgs.ckpt_save_interval=2") as run_, pytest.raises(_Interrupted):
        run_.train()
    assert armed == [True]
    assert "rank 0: in a step; a checkpoint is still being written" in caplog.text
    assert "rank 0: the last checkpoint was not written: OSError: the disk is full" in caplog.text
    assert "Traceback" not in caplog.text


def test_every_long_phase_ends_in_a_beat(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def note(owner: Any, name: str) -> None:
        action = getattr(owner, name)

        def noting(*args: Any, **kwargs: Any) -> Any:
            nested = name == "wait" and len(happened) and happened[-1] == "saving"
            happened.extend(["saving"] if name == "save" else [])
            result = action(*args, **kwargs)
            happened.extend([] if nested else [name])
            return result

        monkeypatch.setattr(owner, name, noting)

    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda *_, **__: happened.append("beat"))
    monkeypatch.setattr(evaluate, "_LOOKUP_ROWS", 40)
    for owner, name in (
        (Stepper, "take"), (Checkpointer, "save"), (Checkpointer, "load"), (Checkpointer, "wait"),
        (RetrievalModel, "catalogue_vectors"), (RetrievalModel, "scores"),
    ):  # fmt: skip
        note(owner, name)
    limits = ("TrainerArgs.max_train_iters=3", "TrainerArgs.eval_interval=2", "TrainerArgs.ckpt_save_interval=1")
    with trainer(data, tmp_path, "retrieval", *limits) as run_:
        run_.train()
    phases = [name for name in happened if name != "saving"]
    assert phases.count("catalogue_vectors") == 9 and phases.count("load") == 1 and phases.count("save") == 3
    # A rest of none means that no phase follows another one without a beat between them.
    assert [pair for pair in zip(phases, phases[1:], strict=False) if "beat" not in pair] == []


@pytest.mark.parametrize("fault", ["directory", "no locks"])
def test_a_directory_that_cannot_be_locked(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory stands where the lock should be, for a root user may write anywhere else."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if fault == "directory":
        (tmp_path / ".lock").mkdir()
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    words = {"directory": "cannot be written .*; choose another", "no locks": "locks no files .*; choose a directory"}
    with pytest.raises(ValueError, match=f"^--run-dir = '{tmp_path}': .*{words[fault]}"):
        RunDirectory(tmp_path).lock()


def test_a_disk_that_takes_no_more_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The system itself refuses more than so many bytes of a file: the second checkpoint; the first one is whole."""
    limits, stopped = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def full(directory: Path) -> None:
        (file,) = (directory / "latest").resolve().glob("*.safetensors")
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size // 2, limits[1]))
        stopped.append(directory)

    def action(mesh: Mesh) -> None:
        with trainer(data, tmp_path, "ranking", "TrainerArgs.ckpt_save_interval=2", mesh=mesh) as run_:
            take = run_.stepper.take

            def taking(batches: Any, progress: Any) -> float:
                if progress.step == 3:
                    run_.checkpointer.wait()
                    full(run_.run.checkpoints)
                return take(batches, progress)

            run_.stepper.take = taking  # type: ignore[method-assign]
            run_.train()

    try:
        assert run_on_mesh(action) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped and line == (
        f"error: {tmp_path}/checkpoints/.step_000000004.partial: File too large; choose a file system that takes "
        f"larger files; step_000000002 is the last checkpoint; go on with --run-dir {tmp_path}"
    )
    assert read_marker(tmp_path / "checkpoints" / "latest")["progress"]["step"] == 2


def test_a_run_directory_that_is_removed_is_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Stepper.take

    def removing(self: Stepper, batches: Any, progress: Any) -> float:
        if progress.step == 2:
            shutil.rmtree(tmp_path / "run")
        return take(self, batches, progress)

    monkeypatch.setattr(Stepper, "take", removing)
    with trainer(data, tmp_path / "run") as run_, pytest.raises(TrainingError) as caught:
        run_.train()
    assert str(caught.value).startswith(
        f"{tmp_path}/run/metrics.jsonl: No such file or directory; was its directory removed?; there is no checkpoint"
    )


def test_lost_and_broken_records_are_told_when_a_run_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=4") as run_:
        run_.train()
    metrics, told = tmp_path / "metrics.jsonl", []
    whole = metrics.read_text().splitlines()
    for lines in (whole, [*whole[:-1], whole[-1][:9]], [whole[0], *whole[2:]], [whole[0], "{}", *whole[2:]], ["\xff"]):
        metrics.write_text("".join(f"{line}\n" for line in lines), "latin1")
        caplog.clear()
        with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=4") as run_:
            run_.resume((tmp_path / "checkpoints" / "latest").resolve())
            run_._rewind()
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        told.append(list(dict.fromkeys(warnings)))
    lost = f"{metrics} holds {{}} of the 5 records up to step 4: the others are lost, and its curves have gaps"
    broken = f"{metrics}: line 2 is no record of a run and is left out"
    assert told == [[], [], [lost.format(4)], [broken, lost.format(4)], [lost.format(0)]]


@pytest.mark.parametrize("text", ["{", "[]", '{"dataset": {"name": "synthetic"}}', "\xff"])
def test_a_broken_record_of_the_environment_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "environment.json").write_text(text, "latin1")
    args = load_config("ranking", [], BINDINGS["ranking"]).config.dataset
    with pytest.raises(ValueError, match=f"^{tmp_path}/environment.json: is damaged .*; remove it"):
        find_dataset(args, RunDirectory(tmp_path))


def test_a_lock_tells_whether_the_run_before_was_killed(tmp_path: Path) -> None:
    first, second, third = (RunDirectory(tmp_path) for _ in range(3))
    assert first.lock() is False
    first._lock.close()  # type: ignore[union-attr]  # as the system does for a killed process
    assert second.lock() is True and second.lock() is False
    second.unlock()
    assert third.lock() is False
    third.unlock()


def test_files_that_take_no_more_hide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What went wrong first is raised, a record names its file, and the log says once that it has gaps."""
    run_, limits = RunDirectory(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    run_.append({"kind": "train", "step": 1})
    with kept_logging():
        configure_logging(tmp_path / "train.log", is_main=True)
        try:
            with pytest.raises(KeyError, match="first"), watchdog.watchdog(tmp_path / "stacks", 0, 60.0):
                resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
                raise KeyError("first")
            with pytest.raises(OSError, match="metrics.jsonl"):
                run_.append({"kind": "train", "step": 2})
            for _ in range(3):
                logging.getLogger("hstu").warning("more than 20 bytes of a log")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{tmp_path}/train.log: cannot be written (File too large); the log has gaps"]
