"""The training entrypoints as a user meets them: flags, places, scoring again, and mistakes in one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import underscore_flags
from tests.launch import ROOT, Done, entrypoint, run, torchrun_command
from tests.tiny import BINDINGS, write_tiny

SHORT = ("TrainerArgs.max_train_iters=3", "TrainerArgs.eval_interval=1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a data set and a finished run of 3 steps in ``run``."""
    path = tmp_path_factory.mktemp("place")
    write_tiny(path / "tmp_data" / "synthetic", num_users=60)
    done = train(path, "--gin-config-file=synthetic_ranking.gin", "--run-dir=run")
    assert done.code == 0, done.err
    return path


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """The same place, to be changed."""
    shutil.copytree(place, tmp_path / "place", symlinks=True)
    return tmp_path / "place"


def bindings(*lines: str, task: str = "ranking") -> list[str]:
    return [f"--gin-bindings={line}" for line in (*BINDINGS[task], *SHORT, *lines)]


def train(cwd: Path, *flags: str, task: str = "ranking") -> Done:
    return entrypoint()(task, *bindings(task=task), *flags, cwd=cwd)


def mistake(done: Done) -> str:
    """Return the one line that a user's mistake ends in."""
    assert done.code == 2, done
    (line,) = done.err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in done.out, done
    return line


def test_both_spellings() -> None:
    given = ["x.py", "--gin-config-file=a-b.gin", "--run-dir", "my-run", "--gin_bindings", "A.b='c-d'", "--", "--x-y"]
    assert underscore_flags(given) == [
        "x.py", "--gin_config_file=a-b.gin", "--run_dir", "my-run", "--gin_bindings", "A.b='c-d'", "--", "--x-y",
    ]  # fmt: skip


def test_the_config_by_name_by_path_and_from_elsewhere(place: Path, tmp_path: Path) -> None:
    elsewhere = f"--gin_bindings=DatasetArgs.dataset_path='{place / 'tmp_data'}'"
    shutil.copy(ROOT / "configs" / "synthetic_ranking.gin", tmp_path / "mine.gin")
    losses = []
    for number, config in enumerate(
        ("synthetic_ranking.gin", "synthetic_ranking", str(tmp_path / "mine.gin"), "mine.gin")
    ):
        done = train(tmp_path, f"--gin_config_file={config}", elsewhere, "--run_dir", str(number))
        assert done.code == 0, done.err
        losses.append((tmp_path / str(number) / "eval.json").read_text())
    assert len(set(losses)) == 1
    assert losses[0] == (place / "run" / "eval.json").read_text()


def test_the_script_itself_from_another_directory(place: Path, tmp_path: Path) -> None:
    """Without the shortcut of the other tests: a fresh interpreter, and no --run-dir."""
    script = ROOT / "examples" / "pretrain_gr_retrieval.py"
    data = f"--gin-bindings=DatasetArgs.dataset_path='{place / 'tmp_data' / 'synthetic'}'"
    given = bindings("TrainerArgs.max_train_iters=1", task="retrieval")
    command = torchrun_command(1, script, "--gin-config-file=synthetic_retrieval.gin", *given, data)
    done = run(command, cwd=tmp_path)
    assert done.code == 0 and done.err == "", done.err
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("synthetic_retrieval-")
    files = {path.name for path in made.iterdir()}
    assert files >= {"config.gin", "operative.gin", "environment.json", "train.log", "metrics.jsonl", "checkpoints",
                     "eval.json", "figures"}  # fmt: skip
    assert "versions" in json.loads((made / "environment.json").read_text())
    assert "step 1/1" in (made / "train.log").read_text() and "step 1/1" in done.out


def test_scoring_again_gives_the_recorded_score(copy: Path) -> None:
    recorded = (copy / "run" / "eval.json").read_text()
    best = json.loads(recorded)["step"]
    (copy / "run" / "eval.json").unlink()
    done = entrypoint()("ranking", "--mode=eval", "--run-dir=run", cwd=copy)
    assert done.code == 0, done.err
    assert (copy / "run" / "eval.json").read_text() == recorded, "best is the default, and the config is the run's"
    for choice in (str(best), str(copy / "run" / "checkpoints" / f"step_{best:09d}")):
        (copy / "run" / f"eval_step_{best:09d}.json").unlink(missing_ok=True)
        done = entrypoint()("ranking", "--mode=eval", "--run-dir=run", f"--checkpoint={choice}", cwd=copy)
        assert done.code == 0, done.err
        assert (copy / "run" / f"eval_step_{best:09d}.json").read_text() == recorded
    done = entrypoint()("ranking", "--mode=eval", "--run-dir=run", "--checkpoint=latest", cwd=copy)
    assert done.code == 0, done.err
    assert json.loads((copy / "run" / "eval_step_000000003.json").read_text())["step"] == 3
    validation = [r for r in map(json.loads, (copy / "run" / "metrics.jsonl").open()) if r.get("split") == "valid"]
    shown = f"step 3  valid  AUC {validation[-1]['metrics']['AUC']:.4f}"
    assert shown in done.out, "the validation score too is that of training"


