"""The score of a run is what its predictions earn: HR, NDCG and MRR of the file are those of eval.json."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from hstu.cli import predict
from hstu.config import operative_gin
from hstu.config.backbones import BACKBONES
from hstu.data.splits import time_quantiles
from tests import launch
from tests.samples import make_dataset
from tests.tiny import BINDINGS
from tests.training.runs import trainer

NAMES = ("HR@3", "NDCG@5", "MRR", "HR@3:sampled_100")
ITEMS = 30
PROTOCOLS = {
    "leave_one_out": (),
    "by_user": (),
    "temporal": ("DatasetArgs.temporal_quantiles=(0.6, 0.8)",),
    "windows": ("DatasetArgs.num_windows=4", "DatasetArgs.window=1"),
}
MODELS = {
    **{name: (f"NetworkArgs.backbone={name!r}",) for name in BACKBONES if not name.startswith("hf:")},
    "mol": ("RetrievalArgs.similarity='mol'",),
    "cosine": ("RetrievalArgs.similarity='cosine'",),
    "bias": ("RetrievalArgs.item_bias=True",),
    "ties": ("NetworkArgs.item_embedding='categorical'",),
    "actions": ("NetworkArgs.token_layout='interleave'", "NetworkArgs.preset='research'"),
    "stale": ("DatasetArgs.history_end=-2",),
}
HUGGING_FACE = {name: (f"NetworkArgs.backbone='hf:{name}'",) for name in ("gpt2", "bert")}
CASES = [
    ("hstu", "leave_one_out", True),
    ("gru", "temporal", False),
    ("bert", "windows", True),
    ("mol", "by_user", True),
    ("ties", "temporal", True),
    ("stale", "leave_one_out", True),
]
ALL = [(name, protocol, seen) for name in (*MODELS, *HUGGING_FACE) for protocol in PROTOCOLS for seen in (True, False)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users who come back to few items; one has met them all, some hardly any."""
    folder = tmp_path_factory.mktemp("repeats") / "synthetic"
    rng = np.random.default_rng(5)
    lengths = [3, 4, 5, 3 * ITEMS, *rng.integers(5, 60, size=36).tolist()]
    items = [np.arange(n) % ITEMS if n == 3 * ITEMS else rng.integers(ITEMS, size=n) for n in lengths]
    make_dataset(folder, lengths, num_items=ITEMS, items=np.concatenate(items), categories=("kind",))
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    log = logging.getLogger("hstu")
    kept = log.handlers[:], log.propagate, log.level
    yield
    log.handlers, log.propagate, log.level = kept


def score_of(data: Path, run: Path, *bindings: str) -> dict[str, Any]:
    """Train one step; returns the record of eval.json."""
    bindings = (f"DatasetArgs.dataset_path={str(data)!r}", f"RetrievalArgs.eval_metrics={NAMES}", *bindings)
    with trainer(data, run, "retrieval", *bindings, "TrainerArgs.max_train_iters=1") as made:
        assert made.train() is not None
        (run / "operative.gin").write_text(operative_gin(made.config))
    record: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return record


def earned(path: Path) -> dict[str, float]:
    """Compute the metrics from a file of whole rankings, and how many targets it is about."""
    about = json.loads(pl.read_parquet_metadata(path)["hstu"])
    ranks = []
    for _, rows in pl.read_parquet(path).group_by("user", "event"):
        own = rows.filter(pl.col("item") == pl.col("target"))["score"].to_list()
        if own:
            higher, same = ((rows["score"] > own[0]).sum(), (rows["score"] == own[0]).sum())
            ranks.append(1 + higher + (same - 1) / 2)
    count = about["num_requests"]
    return {
        "HR@3": sum(rank <= 3 for rank in ranks) / count,
        "NDCG@5": math.fsum(1 / math.log2(rank + 1) for rank in ranks if rank <= 5) / count,
        "MRR": math.fsum(1 / rank for rank in ranks) / count,
        "found": len(ranks),
    }


