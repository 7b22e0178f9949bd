"""One run over windows of time: what is carried over, what is written, and going on in the middle."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import pytest
import torch

import hstu
from hstu.cli import predict
from hstu.config import ConfigError, load_config
from hstu.data import Feature, SequenceDataset, write_dataset
from hstu.data.splits import each_window, make_splits, window_cuts
from hstu.data.values import Sets
from hstu.inference.opened import Opened, open_trained
from hstu.interrupt import Stopped
from hstu.parallel import Mesh
from hstu.training import session
from hstu.training.checkpoint_files import find_checkpoint
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer
from hstu.training.windows import last_window, summary
from tests.samples import make_dataset, read_back
from tests.tiny import BINDINGS, write_tiny

RUN = (
    "DatasetArgs.protocol='windows'",
    "DatasetArgs.num_windows=4",
    "DatasetArgs.window='all'",
    "TrainerArgs.max_epochs=1",
    "TrainerArgs.log_interval=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("windows") / "synthetic", num_users=60)


def train(data: Path, run: Path, *bindings: str, resume: session.Resume = "auto") -> dict[str, Any]:
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], *RUN, f"DatasetArgs.dataset_path={str(data)!r}"])
    given = run.with_suffix(".gin")
    given.write_text(config.operative)
    order = session.Order(task="retrieval", config=str(given), bindings=bindings, resume=resume, quiet=True)
    with Mesh.create() as mesh:
        session.train(order, mesh, RunDirectory(run))
    found: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return found


@pytest.fixture(scope="module", autouse=True)
def no_curves() -> Iterator[None]:
    with mock.patch("hstu.training.trainer.draw_curves"):
        yield


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(data, run)
    return run


@pytest.fixture(autouse=True)
def no_picture(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes longer than training does; ``trained`` has its own."""
    monkeypatch.setattr("hstu.training.windows.draw_windows", lambda *_: None)


def windows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("windows/*/eval.json"))]


def test_every_window_is_trained_on_and_scored_on_the_next(data: Path, trained: Path) -> None:
    records = windows_of(trained)
    assert [record["window"] for record in records] == [0, 1, 2] and {r["split"] for r in records} == {"test"}
    whole = json.loads((trained / "eval.json").read_text())
    assert whole["windows"] == [0, 1, 2] and whole["num_targets"] == sum(r["num_targets"] for r in records)
    for name, value in whole["metrics"].items():
        scores = [record["metrics"][name] for record in records]
        assert value == pytest.approx(np.mean(scores))
        weights = [r["num_targets"] - (r["untrained_targets"] if name.endswith(":trained") else 0) for r in records]
        assert whole["pooled"][name] == pytest.approx(np.average(scores, weights=weights))
    rows = list(csv.DictReader((trained / "windows.csv").open()))
    assert [int(row["window"]) for row in rows] == [0, 1, 2]
    assert [float(row["HR@10"]) for row in rows] == [record["metrics"]["HR@10"] for record in records]
    assert rows[0]["begins"] == "" and rows[0]["ends"] == rows[1]["begins"].rstrip() and rows[2]["ends"].endswith("Z")
    assert (trained / "figures" / "windows.png").read_bytes()[:4] == b"\x89PNG"
    assert RunDirectory(trained).has_run() and len(RunDirectory(trained).records()) == 3


def test_weights_moments_and_tables_go_on_and_the_schedule_starts_again(trained: Path) -> None:
    for before, after in ((0, 1), (1, 2)):
        (start,) = (r for r in RunDirectory(trained / f"windows/000{after}").records(0) if r["kind"] == "init")
        assert str(trained / f"windows/000{before}" / "checkpoints") in str(start)
        text = (trained / f"windows/000{after}/operative.gin").read_text()
        assert f"windows/000{before}" in text and f"DatasetArgs.window = {after}" in text
    assert all(windows["step"] <= 3 for windows in windows_of(trained)), "steps count from zero"


def test_each_window_may_begin_anew(data: Path, tmp_path: Path, trained: Path) -> None:
    train(data, tmp_path / "run", "DatasetArgs.carry_over=False", "DatasetArgs.first_window=1")
    assert "init_from = None" in (tmp_path / "run/windows/0001/operative.gin").read_text()
    first, second = windows_of(tmp_path / "run")
    assert (first["window"], second["window"]) == (1, 2)
    # Alone it is the run of the single window.
    single = ("DatasetArgs.window=2", "DatasetArgs.first_window=0")
    assert train(data, tmp_path / "single", *single)["metrics"] == second["metrics"]


