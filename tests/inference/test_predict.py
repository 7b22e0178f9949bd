"""Recommendations out: what predict and export write is what evaluation scored, in the ids that went in."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

import hstu
from hstu.cli import attention, baselines, export, predict
from hstu.data.synthetic import SyntheticConfig, generate
from hstu.data.table import preprocess_interactions
from hstu.layers.hstu import HSTUStack
from hstu.metrics.ranking import Predicted, ranking_scores
from tests import launch
from tests.tiny import BINDINGS

COLUMNS = ("--user_column", "who", "--item_column", "what", "--time_column", "when", "--action_column", "did")


def planted_log() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events and users with string ids whose order is not that of the planted ones."""
    data = generate(SyntheticConfig(num_users=90, num_items=60, num_clusters=6, min_seqlen=4, max_seqlen=20))
    who = np.repeat(np.arange(90), data.lengths)
    events = pl.DataFrame(
        {
            "who": [f"u-{(37 * user) % 90:02d}" for user in who],
            "what": [f"sku {(7 * item) % 60}" for item in data.events["item_id"]],
            "when": data.events["timestamp"],
            "did": data.events["action"],
        }
    )
    users = events.select(pl.col("who").unique(maintain_order=True)).with_columns(
        plan=pl.Series(["free" if user % 3 else "paid" for user in range(90)])
    )
    return events, users


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a data set, a retrieval and a ranking run."""
    cwd = tmp_path_factory.mktemp("predict")
    events, users = planted_log()
    names = dict(user_column="who", item_column="what", time_column="when", action_column="did")
    preprocess_interactions(events, data_dir=cwd / "tmp_data", users=users, name="synthetic", **names)
    events.write_csv(cwd / "log.csv")
    more = {
        "retrieval": ("RetrievalArgs.eval_metrics=('HR@10', 'NDCG@10')", "NetworkArgs.preset='research'"),
        "ranking": ("RankingArgs.eval_metrics=('AUC',)", "DatasetArgs.max_num_candidates=2",
                    "RankingArgs.prediction_head_arch=[8, 2]"),
    }  # fmt: skip
    for task, bindings in BINDINGS.items():
        (cwd / f"{task}.gin").write_text("\n".join((*bindings, *more[task], "TrainerArgs.max_train_iters=20",
                                                    "TrainerArgs.eval_interval=10")))  # fmt: skip
        done = launch.entrypoint()(task, "--gin-config-file", f"{task}.gin", "--run-dir", task, cwd=cwd)
        assert done.code == 0, done.err
    return cwd


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(home)
    log = logging.getLogger("hstu")
    kept = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = kept


def answers(path: Path, *flags: str, task: str = "retrieval") -> pl.DataFrame:
    assert predict.main(["--run-dir", task, "--output", str(path), *flags]) == 0
    return pl.read_parquet(path)


def result(task: str) -> dict[str, float]:
    return json.loads(Path(task, "eval.json").read_text())["metrics"]


def last_events(events: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """All events but each user's last, and the last ones."""
    last = pl.int_range(pl.len()).over("who") == pl.len().over("who") - 1
    return events.filter(~last), events.filter(last)


def test_the_reported_score_can_be_computed_from_the_file(tmp_path: Path):
    found = answers(tmp_path / "test.parquet", "--split", "test", "--top-k", "25")
    hits = found.filter((pl.col("item") == pl.col("target")) & (pl.col("rank") <= 10))
    gain = (1 / np.log2(hits["rank"].to_numpy() + 1)).sum()
    assert result("retrieval") == {"HR@10": hits.height / 90, "NDCG@10": pytest.approx(gain / 90, abs=1e-12)}
    assert 0 < hits.height < 90
    _, last = last_events(planted_log()[0])
    targets = dict(zip(last["who"], last["what"], strict=True))
    assert all(targets[user] == target for user, target in found.select("user", "target").iter_rows())
    about = json.loads(pl.read_parquet_metadata(tmp_path / "test.parquet")["hstu"])
    assert about["split"] == "test" and about["protocol"] == "leave_one_out" and about["filter_seen"] is True