def check(data: Path, run: Path, model: str, protocol: str, filter_seen: bool) -> None:
    bindings = (*(MODELS | HUGGING_FACE)[model], f"DatasetArgs.protocol={protocol!r}", *PROTOCOLS[protocol])
    record = score_of(data, run, *bindings, f"RetrievalArgs.filter_seen={filter_seen}")
    output = run / "all.parquet"
    flags = ["--run-dir", str(run), "--split", "test", "--output", str(output), "--top-k", str(ITEMS)]
    assert predict.main(flags) == 0
    found, metrics = earned(output), record["metrics"]
    assert found["HR@3"] == metrics["HR@3"] and found["MRR"] == metrics["MRR"]
    assert found["NDCG@5"] == pytest.approx(metrics["NDCG@5"], rel=1e-14)  # logarithms of two libraries
    seen, count = record["seen_targets"], record["num_targets"]
    assert found["found"] == count - (seen if filter_seen else 0) and 0 < seen < count
    if filter_seen:
        assert metrics["HR@3:sampled_100"] <= 1 - seen / count, "a target that may not be returned is a miss there too"


@pytest.mark.parametrize(("model", "protocol", "filter_seen"), CASES)
def test_the_score_is_what_predictions_earn(
    model: str, protocol: str, filter_seen: bool, data: Path, tmp_path: Path
) -> None:
    check(data, tmp_path, model, protocol, filter_seen)


@pytest.mark.slow
@pytest.mark.parametrize("filter_seen", [True, False])
def test_ranks_earn_what_they_say(filter_seen: bool, data: Path, tmp_path: Path) -> None:
    place, run = tmp_path / "run.gin", tmp_path / "run"
    lines = [f"DatasetArgs.dataset_path={str(data)!r}", f"RetrievalArgs.eval_metrics={NAMES}"]
    lines += [
        f"RetrievalArgs.filter_seen={filter_seen}",
        "TrainerArgs.max_train_iters=2",
        "TrainerArgs.eval_batch_size=3",
    ]
    place.write_text("\n".join([*BINDINGS["retrieval"], *lines]))
    script = launch.ROOT / "examples" / "pretrain_gr_retrieval.py"
    flags = [f"--gin-config-file={place}", f"--run-dir={run}"]
    done = launch.run(launch.torchrun_command(2, script, *flags), timeout=300)
    assert done.code == 0, done.err
    metrics = json.loads((run / "eval.json").read_text())["metrics"]
    flags = [f"--run-dir={run}", "--split=test", f"--top-k={ITEMS}", f"--output={run}/two.parquet"]
    done = launch.run(launch.torchrun_command(2, Path("-m"), "hstu.cli.predict", *flags), timeout=300)
    assert done.code == 0, done.err
    assert predict.main([*flags[:3], f"--output={run}/one.parquet"]) == 0
    for name in ("two", "one"):
        found = earned(run / f"{name}.parquet")
        assert {key: pytest.approx(found[key], rel=1e-14) for key in NAMES[:3]} == {k: metrics[k] for k in NAMES[:3]}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "protocol", "filter_seen"), [case for case in ALL if case not in CASES])
def test_every_score_is_what_predictions_earn(
    model: str, protocol: str, filter_seen: bool, data: Path, tmp_path: Path
) -> None:
    if model in HUGGING_FACE:
        pytest.importorskip("transformers")
    check(data, tmp_path, model, protocol, filter_seen)