def test_a_run_that_was_stopped_goes_on_in_the_middle_of_a_window(
    data: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trainer._after_step

    def stop(self: Trainer, log: Any) -> None:
        honest(self, log)
        if self.config.dataset.window == 1:
            self._save()
            raise Stopped(15)

    monkeypatch.setattr(Trainer, "_after_step", stop)
    with pytest.raises(Stopped):
        train(data, tmp_path / "run")
    assert [r["window"] for r in windows_of(tmp_path / "run")] == [0]
    assert find_checkpoint(tmp_path / "run/windows/0001/checkpoints", "latest") is not None
    assert json.loads((tmp_path / "run/eval.json").read_text())["windows"] == [0], "what is done is there"
    monkeypatch.setattr(Trainer, "_after_step", honest)
    with Mesh.create() as mesh:  # asked for its score, the run answers with the window that is half done
        session.score(session.Order(task="retrieval", quiet=True), mesh, RunDirectory(tmp_path / "run"))
    assert [r["window"] for r in windows_of(tmp_path / "run")] == [0, 1]
    train(data, tmp_path / "run")
    assert windows_of(tmp_path / "run") == windows_of(trained)
    assert (tmp_path / "run/windows.csv").read_text() == (trained / "windows.csv").read_text()
    with pytest.raises(ValueError, match="holds a run, and --resume=never"):
        train(data, tmp_path / "run", resume="never")


def test_a_run_over_windows_answers_with_its_last_one_or_all(trained: Path, tmp_path: Path) -> None:
    assert last_window(trained) == trained / "windows/0002" and last_window(trained / "windows/0000").name == "0000"
    run = hstu.open_run(trained, frames="polars")
    assert run.path == trained / "windows/0002"
    answers = run.recommend(k=3)
    assert isinstance(answers, pl.DataFrame) and answers.height
    assert run.evaluate("test")["metrics"] == windows_of(trained)[2]["metrics"]
    asked = ["--split=test", "--top-k=10", "--windows", f"--output={tmp_path}"]
    assert predict.main([f"--run-dir={trained}", *asked]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0000.parquet", "0001.parquet", "0002.parquet"]
    for path, record in zip(sorted(tmp_path.iterdir()), windows_of(trained), strict=True):
        found = pl.read_parquet(path).filter(pl.col("item") == pl.col("target"))
        assert found.height / record["num_targets"] == pytest.approx(record["metrics"]["HR@10"]), path.name
    assert predict.main([f"--run-dir={trained / 'windows/0000'}", *asked]) == 2, "which has no windows"


def test_windows_with_a_length_begin_at_multiples_of_it(data: Path) -> None:
    dataset = SequenceDataset.open(data)
    low, high = dataset.time_range()
    args = load_config("retrieval", [], [*BINDINGS["retrieval"], *RUN, "DatasetArgs.num_windows=10"]).config.dataset
    for length in ("1d", "12h", "90m"):
        own = load_config(
            "retrieval", [], [*BINDINGS["retrieval"], RUN[0], f"DatasetArgs.window={length!r}"]
        ).config.dataset
        seconds = own.window_seconds
        assert seconds is not None
        if (high - low) // seconds > 9000:
            with pytest.raises(ValueError, match="give a longer one"):
                window_cuts(own, dataset)
            continue
        cuts = window_cuts(own, dataset)
        assert all(cut % seconds == 0 for cut in cuts) and low < cuts[0] <= low + seconds and cuts[-1] <= high
        found = each_window(own, dataset)
        assert sorted(found) == list(range(len(cuts)))
        for window, one in found.items():
            if not isinstance(one, str):
                train_split = make_splits(one, dataset)["train"]
                assert one.window == window and len(train_split)
    assert args.goes_over_windows and args.window_seconds is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("DatasetArgs.window='x'",), "window = 'x': must be a number, 'all', or a length of time"),
        (("DatasetArgs.window='0d'",), "window = '0d'"),
        (("DatasetArgs.window=0", "DatasetArgs.carry_over=False"), "carry_over = False: needs DatasetArgs.window = "),
        (("DatasetArgs.first_window=2", "DatasetArgs.last_window=1"), "last_window = 1: must be at least"),
        (("DatasetArgs.window='1d'", "DatasetArgs.temporal_cuts=(3, 4)"), "temporal_cuts.*a length has its own"),
        (("DatasetArgs.protocol='temporal'",), "window = 'all': needs DatasetArgs.protocol = 'windows'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("retrieval", [], [*BINDINGS["retrieval"], *RUN, "DatasetArgs.num_windows=10", *lines])


def test_windows_beyond_the_last_are_refused(data: Path) -> None:
    for field, value in (("first_window", 3), ("last_window", 3)):
        args = load_config("retrieval", [], [*BINDINGS["retrieval"], *RUN, f"DatasetArgs.{field}={value}"])
        with pytest.raises(ValueError, match=f"{field} = 3: of 4 windows the last"):
            each_window(args.config.dataset, SequenceDataset.open(data))


def test_what_is_not_defined_in_a_window_does_not_count() -> None:
    record = {"kind": "eval", "split": "test", "step": 1, "num_users": 2, "num_targets": 4, "protocol": "windows"}
    parts = [record | {"window": n, "metrics": {"AUC": value}} for n, value in enumerate((None, 0.5, 0.75))]
    whole = summary(parts)
    assert whole["metrics"] == {"AUC": 0.625} and whole["pooled"] == {}, "an AUC over all is no mean of windows"
    assert torch.tensor(whole["num_targets"]) == 12


EARLY = 6  # what the first window alone has, of each feature


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four windows of three events of each user: the value ``EARLY`` in the first alone, 7 in the last alone."""
    folder, rng, users = tmp_path_factory.mktemp("changing") / "small", np.random.default_rng(0), 40
    window = np.tile(np.repeat(np.arange(4), 3), users)
    items = np.where(window == 0, rng.integers(10, size=window.size), rng.integers(10, 40, size=window.size))
    items[11::12] = items[0::12]  # the last event of each user is that of the first one
    features = (
        Feature(name="device", level="event", kind="categorical", vocab_size=8),
        Feature(name="tags", level="event", kind="multi", vocab_size=8, num_ids=0),
        Feature(name="brand", level="item", kind="categorical", vocab_size=8),
        Feature(name="genres", level="item", kind="multi", vocab_size=8, num_ids=0),
    )
    times = 10**9 + 10**5 * window + np.tile(np.arange(12), users)
    make_dataset(folder, [12] * users, num_items=40, items=items, times=times, declared=features, contexts=())
    data, of_items = read_back(folder), np.where(np.arange(40) < 10, EARLY, np.arange(40) % 5)
    of_events = np.select([window == 0, window == 3], [EARLY, 7], rng.integers(5, size=window.size))
    data.events["device"], data.categories["brand"] = of_events, of_items
    data.events["tags"], data.categories["genres"] = (Sets(np.arange(len(v) + 1), v) for v in (of_events, of_items))
    sizes = {"tags": len(of_events), "genres": len(of_items)}
    kept = tuple(replace(f, num_ids=sizes.get(f.name, f.num_ids)) for f in data.schema.features)
    write_dataset(replace(data, schema=replace(data.schema, features=kept)), folder)
    return folder


def opened(run: Path, window: int) -> Opened:
    with Mesh.create() as mesh:
        return open_trained(run / f"windows/000{window}", "latest", [], mesh)


@pytest.mark.parametrize("carried", [True, False])
def test_values_that_an_earlier_window_trained_keep_their_rows(changing: Path, tmp_path: Path, carried: bool) -> None:
    features = (
        "NetworkArgs.item_embedding='both'",
        "DatasetArgs.max_history_seqlen=2",
        f"DatasetArgs.carry_over={carried}",
    )
    train(changing, tmp_path / "run", *features, "DatasetArgs.dataset_name='small'")
    first, later = opened(tmp_path / "run", 0), opened(tmp_path / "run", 2)
    for name in ("device", "tags", "brand", "genres"):
        met = later.assembly.met[name]
        assert met[:5].all() and not met[5] and not met[7] and met[EARLY] == carried, name
        assert first.assembly.met[name][EARLY]
    collate = later.loader.collate
    assert collate.met_values["device"][EARLY] == collate.met_values["tags"][EARLY] == carried
    encoder = later.model.item_encoder
    assert encoder is not None
    assert encoder.ids[0, :10].unique().tolist() == [EARLY if carried else 8]
    assert int(encoder.set_offsets_0[10]) == (10 if carried else 0), "members that nobody met leave their sets"
    # What the later windows do not look up is as the first one left it.
    before, after = (own.model.embeddings.state_dict() for own in (first, later))
    (key,) = (key for key in before if key.endswith("device.weight"))
    rows = [state[key].local_shards()[0].tensor[EARLY] for state in (before, after)]
    assert torch.equal(*rows) == carried
    untrained = [record["untrained_targets"] for record in windows_of(tmp_path / "run")]
    assert untrained[2] == (0 if carried else 20), "of the half of the users that test"