def test_validation_is_scored_alike(tmp_path: Path):
    found = answers(tmp_path / "valid.parquet", "--split", "valid", "--checkpoint", "20")
    hits = found.filter(pl.col("item") == pl.col("target")).height
    records = [json.loads(line) for line in Path("retrieval/metrics.jsonl").read_text().splitlines()]
    (record,) = [r for r in records if r.get("split") == "valid" and r["step"] == 20]
    assert record["metrics"]["HR@10"] == hits / 90


def test_the_future_holds_no_seen_item_and_is_sorted(tmp_path: Path):
    events, _ = planted_log()
    found = answers(tmp_path / "future.parquet", "--top-k", "60")
    assert found.columns == ["user", "rank", "item", "score"]
    seen = set(events.select("who", "what").iter_rows())
    recommended = set(found.select("user", "item").iter_rows())
    assert not seen & recommended and len(seen | recommended) == 90 * 60, "all that is left is ranked"
    for _, rows in found.group_by("user", maintain_order=True):
        assert rows["rank"].to_list() == list(range(1, rows.height + 1)) and rows["score"].is_sorted(descending=True)


def test_a_truncated_history_from_a_file_gives_what_evaluation_scored(tmp_path: Path):
    history, _ = last_events(planted_log()[0])
    renamed = history.with_columns(pl.col("who") + " again").sample(fraction=1.0, shuffle=True, seed=1)
    users = planted_log()[1].with_columns(pl.col("who") + " again")
    renamed.join(users, on="who").write_parquet(tmp_path / "new.parquet")
    from_file = answers(tmp_path / "a.parquet", "--users", str(tmp_path / "new.parquet"), *COLUMNS)
    scored = answers(tmp_path / "b.parquet", "--split", "test").with_columns(pl.col("user") + " again")
    both = from_file.join(scored, on=["user", "rank"], suffix="_test")
    assert both.height == from_file.height == scored.height
    assert both["item"].equals(both["item_test"], check_names=False)
    assert np.allclose(both["score"], both["score_test"], atol=1e-6)


def test_users_of_the_data_set_by_name(tmp_path: Path):
    Path(tmp_path / "some.csv").write_text("who\nu-07\nu-41\nu-07\n")
    some = answers(tmp_path / "some.parquet", "--users", str(tmp_path / "some.csv"), "--user_column", "who")
    every = answers(tmp_path / "every.parquet")
    assert some["user"].unique(maintain_order=True).to_list() == ["u-07", "u-41"]
    assert (
        some.drop("score")
        .sort("user", "rank")
        .equals(every.filter(pl.col("user").is_in(["u-07", "u-41"])).drop("score").sort("user", "rank"))
    )


def test_unknown_items_are_refused_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = ["who,what,when,plan", "x,sku 1,5,free", "x,sku none,6,free", "y,sku none,7,paid", "x,sku 2,8,free"]
    (tmp_path / "h.csv").write_text("\n".join(lines))
    flags = ["--run-dir", "retrieval", "--users", str(tmp_path / "h.csv"), "--output", str(tmp_path / "o.parquet")]
    assert predict.main([*flags, *COLUMNS]) == 2
    assert "1 items are not in the catalogue that the model was trained on ('sku none')" in capsys.readouterr().err
    assert not list(tmp_path.glob("*o.parquet*"))
    dropped = answers(tmp_path / "o.parquet", *flags[2:4], *COLUMNS, "--unknown-items", "drop")
    out = capsys.readouterr().out
    assert "dropped 2 events of 1 unknown items" in out and "1 users have no known item" in out
    (tmp_path / "h.csv").write_text("\n".join([lines[0], lines[1], lines[4]]))
    kept = answers(tmp_path / "k.parquet", *flags[2:4], *COLUMNS)
    assert dropped["user"].unique().to_list() == ["x"] and dropped.equals(kept)


def test_values_of_contexts_that_training_never_met_are_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plans = {"a": "free", "b": "paid", "c": "gold", "d": "no such plan"}
    lines = [f"{user},sku {item},{item},{plan}" for user, plan in plans.items() for item in (1, 2, 3)]
    (tmp_path / "h.csv").write_text("\n".join(["who,what,when,plan", *lines]))
    flags = ["--users", str(tmp_path / "h.csv"), *COLUMNS]
    found = answers(tmp_path / "o.parquet", *flags)
    assert (
        "values that training never met are read as unknown: plan of 2 users, of 4 users in all"
        in capsys.readouterr().out
    )
    scores = {user: found.filter(pl.col("user") == user)["score"].to_list() for user in plans}
    assert scores["c"] == pytest.approx(scores["d"], abs=1e-6) and len(scores["c"]) == 10
    assert all(scores[known] != pytest.approx(scores["c"], abs=1e-6) for known in "ab")
    (tmp_path / "h.csv").write_text("\n".join(["who,what,when,plan", *lines[:6]]))
    answers(tmp_path / "o.parquet", *flags)
    assert "never met" not in capsys.readouterr().out


