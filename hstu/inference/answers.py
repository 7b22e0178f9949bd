"""Answers of an opened run in original ids: recommendations of a retrieval run, scores of a ranking run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from hstu.inference.memory import MemoryStore, StoredMemory, update_memory
from hstu.inference.opened import Opened
from hstu.inference.output import ParquetOutput
from hstu.inference.prediction_requests import PredictionRequests, RequestSpec, make_prediction_requests
from hstu.inference.recommend import CataloguePart, recommend, score_candidates, score_pairs
from hstu.models import RetrievalModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a retrieval run chooses items.

    Attributes:
        top_k: Items per user.
        approximate: Of a mixture of logits: score only the items that a dot product puts first, so many; None: all.
        trained_only: Leave out items that no training sample of the run shows.
        filter_seen: Leave out what the user has met; None: as the run was evaluated.
        candidates: Ids of the items that may be returned; None: all.
        memory: Directory of stored memory to answer from; None: whole histories are run.
        refresh: First make memory that is missing or stale.
    """

    top_k: int = 10
    approximate: int | None = None
    trained_only: bool = False
    filter_seen: bool | None = None
    candidates: Tensor | None = None
    memory: Path | None = None
    refresh: bool = False

    def check(self, opened: Opened) -> None:
        """Raise ``ValueError`` for what does not fit the run."""
        if not 1 <= self.top_k < 2**31:
            raise ValueError(f"--top_k = {self.top_k}: must be at least 1")
        if self.refresh and self.memory is None:
            raise ValueError("--refresh: makes memory again; give its directory with --memory")
        retrieval = opened.config.retrieval
        if retrieval is None and self.trained_only:
            raise ValueError("--trained_only: is for retrieval runs; a ranking run scores the pairs that it is given")
        if self.approximate is None:
            return
        given = f"--approximate = {self.approximate}"
        if retrieval is None or retrieval.similarity != "mol":
            raise ValueError(f"{given}: is for RetrievalArgs.similarity = 'mol'; other scores are exact at that price")
        if self.approximate < self.top_k:
            raise ValueError(f"{given}: must be at least --top_k = {self.top_k}")


def predict(opened: Opened, spec: RequestSpec, options: AnswerOptions, path: Path) -> None:
    """Write the answers to ``spec`` to the parquet file ``path``; all ranks call it.

    Raises:
        ValueError: for what does not fit the run, and for malformed tables.
    """
    config, mesh = opened.config, opened.assembly.mesh
    options.check(opened)
    requests = make_prediction_requests(spec, opened)
    if config.retrieval is not None and spec.candidates is not None:
        raise ValueError("--candidates: a retrieval run ranks the whole catalogue; leave it out, or give a ranking run")
    if config.retrieval is None and spec.candidates is None and spec.split == "future":
        raise ValueError(
            "--candidates: is required to predict with a ranking run, which scores given (user, item) pairs"
        )
    about = opened.about | {"split": spec.split, "protocol": config.dataset.protocol}
    if config.retrieval is not None:
        about |= {
            "top_k": options.top_k,
            "filter_seen": _filters(opened, options),
            "approximate": options.approximate,
            "trained_only": options.trained_only,
            "ties": "lower item id first",
        }
    memory = stored_memory(opened, requests, spec.split, options)
    about |= {} if memory is None else {"memory": str(options.memory), "stale_users": memory.counts.stale}
    with ParquetOutput(path, mesh, about) as output:
        best = Recommended(opened, requests, options, memory=memory) if config.retrieval is not None else None
        answers: Iterable[dict[str, pa.Array]] = scored(opened, requests, memory=memory) if best is None else best
        for columns in answers:
            output.write(columns)
        if best is not None:
            about |= best.counts
            best.tell()
    logger.info("%d rows: %s", output.rows, path)


def _filters(opened: Opened, options: AnswerOptions) -> bool:
    assert opened.config.retrieval is not None
    chosen = opened.config.retrieval.filter_seen if options.filter_seen is None else options.filter_seen
    return bool(chosen)


