"""One checkpoint that answers: its catalogue held once, stored memory, caches of users, and batches of questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hstu.data.requests import Requests
from hstu.data.seen import seen_before
from hstu.data.values import Values, concatenate, take
from hstu.inference.memory import MemoryStore, StoredMemory
from hstu.inference.opened import Opened
from hstu.inference.prediction_requests import Controls, PredictionRequests, score_names
from hstu.inference.recommend import (
    best_items,
    catalogue_part,
    item_scores,
    score_candidates,
    similar_items,
    user_vectors,
)
from hstu.metrics.topk import TopK
from hstu.models import RankingModel, RetrievalModel
from hstu.serving.caches import UserCaches
from hstu.serving.questions import Asker, BestItems, Limits, Question, Questions, Scores, SimilarItems, histories_of

Answer: TypeAlias = list[dict[str, Any]]
_Kind = TypeVar("_Kind", BestItems, Scores, SimilarItems)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a checkpoint answers.

    Attributes:
        memory: Directory of stored memory; None: whole histories are run.
        cache_bytes: Of keys and values of users who had events since; 0: none are kept.
        limits: Of a request.
    """

    memory: Path | None = None
    cache_bytes: int = 256 << 20
    limits: Limits = field(default_factory=Limits)


class ServedModel:
    """Answers questions to a run, many at once; one thread at a time may ask, any may read what clients ask.

    Args:
        opened: The run.
        options: How it answers.

    Attributes:
        questions: Reads what clients ask.
        ways: Requests answered from a "cache", from "memory", and by running the "whole" history.

    Raises:
        ValueError: if the memory is of something else.
    """

    def __init__(self, opened: Opened, options: ModelOptions) -> None:
        self.opened, self.options, self.step = opened, options, opened.step
        self.mesh = opened.assembly.mesh
        # A batch is there at once: a thread that reads ahead, or processes, would cost more than they save.
        self.loader = replace(opened.loader, num_workers=0)
        self.questions = Questions(opened, options.limits)
        model, self.ways = opened.model, Counter[str]()
        self.catalogue, self.caches = None, None
        if isinstance(model, RetrievalModel):
            self.catalogue = catalogue_part(model, self.loader, self.mesh)
            self.caches = UserCaches(opened, options.cache_bytes)
        else:
            model.eval()
        self.store = None if options.memory is None else MemoryStore(opened, "future", options.memory)
        self._controls = Controls.read(opened.dataset, ())
        self._score_names = score_names(opened)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Return the answer to each question: none at all where there is no history to go by."""
        out: list[Answer] = [[] for _ in questions]

        def fill(kind: type[_Kind], answers: Callable[[list[_Kind]], list[Answer]]) -> None:
            chosen = [(n, q) for n, q in enumerate(questions) if isinstance(q, kind) and _has_history(q)]
            if chosen:
                for (n, _), answer in zip(chosen, answers([q for _, q in chosen]), strict=True):
                    out[n] = answer

        fill(BestItems, self._recommend)
        fill(Scores, self._score)
        fill(SimilarItems, self._similar)
        return out

    def _recommend(self, questions: Sequence[BestItems]) -> list[Answer]:
        askers = [question.asker for question in questions]
        requests = self._requests(askers)
        out: list[Answer] = [[] for _ in questions]
        for numbers, queries in self._queries(askers):
            for places in _alike([questions[n].items for n in numbers]):
                rows = numbers[places]
                best = self._best(requests, rows, queries[places], [questions[n] for n in rows])
                for row, record in _records(requests.recommendations(rows, best)):
                    if record.pop("rank") <= questions[row].k:
                        out[row].append(record)
        return out

    def _best(self, requests: PredictionRequests, rows: Tensor, queries: Tensor, asked: Sequence[BestItems]) -> TopK:
        """Return the best items of ``rows`` [Q], of which all may return the same ones."""
        model = self.opened.model
        assert isinstance(model, RetrievalModel) and self.catalogue is not None
        keep = seen = None
        if (items := asked[0].items) is not None:
            keep = torch.zeros(model.num_items, dtype=torch.bool, device=queries.device)
            keep[items.to(queries.device)] = True
        filters = torch.tensor([question.filter_seen for question in asked], device=queries.device)
        if filters.any():
            owner, met = seen_before(requests.dataset, requests.split, rows)
            owner, met = owner.to(queries.device), met.to(queries.device)
            seen = owner[filters[owner]], met[filters[owner]]
        most = min(max(question.k for question in asked), model.num_items)
        return best_items(model, self.mesh, queries, self.catalogue, most, seen=seen, keep=keep)

    def _score(self, questions: Sequence[Scores]) -> list[Answer]:
        counts = [len(question.items) for question in questions]
        owner = np.repeat(np.arange(len(questions)), counts)
        items = np.concatenate([question.items for question in questions])
        names = questions[0].features.keys()
        features = {name: concatenate([question.features[name] for question in questions]) for name in names}
        pairs = _Pairs([question.asker for question in questions], owner, items, features)
        found = dict(self._ranked(pairs) if self.catalogue is None else self._similarities(pairs))
        return [
            [found[row] for row in np.flatnonzero(owner == n).tolist() if row in found] for n in range(len(questions))
        ]

    def _similarities(self, pairs: _Pairs) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the answer to each of ``pairs`` of a retrieval run, with its number."""
        model, device = self.opened.model, self.mesh.device
        assert isinstance(model, RetrievalModel) and self.catalogue is not None
        requests = self._requests(pairs.askers, pairs)
        for numbers, queries in self._queries(pairs.askers):
            place = torch.full((len(pairs.askers),), -1)
            place[numbers] = torch.arange(len(numbers))
            rows = (place[torch.from_numpy(pairs.owner)] >= 0).nonzero().squeeze(1)
            mine = queries[place[torch.from_numpy(pairs.owner)[rows]].to(device)]
            scores = item_scores(model, self.mesh, mine, torch.from_numpy(pairs.items)[rows].to(device), self.catalogue)
            yield from _records(requests.scores(rows, scores))

    def _ranked(self, pairs: _Pairs) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the answer to each of ``pairs`` of a ranking run, with its number."""
        assert isinstance(self.opened.model, RankingModel)
        for numbers, way in self._ways(pairs.askers):
            rows, some = pairs.of(numbers)
            requests = self._requests(some.askers, some)
            memory = self._memory(some.askers, requests, some.owner) if way == "memory" else None
            loader = replace(self.loader, dataset=requests.dataset, split=requests.split)
            for found, scores in score_candidates(self.opened.model, loader, self.mesh, memory):
                yield from ((int(rows[row]), record) for row, record in _records(requests.scores(found, scores)))

    def _similar(self, questions: Sequence[SimilarItems]) -> list[Answer]:
        model = self.opened.model
        assert isinstance(model, RetrievalModel) and self.catalogue is not None
        items = torch.cat([question.items for question in questions])
        most = min(max(question.k for question in questions), model.num_items)
        best = similar_items(model, self.mesh, items.to(self.mesh.device), self.catalogue, most).cpu()
        names = self.questions.items.originals
        out, row = list[Answer](), 0
        for question in questions:
            answer: Answer = []
            for item in question.items.tolist():
                known = best.items[row, : question.k] >= 0
                near, scores = best.items[row, : question.k][known], best.scores[row, : question.k][known]
                pairs = zip(names.take(pa.array(near.numpy())).to_pylist(), scores.tolist(), strict=True)
                answer.append({"item": names[item].as_py(), "similar": [{"item": i, "score": s} for i, s in pairs]})
                row += 1
            out.append(answer)
        return out

    def _queries(self, askers: Sequence[Asker]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield numbers of askers [Q] int64 in host memory, and what scores items for them; not of the silent."""
        model = self.opened.model
        assert isinstance(model, RetrievalModel) and self.caches is not None
        for numbers, way in self._ways(askers):
            some = [askers[n] for n in numbers]
            if way == "cache":
                yield torch.from_numpy(numbers), self.caches.queries(some)
                continue
            requests = self._requests(some)
            memory = self._memory(some, requests, np.arange(len(some))) if way == "memory" else None
            loader = replace(self.loader, dataset=requests.dataset, split=requests.split)
            for rows, queries in user_vectors(model, loader, self.mesh, memory):
                if rows.numel():
                    yield torch.from_numpy(numbers)[rows.cpu()], queries

    def _ways(self, askers: Sequence[Asker]) -> Iterator[tuple[np.ndarray, str]]:
        """Yield numbers of askers, int64 [n] ascending, and how their histories are taken in."""
        stored = np.zeros(len(askers), bool)
        for mine in [] if self.store is None else _distinct([asker.row for asker in askers]):
            some = [askers[n] for n in mine]
            memory = self._memory(some, self._requests(some), np.arange(len(some)))
            found = mine[memory.gaps[memory.user_of] >= 0]
            stored[found] = True
            yield from self._counted(found, "memory")
        cached = np.array([self.caches is not None and self.caches.has_use(asker) for asker in askers]) & ~stored
        yield from self._counted(np.flatnonzero(cached), "cache")
        yield from self._counted(np.flatnonzero(~cached & ~stored), "whole")

    def _counted(self, numbers: np.ndarray, way: str) -> Iterator[tuple[np.ndarray, str]]:
        if numbers.size:
            self.ways[way] += numbers.size
            yield numbers, way

    def _memory(self, askers: Sequence[Asker], requests: PredictionRequests, owner: np.ndarray) -> StoredMemory:
        """Return the stored memory of distinct users of the data set, whom ``owner`` [R] tells of each request."""
        assert self.store is not None
        users = self.questions.users.originals.take(pa.array([askers[n].row for n in owner]))
        return StoredMemory(self.store, replace(requests, users=users))

    def _requests(self, askers: Sequence[Asker], pairs: _Pairs | None = None) -> PredictionRequests:
        """Return a request of each of ``askers`` or, of ``pairs``, of each; their users are the numbers of requests."""
        owner = np.arange(len(askers)) if pairs is None else pairs.owner
        times = np.array([asker.time for asker in askers], np.int64)[owner]
        items, features = (None, {}) if pairs is None else (pairs.items, pairs.features)
        asked = Requests(histories_of(self.opened.dataset, askers), owner, items, times, features)
        return PredictionRequests(
            dataset=asked,
            split=asked.split,
            users=pa.array(np.arange(len(owner))),
            vocabulary=self.questions.items.originals,
            held_out=False,
            pairs=items,
            score_names=self._score_names,
            label_features=(),
            controls=self._controls,
        )