def test_a_run_without_a_best_checkpoint_says_which_there_is(copy: Path) -> None:
    (copy / "run" / "checkpoints" / "best").unlink()
    line = mistake(train(copy, "--run-dir=run", "--mode=eval"))
    assert "has no finished checkpoint 'best'; use --checkpoint latest, which is step_000000003" in line


def test_scoring_a_checkpoint_into_a_new_directory(place: Path, tmp_path: Path) -> None:
    checkpoint = place / "run" / "checkpoints" / "best"
    flags = ("--mode=eval", "--run-dir=new", f"--checkpoint={checkpoint}", "--gin-config-file=synthetic_ranking.gin")
    done = train(tmp_path, *flags, f"--gin-bindings=DatasetArgs.dataset_path='{place / 'tmp_data'}'")
    assert done.code == 0, done.err
    (made,) = (tmp_path / "new").glob("eval_*.json")
    assert made.read_text() == (place / "run" / "eval.json").read_text()


def test_scores_are_printed_whatever_happens_to_files(copy: Path) -> None:
    """Directories stand where files should be, for a root user may write anywhere else."""
    recorded = json.loads((copy / "run" / "eval.json").read_text())
    shown = f"step {recorded['step']}  test  AUC {recorded['metrics']['AUC']:.4f}"
    (copy / "run" / "eval.json").unlink()
    (copy / "run" / "eval.json").mkdir()  # noticed at the end
    done = entrypoint()("ranking", "--mode=eval", "--run-dir=run", cwd=copy)
    assert shown in done.out
    assert f"{copy / 'run' / 'eval.json'}" in mistake(done) or "eval.json" in done.err
    (copy / "run" / "..writable.new").mkdir()  # noticed at once
    done = entrypoint()("ranking", "--mode=eval", "--run-dir=run", cwd=copy)
    assert done.code == 0 and done.err == "", done
    assert done.out.index("cannot be written") < done.out.index("the scores are only printed") < done.out.index(shown)


def test_the_runs_own_config_goes_on(copy: Path) -> None:
    done = entrypoint()("ranking", "--run-dir=run", "--gin-bindings=TrainerArgs.max_train_iters=5", cwd=copy)
    assert done.code == 0, done.err
    assert "resumed from" in done.out and "at step 3" in (copy / "run" / "train.log").read_text()
    steps = [r["step"] for r in map(json.loads, (copy / "run" / "metrics.jsonl").open()) if r["kind"] == "train"]
    assert steps[-1] == 5


def test_resume_never_and_must(copy: Path) -> None:
    before = (copy / "run" / "metrics.jsonl").read_text()
    config = "--gin-config-file=synthetic_ranking.gin"
    line = mistake(train(copy, config, "--run-dir=run", "--resume=never"))
    assert "--run-dir" in line and "holds a run" in line
    assert (copy / "run" / "metrics.jsonl").read_text() == before
    line = mistake(train(copy, config, "--run-dir=new", "--resume=must"))
    assert "no finished checkpoint 'latest'" in line
    assert not (copy / "new").exists()


def test_the_reference_systems_options_are_answered(copy: Path) -> None:
    extra = ("--gin-bindings=TrainerArgs.ckpt_save_dir='/x'", "--gin-bindings=NetworkArgs.kernel_backend='cutlass'")
    done = train(copy, "--gin-config-file=synthetic_ranking.gin", "--run-dir=new", *extra)
    assert done.code == 0, done.err
    notes = [line for line in done.out.splitlines() if line.startswith("note: ")]
    assert any("ckpt_save_dir" in line for line in notes) and any("cutlass" in line for line in notes)


