"""A trained run from Python: recommendations, scores, vectors, evaluation, as tables in original ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import pyarrow as pa
import torch
from torch import Tensor

from hstu.config import Config
from hstu.data.vocabulary import Index
from hstu.inference.answers import AnswerOptions, Recommended, scored, stored_memory
from hstu.inference.baselines import compare_with_baselines
from hstu.inference.export import ExportOptions, Format, export
from hstu.inference.frames import Kind, kind_of, to_frame, to_polars
from hstu.inference.opened import Opened, open_trained
from hstu.inference.output import vector_column
from hstu.inference.prediction_requests import RequestSpec, history_columns, make_prediction_requests
from hstu.inference.recommend import CataloguePart, catalogue_part, similar_items, user_vectors
from hstu.models import RetrievalModel
from hstu.parallel import Mesh

if TYPE_CHECKING:
    from hstu.inference.frames import Frame

_QUERIES = 1 << 12  # items whose neighbours are looked for at once


def open_run(
    run_dir: str | Path,
    checkpoint: str = "best",
    *,
    frames: Kind = "pandas",
    bindings: Sequence[str] | dict[str, Any] = (),
) -> Run:
    """Open a trained run; as many as fit into memory can be open at once, in one interpreter.

    Args:
        run_dir: A run directory.
        checkpoint: latest, best, a step, or the path of a checkpoint.
        frames: Whose tables answers are: those of "pandas" or of "polars".
        bindings: Gin lines, or a dict of ``"Class.field"`` to value, that win over the run's config.

    Raises:
        ValueError: if there is no run, checkpoint or data set, or they do not fit together.
    """
    if frames not in ("pandas", "polars"):
        raise ValueError(f"frames = {frames!r}: must be 'pandas' or 'polars'")
    if isinstance(bindings, dict):
        bindings = [f"{name} = {value!r}" for name, value in bindings.items()]
    return Run(open_trained(run_dir, checkpoint, list(bindings), Mesh.of_process()), frames)


class Run:
    """A trained model and its data set, made by :func:`open_run` or ``hstu.fit``.

    Answers are tables in original ids. Under torchrun every rank calls the same methods and gets the same answers.
    One thread at a time may ask.

    Args:
        opened: What was opened.
        frames: Whose tables answers are, where the question is no table.
    """

    def __init__(self, opened: Opened, frames: Kind = "pandas") -> None:
        self._opened, self.frames = opened, frames

    def __repr__(self) -> str:
        return f"<hstu.Run {self.task} {str(self.path)!r}, step {self.step}>"

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._opened.run.path

    @property
    def task(self) -> Literal["ranking", "retrieval"]:
        """What the model was trained for."""
        return self.config.task

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self._opened.step

    @property
    def config(self) -> Config:
        """Every value that applies."""
        return self._opened.config

    @property
    def scores(self) -> dict[str, float | None]:
        """The test scores of the best checkpoint, from ``eval.json``; empty before the end of training."""
        path = self.path / "eval.json"
        return dict(json.loads(path.read_text())["metrics"]) if path.is_file() else {}

    def recommend(
        self,
        users: Iterable[Any] | None = None,
        *,
        histories: Frame | None = None,
        k: int = 10,
        items: Iterable[Any] | None = None,
        filter_seen: bool | None = None,
        trained_only: bool = False,
        approximate: int | None = None,
        split: Literal["future", "test", "valid"] = "future",
        memory: str | Path | None = None,
        refresh: bool = False,
        **asked: Any,
    ) -> Frame:
        """Return the best items of each user: a table with columns user, rank (from 1), item, score.

        They are those that evaluation would rank first; users without any history get none.

        Args:
            users: Users of the data set; None: all of them.
            histories: In their place, events of users that the data set need not know, one a row, with the columns
                that the data set was made of.
            k: Items per user.
            items: The items that may be returned; None: the whole catalogue.
            filter_seen: Leave out what the user has met; None: as the run was evaluated.
            trained_only: Leave out items that no training sample shows.
            approximate: Of a mixture of logits: score only the items that a dot product puts first, so many.
            split: "test" and "valid" ask before the event that evaluation holds out, which stands in ``target``.
            memory: Directory of ``python -m hstu.cli.memory``: old events are answered from it and not run again.
            refresh: First make memory that is missing or stale.
            **asked: ``request_time`` (seconds, an ISO date, a datetime or "now"), ``unknown_items`` ("error", "drop"),
                ``user_column`` and the like, ``time_format``, ``missing``: see ``RequestSpec``.

        Raises:
            ValueError: for a user or item that is not known, a malformed table, memory of something else, and a ranking
            run.
        """
        self._require_retrieval("recommend", "score")
        chosen = None if items is None else self._item_ids(items)
        options = AnswerOptions(
            top_k=k,
            approximate=approximate,
            trained_only=trained_only,
            filter_seen=filter_seen,
            candidates=chosen,
            memory=None if memory is None else Path(memory),
            refresh=refresh,
        )
        options.check(self._opened)
        requests = make_prediction_requests(self._spec(users, histories, split=split, **asked), self._opened)
        stored = stored_memory(self._opened, requests, split, options)
        answers = Recommended(self._opened, requests, options, self._catalogue, stored)
        columns = {"user": pa.null(), "rank": pa.int32(), "item": pa.null(), "score": pa.float32()}
        return to_frame(list(answers), columns, self._kind(histories))

    def score(
        self,
        pairs: Frame,
        *,
        histories: Frame | None = None,
        memory: str | Path | None = None,
        refresh: bool = False,
        **asked: Any,
    ) -> Frame:
        """Score pairs of user and item, in their order: a table with columns user, item, score.

        Of a ranking run the probabilities of the actions, ``score_<name>`` each where there are several; of a retrieval
        run the similarity that items are ranked by. Pairs of users without any history are left out.

        Args:
            pairs: One a row, in the columns that the data set was made of.
            histories: As in :meth:`recommend`.
            memory: As in :meth:`recommend`.
            refresh: As in :meth:`recommend`.
            **asked: As in :meth:`recommend`.

        Raises:
            ValueError: for a user or item that is not known, and for a malformed table.
        """
        options = AnswerOptions(memory=None if memory is None else Path(memory), refresh=refresh)
        options.check(self._opened)
        spec = self._spec(None, histories, **asked)
        spec = replace(spec, candidates=to_polars(pairs, "pairs"))
        requests = make_prediction_requests(spec, self._opened)
        catalogue = self._catalogue if isinstance(self._opened.model, RetrievalModel) else None
        columns = {"user": pa.null(), "item": pa.null(), "score": pa.float32()}
        stored = stored_memory(self._opened, requests, "future", options)
        return to_frame(list(scored(self._opened, requests, catalogue, stored)), columns, self._kind(pairs))

    def held_out(self, users: Iterable[Any], k: int = 10) -> pl.DataFrame:
        """Return what the model said of the test events of ``users``, with their number in ``event``.

        Of a retrieval run the ``k`` best items before the event and its ``target``, of a ranking run the scores of it.
        """
        requests = make_prediction_requests(self._spec(users, None, split="test"), self._opened)
        if self.task == "ranking":
            answers = list(scored(self._opened, requests))
        else:
            answers = list(Recommended(self._opened, requests, AnswerOptions(top_k=k), self._catalogue))
        return to_frame(answers, {"user": pa.null(), "item": pa.null(), "event": pa.int64()}, "polars")

    def evaluate(self, split: Literal["test", "valid"] = "test") -> dict[str, Any]:
        """Score the checkpoint on a split, as training does at its end.

        Returns:
            What ``eval.json`` holds: ``metrics`` and their ``standard_errors`` by name, and how they were made, such as
            ``protocol``, ``num_users``, ``num_candidates`` and ``filter_seen``.

        Raises:
            ValueError: for another split.
        """
        if split not in ("test", "valid"):
            raise ValueError(f"split = {split!r}: must be 'test' or 'valid'")
        return self._opened.assembly.score(split, self.step)

    def baselines(self, neighbours: int = 100) -> dict[str, Any]:
        """Score popularity, repeats and item neighbours on the test split as the run was, into ``baselines.json``.

        Args:
            neighbours: Of each item.

        Returns:
            What the file holds: metrics of the model and of each baseline, and ``not_beaten``: for each metric the
            baselines that score at least as high as the model.

        Raises:
            ValueError: for a ranking run, one without a test score, and a score that was made otherwise.
        """
        return compare_with_baselines(self._opened, neighbours)

    def item_vectors(self) -> Frame:
        """Return what each item is scored by: a table with columns item, vector.

        Of a dot product or a cosine, the score of an item is the product of its vector with that of the user.

        Raises:
            ValueError: for a ranking run.
        """
        self._require_retrieval("item_vectors", "score")
        first, vectors = self._catalogue
        vectors = self._opened.assembly.mesh.tokens.gather(vectors)
        columns = {"item": self._item_names.originals, "vector": vector_column(vectors)}
        return to_frame([columns], {}, self.frames)

    def user_vectors(
        self, users: Iterable[Any] | None = None, *, histories: Frame | None = None, **asked: Any
    ) -> Frame:
        """Return what scores items for each user: a table with columns user, vector; arguments of :meth:`recommend`."""
        self._require_retrieval("user_vectors", "score")
        model, opened = self._opened.model, self._opened
        assert isinstance(model, RetrievalModel)
        requests = make_prediction_requests(self._spec(users, histories, **asked), opened)
        loader = replace(opened.loader, dataset=requests.dataset, split=requests.split)
        parts = [
            {"user": requests.users.take(pa.array(rows.cpu().numpy())), "vector": vector_column(vectors)}
            for rows, vectors in user_vectors(model, loader, opened.assembly.mesh)
        ]
        return to_frame(parts, {"user": pa.null(), "vector": pa.list_(pa.float32())}, self._kind(histories))

    def similar_items(self, items: Iterable[Any], k: int = 10) -> Frame:
        """Return the items whose vectors are closest by cosine: columns item, rank (from 1), similar, score.

        Args:
            items: Items of the data set.
            k: Neighbours of each, itself not among them.

        Raises:
            ValueError: for an item that is not known, a ``k`` below 1, and a ranking run.
        """
        self._require_retrieval("similar_items", "score")
        if k < 1:
            raise ValueError(f"k = {k}: must be at least 1")
        ids, names, parts = self._item_ids(items), self._item_names.originals, []
        model, mesh = self._opened.model, self._opened.assembly.mesh
        assert isinstance(model, RetrievalModel)
        for some in ids.split(_QUERIES):
            best = similar_items(model, mesh, some.to(mesh.device), self._catalogue, k).cpu()
            row, place = (best.items >= 0).nonzero(as_tuple=True)
            parts.append(
                {
                    "item": names.take(pa.array(some[row].numpy())),
                    "rank": pa.array((place + 1).int().numpy()),
                    "similar": names.take(pa.array(best.items[row, place].numpy())),
                    "score": pa.array(best.scores[row, place].numpy()),
                }
            )
        columns = {"item": pa.null(), "rank": pa.int32(), "similar": pa.null(), "score": pa.float32()}
        return to_frame(parts, columns, self.frames)

    def export(
        self,
        output: str | Path,
        *,
        faiss: bool = False,
        since: int | None = None,
        format: Format = "files",
        compile: bool = False,
    ) -> None:
        """Write vectors and weights for other systems to the new directory ``output``; see ``hstu.cli.export``.

        Args:
            output: It must not exist.
            faiss: Also an exact inner-product index of the items.
            since: Of a run with dynamic tables: what changed after this step.
            format: "torch-export" writes programs of the model in their place, and ``reader.py``, which answers from
                them without this package.
            compile: Also compile these programs, which needs a C++ compiler.

        Raises:
            ValueError: for an output that is there, a missing FAISS or compiler, and what does not fit the run.
        """
        options = ExportOptions(faiss=faiss, since=since, format=format, compiled=compile)
        export(self._opened, Path(output), options)

    def _spec(self, users: Iterable[Any] | None, histories: Frame | None, **asked: Any) -> RequestSpec:
        known = {"split", "request_time", "unknown_items", "user_column", "item_column", "time_column"}
        known |= {"action_column", "time_format", "missing", "missing_features", "set_separator"}
        if unknown := sorted(asked.keys() - known):
            raise TypeError(f"unexpected argument {unknown[0]!r}; there are {', '.join(sorted(known))}")
        if users is not None and histories is not None:
            raise ValueError("users and histories: give one of them; histories name their users in a column")
        if histories is not None:
            column = history_columns(RequestSpec(**asked), self._opened).item
            table = to_polars(histories, "histories")
            if column not in table.columns:
                raise ValueError(f"histories: column {column!r} is missing; present: {', '.join(table.columns)}")
            return RequestSpec(users=table, **asked)
        if users is None:
            return RequestSpec(**asked)
        name = history_columns(RequestSpec(**asked), self._opened).user
        return RequestSpec(users=pl.DataFrame({name: _listed(users, "users")}), **asked)

    def _kind(self, table: Any) -> Kind:
        return kind_of(table) or self.frames

    def _require_retrieval(self, method: str, other: str) -> None:
        if self.task != "retrieval":
            raise ValueError(f"{method}: needs a retrieval run; {self.path} is a ranking run, which can {other} pairs")

    @cached_property
    def _catalogue(self) -> CataloguePart:
        model = self._opened.model
        assert isinstance(model, RetrievalModel)
        return catalogue_part(model, self._opened.loader, self._opened.assembly.mesh)

    @property
    def _item_names(self) -> Index:
        return self._opened.dataset.index(self._opened.dataset.schema.item.name)

    def _item_ids(self, items: Iterable[Any]) -> Tensor:
        """Return the ids of items, [n] int64.

        Raises:
            ValueError: for one that is not known.
        """
        given = _listed(items, "items")
        ids = self._item_names.places(given)
        if ids.null_count():
            raise ValueError(f"items: {given[int(ids.is_null().arg_max() or 0)]!r} is not in the catalogue")
        return torch.from_numpy(ids.to_numpy().copy())


def _listed(values: Iterable[Any], name: str) -> pl.Series:
    """Return ids as a column."""
    if isinstance(values, (str, bytes)):
        raise ValueError(f"{name} = {values!r}: give a list, [{values!r}]")
    if isinstance(values, pl.Series):
        return values
    try:
        return pl.Series(list(values))
    except (TypeError, pl.exceptions.PolarsError):
        raise ValueError(f"{name}: give a list of ids, all strings or all whole numbers") from None
