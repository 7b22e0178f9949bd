"""The command, run as a user runs it, and small files in the published layouts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hstu.cli.preprocess import DATASETS
from hstu.data import SequenceDataset
from hstu.preprocessing.kuairand import CONTEXTS, ENCRYPTED, EVENTS, LOG_FIELDS, NUMBERS, USER_FIELDS
from hstu.preprocessing.progress import Progress
from hstu.preprocessing.published import Published, make_published

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run preprocessor.py from another directory, without the repository on the path."""

    def run(*flags: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        words = [sys.executable, ROOT / "preprocessing" / "preprocessor.py", *flags]
        return subprocess.run(
            [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
        )

    return run


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line on stderr with these parts, exit code 2."""
    assert result.returncode == 2, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr


def ratings(num_users: int = 12, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """User, item, rating, seconds, in no order."""
    rng = np.random.default_rng(seed)
    rows = [
        (user, int(item), int(rng.integers(1, 6)), int(rng.integers(9 * 10**8, 9 * 10**8 + 50)))
        for user in range(1, num_users + 1)
        for item in rng.choice(np.arange(1, 40), size=rng.integers(4, 20), replace=False)
    ]
    return [rows[index] for index in rng.permutation(len(rows))]


def write_ml_100k(directory: Path, rows: list[tuple[int, int, int, int]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    people = [(24, "M", "technician", "85711"), (53, "F", "other", "T8H1N"), (9, "F", "writer", "05201")]
    lines = [f"{user}|{'|'.join(map(str, people[user % 3]))}\n" for user in range(1, 13)]
    (directory / "u.user").write_text("".join(lines))
    flags = (
        ["1" if genre in (5, 7) else "0" for genre in range(19)],
        ["1" if genre == 0 else "0" for genre in range(19)],
    )
    movies = [f"{n + 1}|Café {n}|01-Jan-1995||http://x|{'|'.join(flags[n])}\n" for n in range(2)]
    (directory / "u.item").write_text("".join(movies), encoding="latin-1")


def write_ml_1m(directory: Path, rows: list[tuple[int, int, int, int]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    people = [("F", 1, 10, "48067"), ("M", 56, 16, "70072"), ("M", 25, 15, "55117-1234")]
    lines = [f"{user}::{'::'.join(map(str, people[user % 3]))}\n" for user in range(1, 13)]
    (directory / "users.dat").write_text("".join(lines), encoding="latin-1")
    movies = ["1::Misérables, Les (1995)::Drama|Musical\n", '2::Wars: "One"::Action\n', "50::Unseen::Drama\n"]
    (directory / "movies.dat").write_text("".join(movies), encoding="latin-1")


def write_ml_20m(directory: Path, rows: list[tuple[int, int, int, int]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"{user},{item},{rating - 0.5},{time}\n" for user, item, rating, time in rows]
    (directory / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
    movies = '1,"Café, ""the"" first",Comedy|Drama\n2,Second,(no genres listed)\n'
    (directory / "movies.csv").write_text("movieId,title,genres\n" + movies)


def make(
    name: str,
    *directories: Path,
    directory: Path | None = None,
    known: Published | None = None,
    check_counts: bool = False,
    **filters: int,
) -> SequenceDataset:
    """Make a published data set of raw files in the directories; returns it opened."""
    target = directory or directories[0] / "made" / name
    make_published(
        name,
        known or DATASETS[name],
        directories=list(directories),
        download_to=directories[0],
        directory=target,
        progress=Progress(name),
        filters=filters,
        check_counts=check_counts,
    )
    return SequenceDataset.open(target)


def events(dataset: SequenceDataset) -> dict[object, list[tuple]]:
    """Original user -> (original item, action, seconds) of the events in order."""
    everyone = np.arange(dataset.num_users)
    batch = dataset.gather(everyone, np.zeros(len(everyone)), dataset.lengths)
    actions = batch.actions
    if dataset.schema.action.action_type == "categorical":
        actions = dataset.vocabulary(dataset.schema.action.name)[actions]
    columns = dataset.vocabulary("item_id")[batch.items].tolist(), actions.tolist(), batch.times.tolist()
    rows = list(zip(*columns, strict=True))
    ends = np.cumsum(dataset.lengths)
    users = dataset.vocabulary("user_id").tolist()
    return {user: rows[end - number : end] for user, end, number in zip(users, ends, dataset.lengths, strict=True)}


def contexts(dataset: SequenceDataset) -> dict[str, dict]:
    """Context -> original user -> original value."""
    everyone = np.arange(dataset.num_users)
    batch = dataset.gather(everyone, np.zeros(len(everyone)), np.zeros(len(everyone)))
    users = dataset.vocabulary("user_id").tolist()
    return {
        name: dict(zip(users, dataset.vocabulary(name)[ids].tolist(), strict=True))
        for name, ids in batch.contexts.items()
    }


Exposure = tuple[int, int, int, int]  # user, video, milliseconds, mask


def exposures(num_users: int = 6, seed: int = 0) -> list[Exposure]:
    """KuaiRand events in no order, with ties."""
    rng = np.random.default_rng(seed)
    number = 20 * num_users
    columns = (
        rng.integers(0, num_users, number),
        rng.integers(0, 50, number),
        1_649_400_000_000 + rng.integers(0, 40, number) * 700,
        rng.integers(0, 256, number),
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


def write_kuairand(directory: Path, name: str, rows: list[Exposure], users: range = range(6)) -> None:
    """The published files: the events cut into the log files in order, one line for each of the users."""
    known = DATASETS[name]
    directory.mkdir(parents=True, exist_ok=True)
    for number, log in enumerate(known.logs):
        chosen = rows[len(rows) * number // len(known.logs) : len(rows) * (number + 1) // len(known.logs)]
        lines = [",".join(LOG_FIELDS)] + [_exposure_line(*row) for row in chosen]
        (directory / log).write_text("\n".join(lines) + "\n")
    lines = [",".join(USER_FIELDS)]
    for user in users:
        values = dict.fromkeys(USER_FIELDS, "") | {"user_id": str(user), "is_live_streamer": "-124"}
        values |= dict.fromkeys(ENCRYPTED, "4") | {name: str(user + n) for n, name in enumerate(NUMBERS)}
        values |= {"onehot_feat4": "" if user == 2 else "7.0", "register_days": "" if user == 1 else "3"}
        values |= dict(zip(CONTEXTS, kuairand_contexts(user), strict=True))
        lines.append(",".join(f'"{value}"' if "," in value else value for value in values.values()))
    (directory / known.users.name).write_text("\n".join(lines) + "\n")


def kuairand_contexts(user: int) -> tuple[str, ...]:
    """Values of the five contexts; user 3 has an empty one."""
    degree = "" if user == 3 else ("full_active", "high_active")[user % 2]
    return degree, ("(0,10]", "500+")[user % 2], "[1,10)", ("0", "[5,30)")[user % 2], "730+"


def _exposure_line(user: int, video: int, time_ms: int, mask: int) -> str:
    values = dict.fromkeys(LOG_FIELDS, "7") | {"user_id": user, "video_id": video, "time_ms": time_ms}
    values |= {event: int(bool(mask & bit)) for event, bit in EVENTS.items()}
    return ",".join(map(str, values.values()))


def write_amazon(path: Path, rows: list[tuple[str, str, float, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
