"""Answers of a model that was exported with --format torch-export. Needs torch and numpy alone; copy it anywhere.

model = Model("folder")
history = {"item": ["i1", "i7"], "time": [1700000000, 1700000060], "country": "NL"}  # columns of events, oldest first
model.recommend(history, k=10)  # retrieval: the best (item, score)
model.score(history, {"item": ["i3", "i4"]})  # ranking: an array [candidates, scores]; model.about names the scores
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

Columns = dict[str, Any]  # of what events have a list, of what the user has a value; None where it is missing


class Model:
    """The programs, tables and words in ``folder``."""

    def __init__(self, folder: str | Path) -> None:
        self.about, self.words = (json.loads(Path(folder, f"{n}.json").read_text("utf-8")) for n in ("export", "words"))
        self.ids = {name: {word: n for n, word in enumerate(own)} for name, own in self.words.items()}
        for name in (name for name, own in self.about["columns"].items() if own["kind"] == "set"):
            self.ids[name].pop(None, None)  # members that training never met leave their sets
        raw, self.tables = np.memmap(Path(folder, "tables.safetensors"), np.uint8, "c"), {}
        start = 8 + int(raw[:8].view(np.int64)[0])  # behind the size of the header, and the header
        for name, own in json.loads(bytes(raw[8:start])).items():
            numbers = raw[start:][slice(*own["data_offsets"])].view(np.float32)
            self.tables[name] = torch.from_numpy(numbers).view(own["shape"])
        self.programs = {name: self.load(str(Path(folder, own))) for name, own in self.about["programs"].items()}

    def load(self, path: str) -> Any:
        """Load a program, or what was compiled of it."""
        return torch._inductor.aoti_load_package(path) if self.about["compiled"] else torch.export.load(path).module()

    def known(self, name: str, words: list[Any]) -> list[Any]:
        """Return the id of each word; of one that is not known that of None, where the column has it."""
        ids = [self.ids[name].get(word, self.ids[name].get(None)) for word in words]
        if None in ids:
            raise ValueError(f"{name}: {words[ids.index(None)]!r} is not known to the model")
        return ids

    def encode(self, name: str, kind: Any, values: list[Any]) -> list[torch.Tensor]:
        """Return times; ids; the ids of sets, and how many each has; or numbers, as many of each as the kind says."""
        if kind in ("time", "word"):
            return [torch.tensor(values if kind == "time" else self.known(name, values))]
        if kind == "set":
            ids = self.ids[name]
            sets = [[ids[word] for word in dict.fromkeys(own or ()) if word in ids] for own in values]
            return [torch.tensor(sum(sets, [])).long(), torch.tensor([len(own) for own in sets])]
        rows = [np.full(kind, np.nan if own is None else own, np.float32) for own in values]
        return [torch.from_numpy(np.stack(rows))]

    def pack(self, history: Columns, asked: Columns, time: int | None = None) -> dict[str, Any]:
        """Return the inputs of the dense program: of the newest events that it looks at, and of what is asked about."""
        about, items, number = self.about, history[self.about["item"]], len(asked[self.about["item"]])
        columns: Columns = {}
        newest = max(history[about["time"]] if about["time"] else (), default=time or 0)
        if time is not None and time < newest:
            raise ValueError(f"the request time {time} lies before the last event of the history, {newest}")
        asked = asked | {about["time"]: [newest if time is None else time] * number}
        for name, own in about["columns"].items():
            values = [history.get(name)] if own["of"] == "user" else history.get(name, [None] * len(items))
            if own["of"] == "event":
                if len(values) != len(items):
                    raise ValueError(f"{name}: has {len(values)} values, {about['item']} has {len(items)}")
                given = asked.get(name) if own["given"] else None
                values = values[about["start"] : about["stop"]][-about["most"] :] + (given or [own["default"]] * number)
            columns[name] = self.encode(name, own["kind"], values)
        places = torch.arange(len(columns[about["item"]][0]))
        lengths = {"lengths": torch.tensor([len(places)]), "candidates": torch.tensor([number]), "longest": places}
        asked_places = {"past": places[:-number], "asked": places[-number:]}
        return lengths | asked_places | {"tables": self.tables, "columns": columns}

    def recommend(
        self, history: Columns, k: int = 10, items: Any = None, filter_seen: Any = None, request_time: Any = None
    ) -> list[tuple[Any, float]]:
        """Return the k best (item, score), best first; of the list ``items`` alone, if it is given."""
        name, words = self.about["item"], self.words[self.about["item"]]
        if not history[name]:
            return []
        query = self.programs["dense"](**self.pack(history, {name: words[:1]}, request_time))
        parts = self.tables["__items"].split(1 << 14)
        scores = torch.cat([self.programs["similarity"](queries=query, items=part)[0] for part in parts]).numpy()
        chosen = np.arange(len(words)) if items is None else np.unique(self.known(name, items))
        if self.about["filter_seen"] if filter_seen is None else filter_seen:
            chosen = np.setdiff1d(chosen, self.known(name, history[name]))
        best = chosen[np.argsort(-scores[chosen], kind="stable")[:k]]
        return [(words[n], float(scores[n])) for n in best]

    def score(self, history: Columns, candidates: Columns, request_time: int | None = None) -> np.ndarray:
        """Return an array [candidates, scores]."""
        number = len(candidates[self.about["item"]])
        each = number if self.about["together"] else 1  # at once: more would change what is said of each
        slates = [{name: own[n : n + each] for name, own in candidates.items()} for n in range(0, number, each)]
        return torch.cat([self.programs["dense"](**self.pack(history, own, request_time)) for own in slates]).numpy()