@dataclass(frozen=True)
class _Pairs:
    """Items that are to be scored for ``askers``: ``owner`` [R] int64 tells whose each is."""

    askers: list[Asker]
    owner: np.ndarray
    items: np.ndarray
    features: dict[str, Values]

    def of(self, numbers: np.ndarray) -> tuple[np.ndarray, _Pairs]:
        """Return those of some askers, int64 [n] ascending, and before them which these are."""
        rows = np.flatnonzero(np.isin(self.owner, numbers))
        features = {name: take(values, rows) for name, values in self.features.items()}
        owner = np.searchsorted(numbers, self.owner[rows])
        return rows, _Pairs([self.askers[n] for n in numbers], owner, self.items[rows], features)


def _records(columns: dict[str, pa.Array]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of the request and the columns of each row, without that of the user, which is the number."""
    for record in pa.table(columns).to_pylist():
        yield record.pop("user"), record


def _alike(items: Sequence[Tensor | None]) -> list[Tensor]:
    """Return places of ``items``, those of the same ones together, int64 [n] each."""
    places: dict[bytes | None, list[int]] = {}
    for place, some in enumerate(items):
        places.setdefault(None if some is None else some.numpy().tobytes(), []).append(place)
    return [torch.tensor(group) for group in places.values()]


def _distinct(rows: Sequence[int]) -> list[np.ndarray]:
    """Return places of rows that are not -1, in parts that name no row twice, int64 [n] ascending each."""
    parts, found = list[list[int]](), Counter[int]()
    for place, row in enumerate(rows):
        if row >= 0:
            if found[row] == len(parts):
                parts.append([])
            parts[found[row]].append(place)
            found[row] += 1
    return [np.array(part) for part in parts]


def _has_history(question: Question) -> bool:
    return isinstance(question, SimilarItems) or question.asker.has_history
