"""The command, run as a user runs it, and MovieLens files in the published layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Run preprocessor.py from another directory, without the repository on the path."""

    def run(*flags: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        words = [sys.executable, ROOT / "preprocessing" / "preprocessor.py", *flags]
        return subprocess.run(
            [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
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


def write_ml_1m(directory: Path, rows: list[tuple[int, int, int, int]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ratings.dat").write_text("".join("::".join(map(str, row)) + "\n" for row in rows))
    people = [("F", 1, 10, "48067"), ("M", 56, 16, "70072"), ("M", 25, 15, "55117-1234")]
    lines = [f"{user}::{'::'.join(map(str, people[user % 3]))}\n" for user in range(1, 13)]
    (directory / "users.dat").write_text("".join(lines), encoding="latin-1")
    # Not read, but in the archive, and not UTF-8.
    (directory / "movies.dat").write_text("1::Misérables, Les (1995)::Drama\n", encoding="latin-1")


def write_ml_20m(directory: Path, rows: list[tuple[int, int, int, int]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"{user},{item},{rating - 0.5},{time}\n" for user, item, rating, time in rows]
    (directory / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "".join(lines))
