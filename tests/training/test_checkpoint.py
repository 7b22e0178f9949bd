"""Checkpoints are complete or not there, kept as asked, and refused with one line when they do not fit."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from hstu.training import checkpoint as module
from hstu.training.assembly import Assembly
from hstu.training.checkpoint_files import CheckpointError, find_checkpoint, read_marker
from tests.training.runs import losses, trainer

MODEL = {
    "NetworkArgs.hidden_size": ("NetworkArgs.hidden_size=8",),
    "NetworkArgs.num_attention_heads": ("NetworkArgs.num_attention_heads=1", "NetworkArgs.kv_channels=16"),
    "NetworkArgs.preset": ("NetworkArgs.preset='research'",),
    "NetworkArgs.scaling_seqlen": ("NetworkArgs.scaling_seqlen=7",),
    "DatasetArgs.max_history_seqlen": ("DatasetArgs.max_history_seqlen=12",),
    "DatasetArgs.contextual_feature_names": ("DatasetArgs.contextual_feature_names=()",),
    "RankingArgs.prediction_head_arch": ("RankingArgs.prediction_head_arch=[8, 1]",),
    "RankingArgs.prediction_head_act_type": ("RankingArgs.prediction_head_act_type='gelu'",),
    "OptimizerArgs.optimizer_str": ("OptimizerArgs.optimizer_str='sgd'",),
    "OptimizerArgs.sparse_optimizer_str": ("OptimizerArgs.sparse_optimizer_str='adagrad'",),
}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a checkpoint after each, of which all are kept."""
    path = tmp_path_factory.mktemp("finished")
    with trainer(data, path, "ranking", *SIX, "TrainerArgs.keep_last_checkpoints=9") as run:
        run.train()
    return path


SIX = ("TrainerArgs.max_train_iters=6", "TrainerArgs.ckpt_save_interval=1", "TrainerArgs.eval_interval=2")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run's checkpoints, to be damaged."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints", symlinks=True)
    return tmp_path / "checkpoints"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def step(number: int) -> str:
    return f"step_{number:09d}"


def test_the_last_ones_and_the_best_are_kept(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.7, 5: 0.1, 6: 0.2}
    fake_scores(monkeypatch, scores)
    with trainer(data, tmp_path, "ranking", *SIX, "TrainerArgs.eval_interval=1") as run:
        run.train()
    checkpoints = tmp_path / "checkpoints"
    assert names(checkpoints) == {step(2), step(5), step(6), "best", "latest"}
    assert (checkpoints / "best").readlink() == Path(step(2))
    assert (checkpoints / "latest").readlink() == Path(step(6))


def fake_scores(
    monkeypatch: pytest.MonkeyPatch, scores: dict[int, float], metric: str = "AUC"
) -> list[tuple[str, int]]:
    """Give the validation of each step a score of our choice; returns the list of (split, step) that were scored."""
    asked: list[tuple[str, int]] = []
    score = Assembly.score

    def fake(self: Assembly, split: str, at: int) -> dict[str, Any]:
        asked.append((split, at))
        record = score(self, split, at)
        return record | {"metrics": {**record["metrics"], metric: scores[at]}} if split == "valid" else record

    monkeypatch.setattr(Assembly, "score", fake)
    return asked


def test_half_written_ones_do_not_exist(copy: Path) -> None:
    (copy / step(6) / "complete.json").unlink()
    shutil.copytree(copy / step(5), copy / f".{step(7)}.partial")
    shutil.rmtree(copy / step(4))
    for choice in ("latest", "5", str(copy / step(5))):
        assert find_checkpoint(copy, choice) == (copy / step(5)).resolve()
    for choice in ("6", "4", str(copy / step(6)), "bset"):
        with pytest.raises(CheckpointError, match=r"no finished checkpoint .*in the run directory: step_000000001"):
            find_checkpoint(copy, choice)