def stored_memory(
    opened: Opened, requests: PredictionRequests, split: str, options: AnswerOptions
) -> StoredMemory | None:
    """Return the memory that ``options`` name, of all who ask; None if they name none.

    Raises:
        ValueError: if it is of something else, or of too few.
    """
    if options.memory is None:
        return None
    if options.refresh:
        update_memory(opened, requests, split, options.memory, refresh=True)
    memory = StoredMemory(MemoryStore(opened, split, options.memory), requests)
    memory.require_all()
    return memory


def scored(
    opened: Opened,
    requests: PredictionRequests,
    catalogue: CataloguePart | None = None,
    memory: StoredMemory | None = None,
) -> Iterator[dict[str, pa.Array]]:
    """Yield the columns of the scores of pairs, or of held-out events, batch by batch."""
    loader, mesh = replace(opened.loader, dataset=requests.dataset, split=requests.split), opened.assembly.mesh
    if isinstance(opened.model, RetrievalModel):
        assert requests.pairs is not None
        pairs = torch.tensor(requests.pairs).to(mesh.device)
        rows_scores = score_pairs(opened.model, loader, mesh, pairs, catalogue, memory)
    else:
        rows_scores = score_candidates(opened.model, loader, mesh, memory)
    for rows, scores in rows_scores:
        yield requests.scores(rows, scores)


class Recommended:
    """The columns of the best items of each request, batch by batch, and how many got how much.

    Args:
        opened: A retrieval run.
        requests: Who asks.
        options: How items are chosen.
        catalogue: Vectors that are at hand already.
        memory: What stands for old events.
    """

    def __init__(
        self,
        opened: Opened,
        requests: PredictionRequests,
        options: AnswerOptions,
        catalogue: CataloguePart | None = None,
        memory: StoredMemory | None = None,
    ) -> None:
        self.opened, self.requests, self.options = opened, requests, options
        self.catalogue, self.memory = catalogue, memory
        self.counts: dict[str, Any] = dict.fromkeys(("num_requests", "fewer_than_top_k", "without_items"), 0)

    def __iter__(self) -> Iterator[dict[str, pa.Array]]:
        opened, requests, options = self.opened, self.requests, self.options
        assert isinstance(opened.model, RetrievalModel)
        mesh = opened.assembly.mesh
        loader = replace(opened.loader, dataset=requests.dataset, split=requests.split)
        for rows, best in recommend(
            opened.model,
            loader,
            mesh,
            options.top_k,
            filter_seen=_filters(opened, options),
            keep=self._kept(),
            num_candidates=options.approximate,
            catalogue=self.catalogue,
            memory=self.memory,
        ):
            found = (best.items >= 0).sum(1)
            self.counts["num_requests"] += rows.numel()
            self.counts["fewer_than_top_k"] += int((found < options.top_k).sum())
            self.counts["without_items"] += int((found == 0).sum())
            yield requests.recommendations(rows, best)

    def _kept(self) -> Tensor | None:
        """Return which items may be returned, [items] bool; None: all."""
        options, assembly = self.options, self.opened.assembly
        keep = assembly.trained_items.clone() if options.trained_only else None
        if options.candidates is not None:
            some = torch.zeros(self.opened.dataset.schema.item.vocab_size or 0, dtype=torch.bool)
            some[options.candidates] = True
            keep = some if keep is None else keep & some
        return None if keep is None else keep.to(assembly.mesh.device)

    def tell(self) -> None:
        """Say who got fewer items than asked for, and why."""
        options, requests = self.options, self.requests
        answered, fewer, without = (self.counts[name] for name in self.counts)
        if options.trained_only:
            keep = self.opened.assembly.trained_items
            logger.info("--trained_only: %d of %d items are left out", int((~keep).sum()), keep.numel())
        who = "held-out events" if requests.held_out else "users"
        if silent := len(requests.split) - answered:
            logger.info("%d of %d %s have no history to go by and get no answer", silent, len(requests.split), who)
        if fewer:
            seen = "they have seen the rest (RetrievalArgs.filter_seen = True)"
            reason = seen if _filters(self.opened, options) else "there are no more"
            reason += ", untrained ones left out" if options.trained_only else ""
            logger.info("%d of %d %s get fewer than %d items, %d of them none: %s",
                        fewer, answered, who, options.top_k, without, reason)  # fmt: skip
