"""What a page says of a run: read from its directory, and asked of its model."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hstu.config import read_settings
from hstu.inference.attention import attention_pictures
from hstu.inference.run import Run
from hstu.training.run_directory import RunDirectory

NEWEST = 8  # events of a history that are shown
DRAWN = 128  # events of the longest history whose attention is
_SPEED = {
    "tokens_per_second": "tokens a second",
    "sequences_per_second": "sequences a second",
    "data_wait_share": "share of the time that waits for data",
    "mfu": "share of the peak arithmetic (MFU)",
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A run, by what its directory holds.

    Attributes:
        name: Of the directory.
        path: Of the directory.
        records: Lines of ``metrics.jsonl``.
        test: ``eval.json``; empty before the end.
        baselines: Name -> metrics, from ``baselines.json``.
        settings: ``Class.field`` -> value, as text.
        speed: What -> number, as text.
        pictures: Files in ``figures`` that show attention.
    """

    name: str
    path: Path
    records: list[dict[str, Any]]
    test: dict[str, Any]
    baselines: dict[str, dict[str, float | None]]
    settings: dict[str, str]
    speed: dict[str, str]
    pictures: list[Path] = field(default_factory=list)


def read_facts(path: Path) -> Facts:
    """Read a run directory.

    Raises:
        ValueError: if there is no run in it, or one of its files is damaged.
    """
    run = RunDirectory(path.resolve())
    if not (run.path / "operative.gin").is_file():
        raise ValueError(f"{path}: holds no run (no operative.gin); give the directory of one")
    records = run.records()
    return Facts(
        name=run.path.name,
        path=run.path,
        records=records,
        test=_json(run.path / "eval.json"),
        baselines=_json(run.path / "baselines.json").get("baselines", {}),
        settings=read_settings(run.path / "operative.gin"),
        speed=_speed(records),
        pictures=sorted(run.figures.glob("attention*.png")),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}); write it again, or remove it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: is damaged (no object); write it again, or remove it")
    return found


def _speed(records: list[dict[str, Any]]) -> dict[str, str]:
    """Return medians over the lines of training, and the most memory."""
    train = [record for record in records if record["kind"] == "train"]
    found = {"steps": f"{max(record['step'] for record in train):,}"} if train else {}
    for key, what in _SPEED.items():
        values = [record[key] for record in train if key in record]
        if values:
            middle = statistics.median(values)
            found[what] = f"{middle:.1%}" if key in ("data_wait_share", "mfu") else f"{middle:,.0f}"
    memory = [record["memory_gib"] for record in train if "memory_gib" in record]
    return found | ({"most memory": f"{max(memory):.2f} GiB"} if memory else {})


@dataclass(frozen=True, kw_only=True)
class Example:
    """A test event: who, after what, what it was, and what the model said.

    Attributes:
        user: Original id.
        length: Events before it.
        history: The newest of them, newest last: items.
        target: The item of the event.
        answers: Of retrieval: item and score, best first. Of ranking: what is predicted and the number.
        action: Of ranking, what happened.
        attention: A PNG file: who attends to whom, where the backbone shows it and the history is short enough.
    """

    user: str
    length: int
    history: list[str]
    target: str
    answers: list[tuple[str, float]]
    action: str | None = None
    attention: bytes | None = None


def examples(run: Run, count: int, k: int) -> list[Example]:
    """Return test events of ``count`` users, from short histories to long ones."""
    opened = run._opened
    dataset, split = opened.dataset, opened.assembly.loaders["test"].split
    order = np.argsort(split.stop, kind="stable")
    _, first = np.unique(split.users[order], return_index=True)
    rows = order[np.sort(first)]
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))]
    users, stop = split.users[rows], split.stop[rows] - 1
    names = dataset.vocabulary(dataset.schema.user.name)[users].tolist()
    items = dataset.vocabulary(dataset.schema.item.name)
    seen = dataset.gather(users, np.maximum(stop - NEWEST, 0), stop)
    target = dataset.gather(users, stop, stop + 1)
    ends = np.cumsum(seen.lengths)
    answers = _answers(run, names, stop, k)
    pictures = attention_pictures(opened, split, rows, DRAWN)
    return [
        Example(
            user=str(names[n]),
            length=int(stop[n]),
            history=[str(items[item]) for item in seen.items[ends[n] - seen.lengths[n] : ends[n]]],
            target=str(items[target.items[n]]),
            answers=answers.get((names[n], int(stop[n])), []),
            action=_action(run, target.actions, n),
            attention=pictures[n],
        )
        for n in range(len(rows))
    ]


def _answers(run: Run, users: list[Any], events: np.ndarray, k: int) -> dict[tuple[Any, int], list[tuple[str, float]]]:
    table = run.held_out(users, k=k)
    wanted = set(zip(users, events.tolist(), strict=True))
    found: dict[tuple[Any, int], list[tuple[str, float]]] = {}
    scores = [name for name in table.columns if name == "score" or name.startswith("score_")]
    for row in table.iter_rows(named=True):
        key = row["user"], row["event"]
        if key in wanted:
            given = [(str(row["item"]), row["score"])] if "rank" in row else [
                (name.removeprefix("score").lstrip("_") or "score", row[name]) for name in scores
            ]  # fmt: skip
            found.setdefault(key, []).extend(given)
    return found


def _action(run: Run, actions: np.ndarray | None, place: int) -> str | None:
    action = run._opened.dataset.schema.action
    if run.task == "retrieval" or action is None or actions is None:
        return None
    value = int(actions[place])
    if action.action_type == "bitmask":
        bits = action.bits or tuple(map(str, range(64)))
        return "+".join(name for bit, name in enumerate(bits) if value >> bit & 1) or "none"
    return str(run._opened.dataset.vocabulary(action.name)[value])
