"""Python in three lines: what the commands write, from tables, many times in one interpreter, Ctrl-C and all."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import psutil
import pytest
import torch

import hstu
from hstu.cli import predict
from hstu.interrupt import PoliteStop, patience, requested
from hstu.training.logging import RunLogger
from tests.inference.test_predict import last_events, planted_log
from tests.tiny import BINDINGS

NAMES = dict(user="who", item="what", time="when")
SHORT = ("TrainerArgs.max_train_iters=20", "TrainerArgs.eval_interval=10", "RetrievalArgs.eval_metrics=('HR@10',)")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api")
    for task, lines in BINDINGS.items():
        more = SHORT[:2] if task == "ranking" else SHORT
        (path / f"{task}.gin").write_text("\n".join((*lines, *more)))
    return path


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which take longer than training does."""
    monkeypatch.setattr("hstu.training.trainer.draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def run(place: Path) -> hstu.Run:
    events, users = planted_log()
    return hstu.fit(
        events, users=users, **NAMES, config=str(place / "retrieval.gin"), run_dir=place / "shop", verbose=False
    )


@pytest.fixture
def other(place: Path, tmp_path: Path) -> Iterator[dict]:
    """Arguments of a run that is not trained yet."""
    yield dict(**NAMES, config=str(place / "retrieval.gin"), run_dir=tmp_path / "run", verbose=False)


def test_a_run_is_that_of_the_command(run: hstu.Run, place: Path, tmp_path: Path) -> None:
    found = run.recommend(k=5)
    assert isinstance(found, pl.DataFrame), "events were polars"
    assert predict.main(["--run-dir", str(run.path), "--top-k", "5", "--output", str(tmp_path / "f.parquet")]) == 0
    assert found.equals(pl.read_parquet(tmp_path / "f.parquet"))
    assert {"config.gin", "operative.gin", "train.log", "metrics.jsonl", "eval.json"} <= set(os.listdir(run.path))
    record = run.evaluate("test")
    assert record["metrics"] == run.scores and record["num_users"] == 90
    hits = run.recommend(k=10, split="test").filter(pl.col("item") == pl.col("target")).height
    assert run.scores["HR@10"] == hits / 90 > 0
    assert run.evaluate("valid")["split"] == "valid"
    assert json.loads((run.path / "eval.json").read_text())["metrics"] == run.scores


def test_the_card_says_what_the_run_is_and_how_to_load_it(run: hstu.Run) -> None:
    card = (run.path / "card.md").read_text()
    record = json.loads((run.path / "eval.json").read_text())
    score, error = record["metrics"]["HR@10"], record["standard_errors"]["HR@10"]
    assert error == pytest.approx(np.sqrt(score * (1 - score) / 90))
    assert f"| HR@10 | {score:.4f} | {error:.4f} |" in card and "among 60 items" in card
    schema = run._opened.dataset.schema
    for said in ("90 users, 60 items", *schema.vocabularies.values(), torch.__version__.split("+")[0], "leave_one_out"):
        assert said in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, {"frame": planted_log()[0].join(planted_log()[1], on="who")})


def test_both_kinds_of_tables_in_and_out(run: hstu.Run, place: Path) -> None:
    history, last = last_events(planted_log()[0])
    history = history.join(planted_log()[1], on="who")
    theirs = run.recommend(histories=history.to_pandas(), k=3)
    ours = run.recommend(histories=history, k=3)
    assert isinstance(theirs, pd.DataFrame) and isinstance(ours, pl.DataFrame)
    assert theirs.to_dict("list") == {name: pytest.approx(ours[name].to_list()) if name == "score" else
                                      ours[name].to_list() for name in ours.columns}  # fmt: skip
    before = run.recommend(k=3, split="test").drop("target", "event").sort("user", "rank")
    assert before.drop("score").equals(ours.sort("user", "rank").drop("score")), "the command's columns are known"
    again = hstu.open_run(run.path)
    assert isinstance(again.recommend(["u-07"], k=2), pd.DataFrame)
    assert again.recommend(pd.Series(["u-07"]), k=2).equals(again.recommend(users=["u-07"], k=2))
    assert isinstance(hstu.open_run(str(run.path), "latest", frames="polars").item_vectors(), pl.DataFrame)


def test_which_items(run: hstu.Run) -> None:
    events, _ = planted_log()
    some = ["sku 7", "sku 14", "sku 21"]
    found = run.recommend(k=60, items=some, filter_seen=False)
    assert found.height == 90 * 3 and set(found["item"]) == set(some)
    seen = set(events.select("who", "what").iter_rows())
    left = {(user, item) for user in set(events["who"]) for item in some} - seen
    assert set(run.recommend(k=60, items=some).select("user", "item").iter_rows()) == left
    assert run.recommend(k=1, items=[]).columns == ["user", "rank", "item", "score"]