MISTAKES = {
    "no config": ([], "--gin-config-file is required"),
    "unknown config": (["--gin-config-file=synthetic_rankin.gin"], "synthetic_ranking.gin"),
    "unknown flag": (["--gin-config-fil=x"], "gin_config_fil"),
    "bad mode": (["--mode=evaluate"], "mode"),
    "misspelled field": (["--gin-bindings=TrainerArgs.max_train_iter=3"], "did you mean max_train_iters"),
    "misspelled class": (["--gin-bindings=TrainArgs.seed=3"], "TrainArgs"),
    "wrong type": (["--gin-bindings=TrainerArgs.seed='3'"], "TrainerArgs.seed = '3': must be an integer"),
    "not finite": (["--gin-bindings=OptimizerArgs.learning_rate=1e999"], "OptimizerArgs.learning_rate"),
    "unknown data set": (["--gin-bindings=DatasetArgs.dataset_name='synthetik'"],
                         "preprocessor.py --dataset_name synthetik"),
    "unknown context": (["--gin-bindings=DatasetArgs.contextual_feature_names=('age',)"], "it has: segment"),
    "unknown table": (["--gin-bindings=EmbeddingArgs.table_sharding_types={'itm': 'row_wise'}"], "no table 'itm'"),
    "wrong head": (["--gin-bindings=RankingArgs.prediction_head_arch=[8, 2]"], "one per bit"),
    "no such checkpoint": (["--checkpoint=7"], "--checkpoint = '7': no finished checkpoint"),
    "no best checkpoint": (["--checkpoint=best"], "has no finished checkpoint 'best'"),
    "no such path": (["--checkpoint=nowhere/step_000000001"], "no finished checkpoint nowhere/step_000000001"),
    "nothing to score": (["--mode=eval"], "train first"),
    "column-wise row state": (["--gin-bindings=EmbeddingArgs.sharding_type='column_wise'",
                               "--gin-bindings=OptimizerArgs.sparse_optimizer_str='rowwise_adagrad'"], "use 'adagrad'"),
    "stray argument": (["synthetic_ranking.gin"], "'synthetic_ranking.gin' belongs to no flag"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(place: Path, name: str) -> None:
    flags, words = MISTAKES[name]
    given = flags if name in ("no config", "unknown config") else ["--gin-config-file=synthetic_ranking.gin", *flags]
    new = f"{name} new"
    done = train(place, *given, f"--run-dir={new}")
    assert words in mistake(done)
    assert not (place / new).exists()


def test_a_checkpoint_of_another_model_leaves_nothing(place: Path) -> None:
    flags = ("--gin-config-file=synthetic_ranking.gin", "--run-dir=other", "--checkpoint=run/checkpoints/latest")
    line = mistake(train(place, *flags, "--gin-bindings=NetworkArgs.num_layers=1"))
    assert "NetworkArgs.num_layers is 2 there and 1 here" in line and "step_000000003" in line
    assert not (place / "other").exists()


def test_an_unwritable_run_directory(place: Path, tmp_path: Path) -> None:
    """Files stand where directories should be; a root user may write anywhere else."""
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        line = mistake(train(place, "--gin-config-file=synthetic_ranking.gin", f"--run-dir={run_dir}"))
        assert str(run_dir) in line and "cannot be written" in line
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("damage", ["cut", "gone", "ids"])
def test_damaged_data(copy: Path, damage: str) -> None:
    (part,) = (copy / "tmp_data" / "synthetic" / "data").glob("*.parquet")
    if damage == "gone":
        part.unlink()
    elif damage == "cut":
        os.truncate(part, part.stat().st_size // 2)
    else:
        schema = copy / "tmp_data" / "synthetic" / "schema.json"
        schema.write_text(schema.read_text().replace('"vocab_size": 120', '"vocab_size": 90'))
    line = mistake(train(copy, "--gin-config-file=synthetic_ranking.gin", "--run-dir=new"))
    assert str(copy / "tmp_data" / "synthetic") in line
    assert not (copy / "new").exists()


def test_a_loss_that_is_not_finite_is_one_line(copy: Path) -> None:
    rate = ("OptimizerArgs.optimizer_str='sgd'", "OptimizerArgs.learning_rate=1e6", "TrainerArgs.eval_interval=9")
    flags = ("--gin-config-file=synthetic_ranking.gin", "--run-dir=new", *(f"--gin-bindings={line}" for line in rate))
    assert "is not finite at step" in mistake(train(copy, *flags))
    assert not list((copy / "new" / "checkpoints").iterdir())


def test_help_lists_the_flags(place: Path) -> None:
    done = entrypoint()("ranking", "--help", cwd=place)
    assert all(name in done.out for name in ("gin_config_file", "gin_bindings", "resume", "run_dir", "checkpoint"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_outside_the_steps_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def interrupted(_: object) -> None:
        signal.raise_signal(number)
        time.sleep(60)

    monkeypatch.setattr("hstu.training.run_directory.configure_logging", lambda *_, **__: None)
    assert run_on_mesh(interrupted, "; nothing was written") == 128 + number
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