def test_actions_that_the_data_set_lacks_are_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    did = {"a": "0", "b": "1", "c": "7", "d": "shared"}
    lines = [f"{user},sku {item},{item},free,{action}" for user, action in did.items() for item in (1, 2, 3)]
    (tmp_path / "h.csv").write_text("\n".join(["who,what,when,plan,did", *lines]))
    (tmp_path / "pairs.csv").write_text("\n".join(["who,what", *(f"{user},sku 4" for user in did)]))
    flags = ["--users", str(tmp_path / "h.csv"), "--candidates", str(tmp_path / "pairs.csv"), *COLUMNS]
    found = answers(tmp_path / "o.parquet", *flags, task="ranking")
    told = (
        "column 'did': 6 of 12 events have actions that the data set lacks ('7', 'shared'), which are read as unknown"
    )
    assert told in capsys.readouterr().out
    scores = dict(zip(found["user"], found["score_1"], strict=True))
    assert scores["c"] == pytest.approx(scores["d"], abs=1e-6)
    assert all(scores[known] != pytest.approx(scores["c"], abs=1e-6) for known in "ab")


def test_a_ranking_run_scores_held_out_events_and_candidates_alike(tmp_path: Path):
    held_out = answers(tmp_path / "test.parquet", "--split", "test", task="ranking")
    values = held_out.select("score_0", "score_1").to_numpy()
    assert np.allclose(values.sum(1), 1)
    labels = held_out["action_id"].to_numpy()
    task = Predicted(name="action", kind="multiclass", values=values, labels=labels, users=np.arange(90))
    scores = ranking_scores(("AUC",), [task])
    assert scores.metrics["AUC"] == pytest.approx(result("ranking")["AUC"], abs=1e-12)
    history, last = last_events(planted_log()[0])
    history.join(planted_log()[1], on="who").write_parquet(tmp_path / "history.parquet")
    last.select("who", "what").write_csv(tmp_path / "pairs.csv")
    files = ["--users", str(tmp_path / "history.parquet"), "--candidates", str(tmp_path / "pairs.csv")]
    asked = answers(tmp_path / "asked.parquet", *files, *COLUMNS, task="ranking")
    both = asked.join(held_out, on=["user", "item"], suffix="_test")
    assert both.height == 90 and np.allclose(both["score_1"], both["score_1_test"], atol=1e-6)


def test_many_candidates_of_a_user_score_what_each_scores_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recommend = importlib.import_module("hstu.inference.recommend")  # which the package has a function for, too
    rng = np.random.default_rng(0)
    who = [f"u-{user:02d}" for user in rng.choice(90, 20, replace=False)]
    pairs = pl.DataFrame({"who": who * 12, "what": [f"sku {item}" for item in rng.integers(60, size=240)]})
    pairs.sample(fraction=1, shuffle=True, seed=1).write_csv(tmp_path / "pairs.csv")
    flags = ["--candidates", str(tmp_path / "pairs.csv"), *COLUMNS]
    passes: list[int] = []
    run = HSTUStack.forward
    monkeypatch.setattr(HSTUStack, "forward", lambda self, x: passes.append(x.values.shape[0]) or run(self, x))
    monkeypatch.setattr(recommend, "SLATE", 5)
    together = answers(tmp_path / "together.parquet", *flags, task="ranking")
    cached = sum(passes)
    monkeypatch.setattr(recommend, "scores_slates", lambda model: False)
    alone = answers(tmp_path / "alone.parquet", *flags, task="ranking")
    order = pl.read_csv(tmp_path / "pairs.csv")
    for found in (together, alone):
        assert found["user"].to_list() == order["who"].to_list() and found["item"].to_list() == order["what"].to_list()
    assert np.allclose(together.select("score_0", "score_1"), alone.select("score_0", "score_1"), atol=1e-6)
    assert cached < (sum(passes) - cached) / 5