def test_scores_and_vectors_say_the_same(run: hstu.Run) -> None:
    found = run.recommend(["u-07", "u-41"], k=60, filter_seen=False)
    pairs = found.select(who="user", what="item").sample(fraction=1.0, shuffle=True, seed=1)
    scored = run.score(pairs)
    assert scored.select("user", "item").equals(pairs.rename({"who": "user", "what": "item"}))
    both = scored.join(found, on=["user", "item"], how="left", maintain_order="left", suffix="_ranked")
    assert np.allclose(both["score"], both["score_ranked"], atol=1e-6) and both.height == 120
    items, users = run.item_vectors(), run.user_vectors(["u-07", "u-41"])
    vectors = {table.columns[0]: dict(zip(table[table.columns[0]], table["vector"].to_numpy(), strict=True))
               for table in (items, users)}  # fmt: skip
    expected = [vectors["user"][u] @ vectors["item"][i] for u, i in scored.select("user", "item").iter_rows()]
    assert np.allclose(scored["score"], expected, atol=1e-6)
    similar = run.similar_items(["sku 7", "sku 0"], k=59)
    assert similar.height == 118 and not (similar["item"] == similar["similar"]).any()
    units = {item: v / np.linalg.norm(v) for item, v in vectors["item"].items()}
    cosines = [units[a] @ units[b] for a, b in similar.select("item", "similar").iter_rows()]
    assert np.allclose(similar["score"], cosines, atol=1e-6)
    assert all(part["score"].is_sorted(descending=True) for _, part in similar.group_by("item"))


def test_export(run: hstu.Run, tmp_path: Path) -> None:
    run.export(tmp_path / "out")
    written = pl.read_parquet(tmp_path / "out" / "items.parquet")
    assert np.allclose(np.stack(written["vector"].to_numpy()), np.stack(run.item_vectors()["vector"].to_numpy()))
    with pytest.raises(ValueError, match="is there already"):
        run.export(tmp_path / "out")


