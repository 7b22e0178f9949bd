"""Programs for serving: what reader.py answers, without this package, is what predict answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from safetensors.torch import load_file

import hstu
from hstu.cli import export as command
from hstu.inference.export import ExportOptions
from hstu.inference.reader import Model
from tests.tiny import BINDINGS

USERS = 24
WORDS = ("red", "green", "blue", "grey")
SMALL = (*BINDINGS["ranking"][1:12], "TrainerArgs.report = False")
# What the reader runs in: neither this package nor what it stands on can be imported.
ALONE = """
import json, sys
for name in "hstu torchrec megatron fbgemm_gpu safetensors pyarrow polars pandas gin".split():
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from reader import Model
asked = json.load(sys.stdin)
model, histories = Model(sys.argv[1]), asked["histories"]
some = dict(k=3, items=asked["items"], filter_seen=False)
best = [model.recommend(own, k=7) for own in histories], [model.recommend(own, **some) for own in histories]
print(json.dumps(best))
"""


def shop() -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Events, users and items with features of every kind, some of them missing."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, USERS)
    total = int(lengths.sum())

    def some(values: list[Any], share: float = 0.2) -> list[Any]:
        return [None if lost else value for value, lost in zip(values, rng.random(len(values)) < share, strict=True)]

    def sets(number: int) -> list[str | None]:
        return some(["|".join(rng.permutation(WORDS)[: rng.integers(1, 4)]) for _ in range(number)])

    device, tags = some(list(rng.choice(WORDS, total))), sets(total)
    for last in lengths.cumsum()[:8] - 1:  # which training never meets
        device[last], tags[last] = "violet", "violet|red"
    events = pl.DataFrame(
        {
            "who": np.repeat([f"u{n}" for n in range(USERS)], lengths),
            "what": [f"sku {n}" for n in rng.integers(30, size=total)],
            "when": 10**9 + np.concatenate([np.sort(rng.integers(10**5, size=n)) for n in lengths]),
            "did": rng.integers(2, size=total),
            "device": device,
            "price": some(list(rng.normal(size=total).round(2))),
            "tags": tags,
        }
    )
    users = pl.DataFrame(
        {
            "who": [f"u{n}" for n in range(USERS)],
            "plan": rng.choice(WORDS, USERS),
            "age": some(list(rng.normal(size=USERS).round(2))),
            "likes": sets(USERS),
        }
    )
    items = pl.DataFrame(
        {
            "what": [f"sku {n}" for n in range(30)],
            "brand": rng.choice(WORDS, 30),
            "weight": some(list(rng.normal(size=30).round(2))),
        }
    )
    return events, users, items


def histories_of(events: pl.DataFrame, users: pl.DataFrame) -> list[dict[str, Any]]:
    """The columns of each user, as the reader takes them."""
    found = []
    for (name,), own in events.group_by(["who"], maintain_order=True):
        columns = {column: own[column].to_list() for column in own.columns if column != "who"}
        columns |= users.row(by_predicate=pl.col("who") == name, named=True)
        for column in ("tags", "likes"):
            value = columns.get(column)
            if isinstance(value, list):
                columns[column] = [None if own is None else own.split("|") for own in value]
            elif value is not None:
                columns[column] = value.split("|")
        found.append(columns)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("torch_export")


def fit(data: Path, task: str, name: str, *lines: str, features: bool = True) -> hstu.Run:
    """A run of two steps on the shop."""
    events, users, items = shop()
    own = dict(
        event_features="device:categorical,price:numeric,tags:multi",
        user_features="plan:categorical,age:numeric,likes:multi",
        item_features="brand:categorical,weight:numeric",
        users=users,
        items=items,
    )
    if not features:
        events, own = events.drop("device", "price", "tags"), {}
    gin = data / f"{name}.gin"
    head = {"ranking": "RankingArgs.prediction_head_arch=[8, 2]", "retrieval": "RetrievalArgs.num_negatives=5"}[task]
    more = ("TrainerArgs.max_train_iters=2", "TrainerArgs.train_batch_size=8")
    gin.write_text("\n".join((*SMALL, head, *more, *lines)))
    run = hstu.fit(
        events,
        run_dir=data / name,
        config=str(gin),
        task=task,  # type: ignore[arg-type]
        user="who",
        item="what",
        time="when",
        action="did",
        verbose=False,
        **own,  # type: ignore[arg-type]
    )
    run.frames = "polars"
    return run


def check_recommendations(run: hstu.Run, best: list[list[tuple[Any, float]]], users: list[str], **asked: Any) -> None:
    """The items are those of the run, in their order; equal but for rounding are the scores."""
    expected = run.recommend(users, **asked)
    assert len(expected)
    for user, own in zip(users, best, strict=True):
        theirs = expected.filter(pl.col("user") == user).sort("rank")
        assert [item for item, _ in own] == theirs["item"].to_list()
        np.testing.assert_allclose([score for _, score in own], theirs["score"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recommendations_without_the_package_are_those_of_predict(data: Path) -> None:
    run = fit(data, "retrieval", "alone", "NetworkArgs.preset='research'", "RetrievalArgs.filter_seen=True")
    folder = data / "export"
    run.export(folder, format="torch-export")
    events, users, _ = shop()
    asked = {"histories": histories_of(events, users), "items": ["sku 3", "sku 7", "sku 9", "sku 20"]}
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, folder],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    best, some = json.loads(done.stdout)
    check_recommendations(run, best, users["who"].to_list(), k=7)
    check_recommendations(run, some, users["who"].to_list(), k=3, items=asked["items"], filter_seen=False)
    assert load_file(folder / "tables.safetensors")["__items"].shape == (30, 16), "any library reads the tables"


RETRIEVAL = {
    "sasrec": ("NetworkArgs.backbone='sasrec'", "DatasetArgs.history_end=-1"),
    "llama": ("NetworkArgs.backbone='llama'", "RetrievalArgs.item_bias=True"),
    "bert": ("NetworkArgs.backbone='bert'", "NetworkArgs.token_layout='item'"),
    "mixture": ("RetrievalArgs.similarity='mol'", "NetworkArgs.dtype_str='bfloat16'"),
}
RANKING = {
    "hstu": ("DatasetArgs.max_num_candidates=2", "NetworkArgs.recompute_input_silu=True"),
    "groups": ("DatasetArgs.max_num_candidates=2", "NetworkArgs.target_group_size=2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RETRIEVAL)
def test_every_backbone_answers_as_predict(data: Path, name: str) -> None:
    run = fit(data, "retrieval", name, *RETRIEVAL[name])
    run.export(data / f"{name}-export", format="torch-export")
    events, users, _ = shop()
    histories, asked = histories_of(events, users), dict(k=5, request_time=2 * 10**9)
    model = Model(data / f"{name}-export")
    best = [model.recommend(history, **asked) for history in histories]
    tolerance = 2e-2 if name == "mixture" else 1e-4
    expected = run.recommend(users["who"].to_list(), **asked)
    for user, own in zip(users["who"], best, strict=True):
        theirs = expected.filter(pl.col("user") == user).sort("rank")
        np.testing.assert_allclose([score for _, score in own], theirs["score"], rtol=tolerance, atol=tolerance)
        assert name == "mixture" or [item for item, _ in own] == theirs["item"].to_list()


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKING)
def test_candidates_are_scored_as_predict_does(data: Path, name: str) -> None:
    run = fit(data, "ranking", f"ranking-{name}", *RANKING[name])
    run.export(data / f"ranking-{name}-export", format="torch-export")
    events, users, items = shop()
    model, some = Model(data / f"ranking-{name}-export"), items["what"].to_list()[:5]
    pairs = pl.DataFrame({"who": [u for u in users["who"] for _ in some], "what": some * USERS})
    features = {"device": "red", "price": 0.5, "tags": "red|blue"}
    expected = run.score(pairs.with_columns(**{column: pl.lit(value) for column, value in features.items()}))
    candidates = {"what": some, "device": ["red"] * 5, "price": [0.5] * 5, "tags": [["red", "blue"]] * 5}
    scores = np.concatenate([model.score(history, candidates) for history in histories_of(events, users)])
    names = [column for column in expected.columns if column.startswith("score")]
    assert model.about["scores"] == names
    np.testing.assert_allclose(scores, expected.select(names).to_numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_without_a_program_is_refused_in_one_line_and_leaves_nothing(data: Path) -> None:
    run = fit(data, "retrieval", "gru", "NetworkArgs.backbone='gru'", features=False)
    with pytest.raises(ValueError, match=r"NetworkArgs.backbone = 'gru': torch.export cannot write") as caught:
        run.export(data / "gru-export", format="torch-export")
    assert "\n" not in str(caught.value)
    assert not [path for path in data.iterdir() if "gru-export" in path.name]


def test_what_excludes_each_other_is_refused_before_a_run_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    flags = ["--run-dir", "nowhere", "--output", str(tmp_path / "x")]
    for more, message in (
        (["--compile"], "--compile: is for --format torch-export"),
        (["--format", "torch-export", "--compile"], "there is no 'no-such-compiler'"),
        (["--format", "torch-export", "--faiss"], "leave out --faiss"),
        (["--format", "torch-export", "--users", "log.csv"], "what chooses users"),
    ):
        assert command.main([*flags, *more]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="must be one of files, torch-export"):
        ExportOptions(format="onnx").check()  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()