@pytest.mark.parametrize(("repeats", "chosen"), [(1, True), (2, False)])
def test_seen_items_stay_where_users_come_back(
    repeats: int, chosen: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 100 validation targets, one may be a repeat."""
    items = np.tile(np.arange(5), (100, 1))
    items[:repeats, 3] = 0  # the validation target; the test targets are all new
    make_dataset(tmp_path / "synthetic", [5] * 100, num_items=ITEMS, items=items.ravel())
    caplog.set_level(logging.INFO, "hstu")
    record = score_of(tmp_path / "synthetic", tmp_path / "run")
    reason = f"{repeats} of 100 validation targets are items that their user has met before, "
    reason += "at most 1%" if chosen else "more than 1%"
    assert (record["filter_seen"], record["filter_seen_reason"], record["seen_targets"]) == (chosen, reason, 0)
    assert f"RetrievalArgs.filter_seen = {chosen}: {reason}" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (valid,) = [line for line in lines if line.get("split") == "valid"]
    assert (valid["filter_seen"], valid["seen_targets"]) == (chosen, repeats)
    assert f"RetrievalArgs.filter_seen = {chosen}\n" in (tmp_path / "run" / "operative.gin").read_text()


def test_users_with_fewer_items_than_asked_for_are_counted(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score_of(data, tmp_path, "RetrievalArgs.filter_seen=True")
    output = tmp_path / "future.parquet"
    assert predict.main(["--run-dir", str(tmp_path), "--output", str(output), "--top-k", "20"]) == 0
    rows = pl.read_parquet(output).group_by("user").len()["len"]
    about = json.loads(pl.read_parquet_metadata(output)["hstu"])
    fewer, without = int((rows < 20).sum()) + 40 - len(rows), 40 - len(rows)
    assert (about["num_requests"], about["fewer_than_top_k"], about["without_items"]) == (40, fewer, without)
    assert fewer > without > 0
    assert (
        f"{fewer} of 40 users get fewer than 20 items, {without} of them none: they have seen the rest"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("protocol", ["temporal", "windows"])
def test_targets_that_training_never_shows_are_reported_apart(
    protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Items that come into fashion late: no training sample shows some of them."""
    rng = np.random.default_rng(3)
    times = np.sort(rng.integers(10**9, 10**9 + 10**6, size=(30, 25)))
    items = ((times - 10**9) / 10**6 * 22 + rng.integers(8, size=times.shape)).astype(np.int64)
    folder, run = tmp_path / "synthetic", tmp_path / "run"
    dataset = make_dataset(folder, [25] * 30, num_items=ITEMS, items=items.ravel(), times=times.ravel())
    about = (f"DatasetArgs.protocol={protocol!r}", *PROTOCOLS[protocol], "RetrievalArgs.filter_seen=False")
    record = score_of(folder, run, *about)
    metrics = record["metrics"]
    cut = time_quantiles(dataset, (0.6,) if protocol == "temporal" else (0.25, 0.5))
    shown: set[int] = set()
    for user in range(30):
        stop = int((times[user] < cut[-1]).sum())
        if protocol == "temporal" or stop > (times[user] < cut[0]).sum():
            shown |= set(items[user, :stop][-17:].tolist())  # 16 events of history, and one after them
    output = run / "all.parquet"
    flags = ["--run-dir", str(run), "--split", "test", "--output", str(output), "--top-k", str(ITEMS)]
    assert predict.main(flags) == 0
    found = pl.read_parquet(output)
    events = found.select("user", "event", "target").unique()
    new = ~events["target"].is_in(sorted(shown))
    assert record["untrained_targets"] == new.sum() and 0 < new.sum() < len(events) == record["num_targets"]
    places = found.filter((pl.col("item") == pl.col("target")) & pl.col("target").is_in(sorted(shown)))["rank"]
    assert metrics["HR@3:trained"] == (places <= 3).sum() / len(places) != metrics["HR@3"]
    assert metrics["MRR:trained"] == math.fsum(1 / place for place in places) / len(places)
    assert metrics.keys() == {*NAMES, *(f"{name}:trained" for name in NAMES)}
    assert predict.main([*flags, "--trained-only"]) == 0
    only = pl.read_parquet(output)
    assert only.drop("rank", "score").equals(found.filter(pl.col("item").is_in(sorted(shown))).drop("rank", "score"))
    assert f"--trained_only: {ITEMS - len(shown)} of {ITEMS} items are left out" in capsys.readouterr().out
    assert json.loads(pl.read_parquet_metadata(output)["hstu"])["trained_only"] is True