def test_a_ranking_run(place: Path, tmp_path: Path) -> None:
    events, _ = planted_log()
    run = hstu.fit(
        events.to_pandas(),
        **NAMES,
        action="did",
        config=str(place / "ranking.gin"),
        run_dir=tmp_path / "rank",
        verbose=False,
        **{"RankingArgs.prediction_head_arch": (8, 2)},
    )
    assert run.task == "ranking" and "AUC" in run.scores
    scores = run.score(pd.DataFrame({"who": ["u-07", "u-41"], "what": ["sku 7", "sku 14"]}))
    assert isinstance(scores, pd.DataFrame) and scores["user"].tolist() == ["u-07", "u-41"]
    assert np.allclose(scores[["score_0", "score_1"]].sum(axis=1), 1)
    for ask in (run.recommend, run.item_vectors, lambda: run.similar_items(["sku 7"])):
        with pytest.raises(ValueError, match="needs a retrieval run"):
            ask()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda run: run.recommend(["nobody"]), "users: column 'who', row 1: value 'nobody' is not in the data set"),
        (lambda run: run.recommend("u-07"), r"users = 'u-07': give a list"),
        (lambda run: run.recommend([["u-07"], 3]), "users: "),
        (lambda run: run.recommend([]), "users: has no rows"),
        (lambda run: run.recommend(k=0), "top_k = 0: must be at least 1"),
        (lambda run: run.recommend(items=["sku 999"]), "items: 'sku 999' is not in the catalogue"),
        (lambda run: run.recommend(histories=[1, 2]), "histories: is a list; give a DataFrame"),
        (lambda run: run.recommend(histories=pl.DataFrame({"who": ["x"]})), "histories: column 'what' is missing"),
        (lambda run: run.recommend(["u-07"], histories=planted_log()[0]), "give one of them"),
        (lambda run: run.recommend(request_time="soon"), "'soon': is no time"),
        (lambda run: run.recommend(request_time=datetime(1970, 1, 2, tzinfo=UTC)), "lies before the last event"),
        (lambda run: run.recommend(approximate=20), "approximate = 20: is for RetrievalArgs.similarity = 'mol'"),
        (lambda run: run.score(pl.DataFrame({"who": ["u-07"], "what": ["?"]})), "is not in the catalogue"),
        (lambda run: run.similar_items(["?"]), "items: '[?]' is not in the catalogue"),
        (lambda run: run.similar_items(["sku 7"], k=0), "k = 0: must be at least 1"),
        (lambda run: run.evaluate("train"), "split = 'train': must be"),
        (lambda run: hstu.open_run(run.path, "17"), "no finished checkpoint"),
        (lambda run: hstu.open_run(run.path.parent), "holds no run"),
        (lambda run: hstu.open_run(run.path, frames="dask"), "frames = 'dask': must be"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run: hstu.Run, ask, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        ask(run)
    assert "\n" not in str(caught.value)


def test_an_unknown_argument_is_a_type_error(run: hstu.Run, other: dict) -> None:
    with pytest.raises(TypeError, match="unexpected argument 'reqest_time'"):
        run.recommend(reqest_time="now")
    with pytest.raises(TypeError, match="'duplicate'; did you mean 'duplicates'"):
        hstu.fit(planted_log()[0], **other, duplicate="drop")
    assert not other["run_dir"].exists()


def test_a_config_that_is_wrong_is_told_before_anything_is_written(other: dict) -> None:
    with pytest.raises(ValueError, match="TrainerArgs.max_epoch = 3: no such field; did you mean max_epochs"):
        hstu.fit(planted_log()[0], **other, **{"TrainerArgs.max_epoch": 3})
    assert not other["run_dir"].exists()
    with pytest.raises(ValueError, match="column 'whom' is missing"):
        hstu.fit(planted_log()[0], **{**other, "user": "whom"})
    assert not list(other["run_dir"].glob("data/*"))


def test_a_second_call_goes_on_and_other_events_are_refused(run: hstu.Run, place: Path) -> None:
    events, users = planted_log()
    given = dict(users=users, **NAMES, config=str(place / "retrieval.gin"), run_dir=run.path, verbose=False)
    before = (run.path / "metrics.jsonl").read_text()
    more = hstu.fit(events, **given, **{"TrainerArgs.max_train_iters": 21})
    assert more.step in (10, 20, 21)
    assert "resumed from" in (run.path / "train.log").read_text()
    assert (run.path / "metrics.jsonl").read_text().splitlines()[:2] == before.splitlines()[:2]
    data = {path: path.read_bytes() for path in (run.path / "data").rglob("*.parquet")}
    with pytest.raises(ValueError, match="holds a run on other events"):
        hstu.fit(events.head(-5), **given)
    with pytest.raises(ValueError, match="resume=never"):
        hstu.fit(events, **given, resume="never")
    assert data == {path: path.read_bytes() for path in (run.path / "data").rglob("*.parquet")}
    assert not (run.path / ".data.new").exists()


def test_a_run_may_move(run: hstu.Run, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "moved", symlinks=True)
    moved = hstu.open_run(tmp_path / "moved", frames="polars")
    assert moved.recommend(k=3).equals(run.recommend(k=3))
    assert moved._opened.dataset.path == (tmp_path / "moved" / "data" / "shop").resolve()


def test_the_callers_random_numbers_and_log_are_left_alone(run: hstu.Run, other: dict) -> None:
    import logging

    log = logging.getLogger("hstu")
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hstu.open_run(run.path)
    hstu.fit(planted_log()[0], **other, **{"TrainerArgs.max_train_iters": 1})
    assert torch.equal(torch.rand(3), expected)
    assert (log.handlers, log.level, log.propagate) == (handlers, level, propagate)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_does_not_leak(other: dict, tmp_path: Path) -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        return sum(c.type == socket.SOCK_STREAM for c in process.net_connections()), process.num_threads()

    process, counts = psutil.Process(), []
    for number in range(4):
        hstu.fit(planted_log()[0], **{**other, "run_dir": tmp_path / str(number)}, **{"TrainerArgs.max_train_iters": 1})
        counts.append(held())
    deadline = time.monotonic() + 20  # a thread may take a moment to end
    while any(now > before for now, before in zip(held(), counts[0], strict=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(now <= before for now, before in zip(held(), counts[0], strict=True)), counts


def test_ctrl_c_keeps_the_run(other: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = RunLogger.tick

    def interrupting(self: RunLogger) -> None:
        tick(self)
        if self.first_step == 0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RunLogger, "tick", interrupting)
    with pytest.raises(KeyboardInterrupt):
        hstu.fit(planted_log()[0], **other)
    assert "stopped at step 1, saved" in (other["run_dir"] / "train.log").read_text()
    run = hstu.fit(planted_log()[0], **other)
    assert "at step 1" in (other["run_dir"] / "train.log").read_text().split("resumed from")[1].splitlines()[0]
    assert run.scores


def test_the_second_ctrl_c_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), PoliteStop():
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), PoliteStop(), patience(lambda: "", lambda: False):
        os.kill(os.getpid(), signal.SIGINT)
        assert requested() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one is obeyed at once")
    assert requested() is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_thread_and_one_at_a_time(other: dict, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    limits = {"TrainerArgs.max_train_iters": 1}
    thread = threading.Thread(target=lambda: made.append(hstu.fit(planted_log()[0], **other, **limits)))
    thread.start()
    thread.join()
    assert isinstance(made[0], hstu.Run)
    with PoliteStop(), pytest.raises(ValueError, match="another training is under way"):
        hstu.fit(planted_log()[0], **other, **limits)


def test_import_is_lazy() -> None:
    assert {"fit", "open_run", "Run", "__version__"} <= set(dir(hstu))
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        hstu.fitt  # noqa: B018
