"""Whatever ends a run, it goes on from its last checkpoint to the same losses."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from hstu.training.checkpoint_files import read_marker
from tests.launch import PATIENCE, ROOT, entrypoint, run, started, torchrun_command
from tests.tiny import BINDINGS
from tests.training.runs import EVERY_STEP, losses, records, trainer, worst

STEPS = 40
LIMITS = ("TrainerArgs.ckpt_save_interval=4", "TrainerArgs.eval_interval=9", "TrainerArgs.max_epochs=9999")
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def flags(data: Path, *bindings: str, batch: int = 32) -> list[str]:
    """Return the flags of a run in the directory ``run``."""
    own = (*BINDINGS["ranking"], *EVERY_STEP, *LIMITS, f"DatasetArgs.dataset_path='{data}'", *bindings)
    given = [f"--gin-bindings={line}" for line in (*own, f"TrainerArgs.train_batch_size={batch}")]
    return ["--gin-config-file=synthetic_ranking.gin", "--run-dir=run", "--resume=auto", *given]


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unbroken")
    done = entrypoint()("ranking", *flags(data, f"TrainerArgs.max_train_iters={STEPS}"), cwd=path)
    assert done.code == 0, done.err
    return path / "run"


def kill_and_go_on(data: Path, cwd: Path, unbroken: Path, moments: list[str]) -> None:
    """Kill the run at each moment, then let it finish, and compare."""
    command = flags(data, f"TrainerArgs.max_train_iters={STEPS}")
    codes = [entrypoint()("ranking", *command, cwd=cwd, when=moment).code for moment in moments]
    # A run may be done before its moment, so late in the list.
    assert set(codes) <= {0, -signal.SIGKILL} and codes.count(0) <= len(codes) // 2, codes
    done = entrypoint()("ranking", *command, cwd=cwd)
    assert done.code == 0, done.err
    assert worst(losses(cwd / "run"), losses(unbroken)) == 0
    assert records(cwd / "run", "eval") == records(unbroken, "eval")
    assert (cwd / "run" / "eval.json").read_text() == (unbroken / "eval.json").read_text()
    left = {path.name for path in (cwd / "run" / "checkpoints").iterdir()}
    assert not any(name.startswith(".") for name in left), left


def test_killed_in_saves_and_between(data: Path, tmp_path: Path, unbroken: Path) -> None:
    kill_and_go_on(data, tmp_path, unbroken, ["line 2", "save 1", "save 3", "line 21", "save 2"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random(data: Path, tmp_path: Path, unbroken: Path, seed: int) -> None:
    rng = random.Random(seed)
    # Later kills come at later lines, since a killed run may have lost some.
    lines = sorted(rng.randint(1, STEPS) for _ in range(8))
    moments = [f"line {n}" if rng.random() < 0.5 else "save 1" for n in lines]
    kill_and_go_on(data, tmp_path, unbroken, moments)


def kill_at_random(command: list[str], cwd: Path, rng: random.Random) -> bool:
    """Start ``command`` and kill all of its processes at some line or in some save; returns whether it ended before."""
    metrics, checkpoints = cwd / "run" / "metrics.jsonl", cwd / "run" / "checkpoints"
    count = lambda: len(metrics.read_bytes().splitlines()) if metrics.exists() else 0  # noqa: E731
    target, in_a_save = count() + rng.randint(0, 15), rng.random() < 0.5
    with started(command, cwd=cwd) as process:
        while process.poll() is None and not (checkpoints.exists() and count() >= target):
            time.sleep(0.001)
        while process.poll() is None and in_a_save and not any(checkpoints.glob(".step_*.partial")):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        return process.poll() is not None


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_25_kills_of_all_ranks(data: Path, tmp_path: Path) -> None:
    script, rng = ROOT / "examples" / "pretrain_gr_ranking.py", random.Random(5)
    command = torchrun_command(2, script, *flags(data, "TrainerArgs.max_train_iters=60", batch=16))
    (tmp_path / "whole").mkdir()
    assert run(command, cwd=tmp_path / "whole").code == 0
    kills, number = 0, 0
    while kills < 25:
        cwd = tmp_path / str(number)
        cwd.mkdir(exist_ok=True)
        ended = kill_at_random(command, cwd, rng)
        kills, number = kills + (not ended), number + ended
    done = run(command, cwd=cwd)
    assert done.code == 0, done.err
    for path in (tmp_path / str(n) / "run" for n in range(number + (not ended))):
        assert records(path) == records(tmp_path / "whole" / "run"), path
        assert records(path, "eval") == records(tmp_path / "whole" / "run", "eval"), path


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4)])
def test_another_number_of_ranks_goes_on_with_the_same_losses(
    data: Path, tmp_path: Path, before: int, after: int
) -> None:
    script = ROOT / "examples" / "pretrain_gr_ranking.py"
    for cwd, steps in ((tmp_path / "whole", ((40, 1),)), (tmp_path, ((20, before), (40, after)))):
        cwd.mkdir(exist_ok=True)
        for limit, ranks in steps:
            bindings = ("NetworkArgs.hidden_dropout=0.0", f"TrainerArgs.max_train_iters={limit}")
            command = torchrun_command(ranks, script, *flags(data, *bindings, batch=32 // ranks))
            done = run(command, cwd=cwd)
            assert done.code == 0, done.err
    assert worst(losses(tmp_path / "run"), losses(tmp_path / "whole" / "run")) < 1e-5


def test_two_runs_in_one_directory_are_refused(data: Path, tmp_path: Path) -> None:
    with trainer(data, tmp_path / "run") as first:
        first.run.lock()
        first.run.lock()
        done = entrypoint()("ranking", *flags(data, "TrainerArgs.max_train_iters=1"), cwd=tmp_path)
        first.run._lock.close()  # type: ignore[union-attr]
    assert done.code == 2 and f"run': process {os.getpid()} on " in done.err and "trains there; wait for it" in done.err
    assert not (tmp_path / "run" / "config.gin").exists()
    assert entrypoint()("ranking", *flags(data, "TrainerArgs.max_train_iters=1"), cwd=tmp_path).code == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_saves_and_ends_well(data: Path, tmp_path: Path, unbroken: Path, number: int) -> None:
    command = flags(data, f"TrainerArgs.max_train_iters={STEPS}")
    done = entrypoint()("ranking", *command, cwd=tmp_path, when="line 7", number=number)
    assert done.code == 128 + number and done.err == "", done
    stopped = len(losses(tmp_path / "run"))
    assert 7 <= stopped < STEPS
    latest = tmp_path / "run" / "checkpoints" / "latest"
    assert latest.resolve().name == f"step_{stopped:09d}", "the very step that it stopped at"
    assert f"stopped at step {stopped}, saved" in done.out
    done = entrypoint()("ranking", *command, cwd=tmp_path)
    assert done.code == 0, done.err
    assert worst(losses(tmp_path / "run"), losses(unbroken)) == 0


@pytest.mark.slow
def test_torchrun_is_stopped_in_the_first_validation_of_two_ranks(data: Path, tmp_path: Path) -> None:
    """Which would not end: it is left between two batches, and what was trained before it is saved."""
    command = torchrun_command(2, Path(__file__).with_name("failure_worker.py"), "evaluate", str(data), str(tmp_path))
    with started(command, cwd=tmp_path) as process:
        deadline = time.monotonic() + PATIENCE
        while not all((tmp_path / f"evaluating{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert "stopped at step 3, saved; go on with --run-dir" in out, err
    marker = read_marker(tmp_path / "run" / "checkpoints" / "latest")
    assert marker["progress"]["step"] == 3 and marker["ranks"] == [2, 1, 1]
    assert records(tmp_path / "run", "eval") == []