def test_leftovers_go_with_the_next_save(data: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / f".{step(9)}.partial"
    leftover.mkdir(parents=True)
    with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=1") as run:
        run.train()
    assert names(tmp_path / "checkpoints") == {step(1), "best", "latest"}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("damage", [cut_short, scramble, Path.unlink])
@pytest.mark.parametrize("pattern", ["*.safetensors", "complete.json"])
def test_damage_is_one_line(data: Path, copy: Path, damage: Any, pattern: str) -> None:
    for path in (copy / step(3)).glob(pattern):
        damage(path)
    with trainer(data, copy.parent, "ranking") as run, pytest.raises(CheckpointError) as caught:
        run.resume(copy / step(3))
    assert str(copy / step(3)) in str(caught.value)
    assert "\n" not in str(caught.value) and "CheckpointException" not in str(caught.value)


def of_another_step(path: Path) -> None:
    """Put a file of the same names, shapes and size in the place of ``path``."""
    other = path.parent.with_name(step(2)) / path.name
    assert other.stat().st_size == path.stat().st_size
    shutil.copy(other, path)


def one_more(path: Path) -> None:
    """Put a file beside ``path`` that would be read with it."""
    shutil.copy(path, path.with_name("foreign.safetensors"))


def one_bit(path: Path) -> None:
    """Flip one bit of the last weight."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)


def another_progress(path: Path) -> None:
    """Change one digit of what the checkpoint says of itself."""
    marker = path.parent / "complete.json"
    marker.write_text(marker.read_text().replace('"step": 6', '"step": 5'))


@pytest.mark.parametrize(
    "damage", [cut_short, scramble, Path.unlink, of_another_step, one_more, one_bit, another_progress]
)
def test_a_damaged_latest_is_passed_over(
    copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    (file,) = (copy / step(6)).glob("*.safetensors")
    damage(file)
    assert find_checkpoint(copy, "latest") == (copy / step(5)).resolve()
    named = {one_more: "foreign.safetensors", another_progress: "complete.json"}.get(damage, file.name)
    assert f"step_000000006 is damaged: {named} " in caplog.text and "an older one is used" in caplog.text


def test_a_checkpoint_without_checksums_is_refused(copy: Path) -> None:
    """As they were written before there were any."""
    marker = json.loads((copy / step(6) / "complete.json").read_text())
    del marker["checksum"]
    (copy / step(6) / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(CheckpointError, match="no readable complete.json: misses 'checksum', as of an earlier version"):
        read_marker(copy / step(6))


def test_a_damaged_best_is_named_and_searched_anew(
    data: Path, copy: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = (copy / "best").resolve().glob("*.safetensors")
    one_bit(file)
    with trainer(data, copy.parent, "ranking", *SIX) as run:
        with pytest.raises(CheckpointError, match=f"{file.name} has other contents than were written; choose another"):
            run.evaluate(copy / "best")
        sound = find_checkpoint(copy, "latest")
        assert sound is not None
        run.resume(sound)
        run._rewind()
        assert run.progress.best_score is None
    assert "the search for the best one starts anew" in caplog.text


@pytest.mark.parametrize("field", MODEL)
def test_another_model_is_refused_by_the_name_of_the_field(
    data: Path, finished: Path, tmp_path: Path, field: str
) -> None:
    with trainer(data, tmp_path, "ranking", *MODEL[field]) as run:
        with pytest.raises(CheckpointError, match=f"is of another model: {field} is .* there and .* here"):
            run.resume(finished / "checkpoints" / "latest")
        if field.startswith("OptimizerArgs"):
            assert run.evaluate(finished / "checkpoints" / "latest", ("valid",)), "scoring needs no optimizer"


def test_another_task_is_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    with trainer(data, tmp_path, "retrieval") as run, pytest.raises(CheckpointError, match="another model"):
        run.resume(finished / "checkpoints" / "latest")


def test_what_is_missing_is_named(data: Path, finished: Path, tmp_path: Path) -> None:
    bindings = ("EmbeddingArgs.table_sharding_types={'item_id': 'data_parallel'}",)
    with trainer(data, tmp_path, "ranking", *bindings) as run, pytest.raises(CheckpointError, match="item_id"):
        run.resume(finished / "checkpoints" / "latest")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_killed_between_the_links(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    """Before a link moves, or between it and what the checkpoint says: the resumed run tests the same checkpoint."""
    best = json.loads((finished / "eval.json").read_text())["step"]
    point, moves = module.point, []

    def dying(link: Path, target: str) -> None:
        moves.extend([link.name] if target == step(best) else [])
        if len(moves) == cut and target == step(best):
            raise KeyboardInterrupt
        point(link, target)

    bindings = (*SIX, "TrainerArgs.keep_last_checkpoints=1")

    def late(path: Path, marker: dict[str, Any]) -> None:
        moves.extend(["marker"] if path.name == step(best) and "best" in moves else [])
        if len(moves) == cut and moves[-1] == "marker":
            raise KeyboardInterrupt
        write(path, marker)

    write = module.write_marker
    monkeypatch.setattr(module, "write_marker", late)
    monkeypatch.setattr(module, "point", dying)
    with trainer(data, tmp_path, "ranking", *bindings) as run, pytest.raises(KeyboardInterrupt):
        run.train()
    monkeypatch.setattr(module, "point", point)
    monkeypatch.setattr(module, "write_marker", write)
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        latest = find_checkpoint(tmp_path / "checkpoints", "latest")
        if latest is not None:
            run.resume(latest)
        run.train()
    assert json.loads((tmp_path / "eval.json").read_text()) == json.loads((finished / "eval.json").read_text())
    assert losses(tmp_path) == losses(finished)


def test_an_earlier_checkpoint_wins_over_later_ones(data: Path, copy: Path) -> None:
    """A run that goes on from step 3 and is killed at once goes on from there again, and ends as the unbroken one."""
    run_path, best = copy.parent, read_marker(copy / step(3))["progress"]["best_step"]
    with trainer(data, run_path, "ranking", *SIX) as run:
        run.resume(find_checkpoint(copy, "3"))  # type: ignore[arg-type]
        run._rewind()
    assert names(copy) == {step(1), step(2), step(3), "best", "latest", "superseded"}
    assert names(copy / "superseded") == {step(4), step(5), step(6)}
    assert find_checkpoint(copy, "latest") == (copy / step(3)).resolve()
    assert find_checkpoint(copy, "best") == (copy / step(best)).resolve()
    shutil.rmtree(copy / step(best))
    with trainer(data, run_path, "ranking", *SIX) as run:
        run.resume(find_checkpoint(copy, "latest"))  # type: ignore[arg-type]
        run.train()
    assert run.progress.step == 6 and run.progress.best_step in (4, 6), "the best of before is not there any more"


def test_a_slow_save_does_not_stop_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state of its step, though training has gone on; exit and the next save wait."""
    save, events = dcp.save, []

    def slowly(*args: Any, **kwargs: Any) -> Any:
        step = run.progress.step
        events.append(("save", step))
        for _ in range(60_000 if step < 8 else 0):  # a minute at least, if training waits for the save
            time.sleep(0.001)
            if run.progress.step > step:
                break
        events.append(("saved", run.progress.step))
        return save(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", slowly)
    bindings = ("TrainerArgs.max_train_iters=8", "TrainerArgs.ckpt_save_interval=6", "TrainerArgs.eval_interval=99")
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        run.train()
    assert [name for name, _ in events] == ["save", "saved"] * 2
    assert events[0][1] < events[1][1], "steps were taken meanwhile"
    monkeypatch.setattr(dcp, "save", save)
    with trainer(data, tmp_path / "plain", "ranking", *bindings) as run:
        run.train()
    for other in (step(6), step(8)):
        files = [path / "checkpoints" / other for path in (tmp_path, tmp_path / "plain")]
        mine, theirs = (load_file(next(folder.glob("*.safetensors"))) for folder in files)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_of_another_run_starts_a_new_search_for_the_best(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    latest = finished / "checkpoints" / "latest"
    assert read_marker(latest)["progress"]["best_score"] is not None
    with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=8") as run:
        run.resume(latest)
        assert (run.progress.step, run.progress.best_score) == (6, None)
        record = run.train()
    assert record is not None and record["step"] == 8
    with trainer(data, tmp_path / "b", "ranking", *SIX) as run, pytest.raises(ValueError, match="6 steps of 6; raise"):
        run.resume(latest)
