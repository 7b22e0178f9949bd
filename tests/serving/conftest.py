"""Runs to serve: retrieval and ranking, of a log with features of users and of events."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import hstu
from hstu.serving.app import make_app
from hstu.serving.model import ModelOptions
from hstu.serving.service import Service, ServiceOptions
from tests.inference.test_predict import planted_log
from tests.tiny import BINDINGS

NAMES = dict(user="who", item="what", time="when", action="did")
TRAINED = ("TrainerArgs.max_train_iters=4", "TrainerArgs.eval_interval=2", "TrainerArgs.keep_last_checkpoints=5")


def log() -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events with a price, and users with a plan and an age."""
    events, users = planted_log()
    price = [float(n % 7) if n % 5 else None for n in range(events.height)]
    age = [float(20 + n % 40) for n in range(users.height)]
    return events.with_columns(price=pl.Series(price)), users.with_columns(age=pl.Series(age))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serving")
    events, users = log()
    more = {"retrieval": "RetrievalArgs.eval_metrics=('HR@10',)", "ranking": "RankingArgs.prediction_head_arch=[8, 2]"}
    for task, lines in BINDINGS.items():
        (path / f"{task}.gin").write_text("\n".join((*lines, *TRAINED, more[task])))
        hstu.fit(
            events, users=users, **NAMES, config=str(path / f"{task}.gin"), run_dir=path / task, verbose=False,
            event_features="price:numeric", user_features="age:numeric",
        )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def run(place: Path) -> hstu.Run:
    return hstu.open_run(place / "retrieval", frames="polars")


def serve(run_dir: Path, **options: object) -> Service:
    fields = {"batch_wait": 0.001, **options}
    model = ModelOptions(**fields.pop("model", {}))  # type: ignore[arg-type]
    return Service(ServiceOptions(run_dir=run_dir, model=model, **fields), hstu.open_run(run_dir)._opened.assembly.mesh)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[Service]:
    made = serve(place / "retrieval")
    yield made
    made.close()


@pytest.fixture
def app(service: Service) -> object:
    return make_app(service, max_body=1 << 16)


@pytest.fixture(scope="module")
def ranking(place: Path) -> Iterator[Service]:
    made = serve(place / "ranking")
    yield made
    made.close()


def history_of(user: str) -> tuple[list[dict], dict]:
    """The events of a user of the log, as a client says them, and the user's features."""
    events, users = log()
    mine = events.filter(pl.col("who") == user).drop("who").to_dicts()
    return mine, users.filter(pl.col("who") == user).drop("who").to_dicts()[0]


def later_events(user: str, number: int) -> list[dict]:
    """Events that a user might have after those of the log."""
    last, rng = history_of(user)[0][-1]["when"], np.random.default_rng(len(user) + int(user[2:]))
    return [
        {"what": f"sku {rng.integers(60)}", "when": last + 60 * (n + 1), "did": 1, "price": float(n)}
        for n in range(number)
    ]