@pytest.mark.parametrize(
    ("task", "flags", "complaint"),
    [
        ("nowhere", [], "holds no run"),
        ("retrieval", ["--checkpoint", "7"], "no finished checkpoint"),
        ("retrieval", ["--top-k", "0"], "--top_k = 0"),
        ("retrieval", ["--candidates", "log.csv", *COLUMNS], "ranks the whole catalogue"),
        ("retrieval", ["--split", "test", "--users", "log.csv", *COLUMNS], "no held-out events"),
        ("retrieval", ["--split", "test", "--request-time", "now"], "asks about the future"),
        ("retrieval", ["--request-time", "soon"], "is no time"),
        ("retrieval", ["--request-time", "5"], "lies before the last event"),
        ("retrieval", ["--users", "absent.csv"], "absent.csv: cannot be read"),
        (
            "retrieval",
            ["--users", "log.csv"],
            "column 'user_id' is missing; present: who, what, when, did; its first line "
            "is 'who,what,when,did'; say which of them it is with --user_column, --item_column and so on",
        ),
        ("retrieval", ["--users", "log.csv", *COLUMNS], "column 'plan' is missing"),
        ("retrieval", ["--output", "log.csv/x.parquet"], "cannot be written"),
        ("retrieval", ["--approximate", "50"], "is for RetrievalArgs.similarity = 'mol'"),
        ("ranking", [], "--candidates: is required"),
    ],
)
def test_mistakes_end_in_one_line(task: str, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]):
    output = [] if "--output" in flags else ["--output", "out.parquet"]
    assert predict.main(["--run-dir", task, *output, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and error.count("\n") == 1
    assert not Path("out.parquet").exists()


def test_a_flag_given_twice_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        predict.main(["--run-dir", "retrieval", "--output", "a.parquet", "--output=b.parquet"])
    assert "argument --output: is given twice; give it once" in capsys.readouterr().err


def test_histories_in_another_format_give_the_same_answers(tmp_path: Path):
    history = planted_log()[0].join(planted_log()[1], on="who").filter(pl.col("who") < "u-20")
    history.write_parquet(tmp_path / "rows.parquet")
    lists = history.group_by("who", maintain_order=True).agg("what", "when", pl.col("did"), pl.col("plan").first())
    lists.write_ndjson(tmp_path / "lists.jsonl")
    history.write_csv(tmp_path / "no_header.txt", separator=";", include_header=False)
    columns = ["--columns", ",".join(history.columns), "--format", "csv", "--separator", ";"]
    found = [
        answers(tmp_path / f"{number}.out", "--users", str(tmp_path / name), *COLUMNS, *more)
        for number, (name, more) in enumerate({"rows.parquet": [], "lists.jsonl": [], "no_header.txt": columns}.items())
    ]
    assert found[0].height == 10 * found[0]["user"].n_unique() > 0
    for other in found[1:]:
        assert other.drop("score").equals(found[0].drop("score"))


def test_ranks_write_the_same_file(home: Path, tmp_path: Path):
    flags = ["--run-dir", "retrieval", "--split", "test", "--gin-bindings", "TrainerArgs.eval_batch_size=7"]
    done = launch.forked("hstu.cli.predict", *flags, "--output", str(tmp_path / "two.parquet"), ranks=2, cwd=home)
    assert done.code == 0, done.err
    one, two = answers(tmp_path / "one.parquet", *flags[2:]), pl.read_parquet(tmp_path / "two.parquet")
    assert one.drop("score").equals(two.drop("score"))
    assert np.allclose(one["score"], two["score"], atol=1e-6)


def test_exported_vectors_give_the_predicted_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--run-dir", "retrieval", "--output", str(tmp_path / "out")]
    installed = importlib.util.find_spec("faiss") is not None
    assert export.main([*flags, "--faiss"]) == (0 if installed else 2)
    if not installed:
        assert "pip install" in capsys.readouterr().err and not (tmp_path / "out").exists()
        assert export.main(flags) == 0
    items, users = (pl.read_parquet(tmp_path / "out" / f"{name}.parquet") for name in ("items", "users"))
    assert items.height == 60 and users.height == 90
    scores = np.stack(users["vector"].to_numpy()) @ np.stack(items["vector"].to_numpy()).T
    found = answers(tmp_path / "future.parquet")
    row = {user: place for place, user in enumerate(users["user"])}
    column = {item: place for place, item in enumerate(items["item"])}
    expected = [scores[row[user], column[item]] for user, item in found.select("user", "item").iter_rows()]
    assert np.allclose(found["score"], expected, atol=1e-6)
    assert export.main(flags) == 2 and "is there already" in capsys.readouterr().err
    if installed:
        import faiss

        best = faiss.read_index(str(tmp_path / "out" / "items.faiss")).search(np.stack(users["vector"].to_numpy()), 3)
        assert np.allclose(best[0], -np.sort(-scores)[:, :3], atol=1e-6)


def test_vectors_whose_dot_products_are_no_scores_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bindings = ("RetrievalArgs.similarity='mol'", "TrainerArgs.max_train_iters=1")
    flags = ["--gin-config-file", "retrieval.gin", "--run-dir", str(tmp_path / "mol")]
    done = launch.entrypoint()("retrieval", *flags, *(f"--gin-bindings={line}" for line in bindings), cwd=Path.cwd())
    assert done.code == 0, done.err
    said = {}
    for run in ("retrieval", str(tmp_path / "mol")):
        assert export.main(["--run-dir", run, "--output", str(tmp_path / f"out {len(said)}")]) == 0
        said[run] = "dot products of these vectors are not the scores" in capsys.readouterr().out
    assert list(said.values()) == [False, True]


def test_exported_weights_are_those_of_the_checkpoint(tmp_path: Path):
    from safetensors.numpy import load_file

    assert export.main(["--run-dir", "ranking", "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dense.safetensors", "export.json"]
    weights = load_file(tmp_path / "out" / "dense.safetensors")
    saved: dict[str, np.ndarray] = {}
    for path in Path("ranking/checkpoints/best").resolve().glob("*.safetensors"):
        saved |= {k.removeprefix("dense/"): v for k, v in load_file(path).items() if k.startswith("dense/")}
    assert weights.keys() == saved.keys() and len(weights) > 5
    assert all(np.array_equal(weights[name], saved[name]) for name in weights)


@pytest.mark.parametrize("limit", [20, 3000, 9000])
def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str]):
    """The system refuses more than so many bytes of a file: at the first write or as late as the last."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "old.parquet").write_text("old")
    commands = [(export.main, ["--output", str(tmp_path / "out")])]
    if limit < 5000:
        commands.append((predict.main, ["--output", str(tmp_path / "old.parquet"), "--top-k", "50"]))
    for command, flags in commands:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            assert command(["--run-dir", "retrieval", *flags]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be written" in line and "File too large" in line and line.endswith(("another", "--output"))
    assert [path.name for path in tmp_path.iterdir()] == ["old.parquet"]
    assert (tmp_path / "old.parquet").read_text() == "old"


def test_a_run_is_scored_from_its_directory_alone(home: Path, tmp_path: Path):
    run = str(home / "retrieval")
    done = launch.entrypoint()("retrieval", "--run-dir", run, "--mode", "eval", "--checkpoint", "20", cwd=tmp_path)
    assert done.code == 0, done.err
    record = json.loads((home / "retrieval" / "eval_step_000000020.json").read_text())
    assert record["step"] == 20 and record["split"] == "test"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_entrypoint_of_another_task_is_refused(mode: str, home: Path):
    done = launch.entrypoint()("ranking", "--run-dir", "retrieval", "--mode", mode, cwd=home)
    assert done.code == 2 and "holds a retrieval run; use pretrain_gr_retrieval.py" in done.err


def test_the_operative_config_is_a_config(home: Path):
    from hstu.config import load_config

    for task, tokens in (("retrieval", 1 + 17), ("ranking", 1 + 2 * 17 + 2)):
        path = home / task / "operative.gin"
        loaded = load_config(task, [str(path)])  # type: ignore[arg-type]
        assert loaded.operative == path.read_text()
        assert loaded.config.dataset.contextual_feature_names == ("plan",), "what the data decides is there too"
        assert loaded.config.network.num_position_buckets == loaded.config.network.scaling_seqlen == tokens


def test_baselines_stand_beside_the_score(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert baselines.main(["--run-dir", "retrieval", "--neighbours", "20"]) == 0
    found = json.loads(Path("retrieval/baselines.json").read_text())
    assert found["metrics"] == result("retrieval") and found["filter_seen"] is True and found["num_targets"] == 90
    assert (
        sorted(found["baselines"]) == ["item_knn", "item_knn_last", "popularity"] and "last_item" in found["left_out"]
    )
    events, _ = planted_log()
    train = events.filter(pl.int_range(pl.len()).over("who") < pl.len().over("who") - 2)
    counts = dict(train["what"].value_counts().iter_rows())
    history, last = last_events(events)
    hits = 0
    for user, target in last.select("who", "what").iter_rows():
        met = set(history.filter(pl.col("who") == user)["what"])
        others = [counts.get(item, 0) - counts.get(target, 0) for item in set(events["what"]) - met - {target}]
        rank = 1 + sum(d > 0 for d in others) + sum(d == 0 for d in others) / 2
        hits += target not in met and rank <= 10
    assert found["baselines"]["popularity"]["HR@10"] == pytest.approx(hits / 90)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split()[0] == "popularity" and f"{hits / 90:.4f}" in line for line in printed)
    assert hstu.open_run("retrieval").baselines(20) == found
    assert baselines.main(["--run-dir", "ranking"]) == 2
    assert "ranks given candidates; baselines are of retrieval" in capsys.readouterr().err
    assert baselines.main(["--run-dir", "retrieval", "--gin-bindings", "RetrievalArgs.filter_seen=False"]) == 2
    assert "eval.json: filter_seen = True, and the baselines have False" in capsys.readouterr().err
    assert baselines.main(["--run-dir", "retrieval", "--neighbours", "0"]) == 2
    record = Path("retrieval/eval.json").read_text()
    windows = json.dumps({"metrics": {}, "step": 3, "windows": [0, 1]})
    for text, words in (
        ("{}", "is no record of a score"),
        (windows, "the mean of several windows"),
        (None, "not found; let training finish"),
    ):
        Path("retrieval/eval.json").unlink() if text is None else Path("retrieval/eval.json").write_text(text)
        assert baselines.main(["--run-dir", "retrieval"]) == 2 and words in capsys.readouterr().err
    Path("retrieval/eval.json").write_text(record)


def test_attention_of_a_few_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = pl.DataFrame({"who": ["u-07", "u-33"]})
    asked.write_csv(tmp_path / "who.csv")
    for task, more in (("retrieval", ("--split", "future")), ("ranking", ())):
        flags = ["--run-dir", task, "--users", str(tmp_path / "who.csv"), "--output", str(tmp_path / task), *more]
        assert attention.main([*flags, *COLUMNS[:2]]) == 0, capsys.readouterr().err
        about = json.loads((tmp_path / task / "attention.json").read_text())
        found = load_file(tmp_path / task / "attention.safetensors")
        assert sorted(user["user"] for user in about["users"]) == ["u-07", "u-33"] and about["task"] == task
        assert sorted(found) == [f"{user}/layer{layer}" for user in range(2) for layer in range(2)]
        assert (tmp_path / task / "attention.png").read_bytes()[:4] == b"\x89PNG"
        events = planted_log()[0]
        for number, user in enumerate(about["users"]):
            weights, tokens = found[f"{number}/layer0"], user["tokens"]
            assert weights.shape == (2, len(tokens), len(tokens)) and weights.any() and not weights.triu(1).any()
            items = [token for token in tokens if token.startswith("sku")]
            own = events.filter(pl.col("who") == user["user"])["what"].to_list()
            assert items == own[-len(items) :] and len(items) == min(len(own), 16 if task == "retrieval" else 18)
    assert attention.main(["--run-dir", "ranking", "--split", "future", "--output", str(tmp_path / "no")]) == 2
    assert "a ranking run scores given events" in capsys.readouterr().err
    assert attention.main(["--run-dir", "retrieval", "--num-users", "0", "--output", str(tmp_path / "no")]) == 2
    assert attention.main(["--run-dir", "retrieval", "--output", str(tmp_path / "ranking")]) == 2
    assert "is there already" in capsys.readouterr().err and not (tmp_path / "no").exists()
