"""Answers of a model that was exported with --format torch-export. Needs torch and numpy alone; copy it anywhere.

model = Model("folder")
history = {"item": ["i1", "i7"], "time": [1700000000, 1700000060], "country": "NL"}  # columns of events, oldest first
model.recommend([history], k=10)  # retrieval: the best (item, score) of each
model.score([history], [{"item": ["i3", "i4"]}])  # ranking: [candidates, scores] of each; model.about names them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

SAMPLES, ITEMS = 32, 1 << 14  # run at once
Columns = dict[str, Any]
"""Of a history or of candidates: a list for each column, of a feature of the user one value; None where missing."""


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Map the float32 tensors of a safetensors file into memory."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places = {name: (8 + size + own["data_offsets"][0], tuple(own["shape"])) for name, own in header.items()}
    return {name: np.memmap(path, np.float32, "r", first, shape) for name, (first, shape) in places.items()}


class Model:
    """A model in ``folder``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = self._read("export.json")
        self.item, self.time = self.about["item"], self.about["time"]
        self.features, self.tables = self.about["features"], read_tensors(self.folder / "tables.safetensors")
        words = {name: self._read(feature["words"]) for name, feature in self.features.items() if feature["words"]}
        self.ids = {name: {word: n for n, word in enumerate(own) if word is not None} for name, own in words.items()}
        self.items = words[self.item]
        self._programs: dict[str, Any] = {}

    def _read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def _run(self, name: str, **inputs: Any) -> torch.Tensor:
        if name not in self._programs:
            compiled, program = self.folder / f"{name}.aoti.pt2", self.folder / f"{name}.pt2"
            aoti = torch._inductor.aoti_load_package if compiled.exists() else None
            self._programs[name] = aoti(str(compiled)) if aoti else torch.export.load(program).module()
        return self._programs[name](**inputs)

    def _places(self, name: str, words: list[Any]) -> list[int]:
        unknown = self.features[name]["unknown"]
        places = [self.ids[name].get(word, unknown) for word in words]
        if None in places:
            raise ValueError(f"{name}: {words[places.index(None)]!r} is not known to the model")
        return places

    def _encode(self, name: str, values: list[Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return rows of the table, and how many each value has; or numbers, and None."""
        feature, known = self.features[name], self.ids.get(name)
        if known is None:
            numbers = [np.broadcast_to(np.nan if value is None else value, feature["width"]) for value in values]
            return np.array(numbers, np.float32).reshape(-1, feature["width"]), None
        if feature["kind"] != "multi":
            return self.tables[name][np.array(self._places(name, values), np.int64)], np.ones(len(values), np.int64)
        sets = [[known[word] for word in dict.fromkeys(value or ()) if word in known] for value in values]
        return self.tables[name][np.array(sum(sets, []), np.int64)], np.array([len(own) for own in sets], np.int64)

    def _values(self, name: str, history: Columns, question: Columns, seen: range, asked: int) -> list[Any]:
        """Return a feature of the events that are seen, then of those that are asked about; or of the user."""
        feature, none = self.features[name], [None] * asked
        if feature["level"] == "user":
            return [history.get(name)]
        past = history.get(name, [None] * len(history[self.item]))
        if len(past) != len(history[self.item]):
            raise ValueError(f"{name}: has {len(past)} values, {self.item} has {len(history[self.item])}")
        if feature["asked"] == "given":
            none = question.get(name, none)
        elif feature["asked"] == "first":  # an action that nobody looks at
            none = [next(iter(self.ids[name]))] * asked
        return [past[event] for event in seen] + ([] if feature["asked"] == "absent" else list(none))

    def _seen(self, history: Columns) -> range:
        events = range(len(history[self.item]))[self.about["start"] : self.about["end"]]
        return events[-self.about["max_history"] :]

    def pack(self, samples: list[tuple[Columns, Columns]], time: int | None) -> dict[str, Any]:
        """Return the inputs of the dense program for histories and what is asked about after each."""
        inputs: dict[str, Any] = {"rows": {}, "lengths": {}, "sets": {}, "numbers": {}}
        seen = [self._seen(history) for history, _ in samples]
        asked = np.array([len(question[self.item]) for _, question in samples])
        for name, feature in self.features.items():
            own = [self._values(name, *pair, *n) for pair, *n in zip(samples, seen, asked.tolist(), strict=True)]
            rows, sizes = self._encode(name, sum(own, []))
            inputs["numbers" if sizes is None else "rows"][name] = rows
            if sizes is not None:
                inputs["lengths"][name] = np.diff(np.append(0, sizes.cumsum())[np.cumsum([0, *map(len, own)])])
                if (feature["kind"], feature["level"]) == ("multi", "event"):
                    inputs["sets"][name] = sizes
        times: list[int] = []
        for (history, _), events, number in zip(samples, seen, asked, strict=True):
            clock = history[self.time] if self.time else [0] * len(history[self.item])
            now = max(clock, default=0) if time is None else time
            if now < max(clock, default=now):
                raise ValueError(f"the request time {now} lies before the last event of a history, {max(clock)}")
            times += [clock[event] for event in events] + [now] * number
        lengths = np.array([len(own) for own in seen]) + asked
        ends = lengths.cumsum()
        each = [np.arange(end - number, end) for end, number in zip(ends, asked, strict=True)]
        inputs["asked"] = ends - 2 if self.about["task"] == "retrieval" else np.concatenate(each)
        inputs["times"], inputs["candidates"] = np.array(times), asked * self.about["asked_are_candidates"]
        inputs["places"] = np.arange(self.about["context_tokens"] + self.about["tokens_per_event"] * lengths.max())
        return torch.utils._pytree.tree_map(torch.from_numpy, inputs)

    def _answers(self, samples: list[tuple[Columns, Columns]], time: int | None) -> np.ndarray:
        starts = range(0, len(samples), SAMPLES)
        parts = [self._run("dense", **self.pack(samples[start : start + SAMPLES], time)) for start in starts]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def recommend(
        self,
        histories: list[Columns],
        k: int = 10,
        items: list[Any] | None = None,
        filter_seen: bool | None = None,
        request_time: int | None = None,
    ) -> list[list[tuple[Any, float]]]:
        """Return the k best (item, score) for each history, best first; of ``items`` alone, if they are given."""
        best: list[list[tuple[Any, float]]] = [[] for _ in histories]
        asking = [number for number, history in enumerate(histories) if self._seen(history)]
        if not asking:
            return best
        samples = [(histories[number], {self.item: self.items[:1]}) for number in asking]
        queries, vectors = torch.from_numpy(self._answers(samples, request_time)), self.tables["__items"]
        parts = [torch.from_numpy(vectors[start : start + ITEMS].copy()) for start in range(0, len(vectors), ITEMS)]
        scores = torch.cat([self._run("similarity", queries=queries, items=part) for part in parts], 1).numpy()
        refused = np.full(len(vectors), items is not None)
        refused[[] if items is None else self._places(self.item, items)] = False
        for number, own in zip(asking, scores, strict=True):
            own[refused] = -np.inf
            if self.about["filter_seen"] if filter_seen is None else filter_seen:
                own[self._places(self.item, histories[number][self.item])] = -np.inf
            order = [place for place in np.argsort(-own, kind="stable")[:k] if own[place] > -np.inf]
            best[number] = [(self.items[place], float(own[place])) for place in order]
        return best

    @torch.no_grad()
    def score(
        self, histories: list[Columns], candidates: list[Columns], request_time: int | None = None
    ) -> list[np.ndarray]:
        """Return an array [candidates, scores] for each history and the columns of its candidates."""
        sizes = [len(question[self.item]) for question in candidates]
        samples = list(zip(histories, candidates, strict=True))
        if not self.about["together"]:  # a candidate would change what is said of the others
            samples = [
                (history, {name: values[i : i + 1] for name, values in question.items()})
                for history, question in samples
                for i in range(len(question[self.item]))
            ]
        return np.split(self._answers(samples, request_time), np.cumsum(sizes)[:-1])
