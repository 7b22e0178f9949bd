"""Answers of a trained model: the best items of each user, scores of given items, vectors. The same on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu.data.batch import Batch
from hstu.data.loader import BatchLoader
from hstu.data.requests import Requests, Slates
from hstu.data.seen import seen_before
from hstu.layers.similarity import MixtureOfLogits
from hstu.metrics.topk import TopK, best_of, top_k
from hstu.models import RankingModel, RetrievalModel
from hstu.models.caching import scores_slates
from hstu.parallel import Mesh

if TYPE_CHECKING:
    from hstu.inference.memory import StoredMemory

_LOOKUP_ROWS = 1 << 16  # items looked up at once
_SCORED_ROWS = 1 << 16  # items scored at once
_WRITTEN_ROWS = 1 << 16  # pairs yielded at once
SLATE = 512  # candidates of a user that are run at once


@torch.no_grad()
def recommend(
    model: RetrievalModel,
    loader: BatchLoader,
    mesh: Mesh,
    k: int,
    *,
    filter_seen: bool,
    keep: Tensor | None = None,
    num_candidates: int | None = None,
    catalogue: CataloguePart | None = None,
    memory: StoredMemory | None = None,
) -> Iterator[tuple[Tensor, TopK]]:
    """Yield, batch by batch, rows of ``loader.split`` [Q] in ascending order and the best items of each.

    The items are those that evaluation would put first for the event ``split.stop - 1``. A sample without
    history has none and is left out. Each rank scores a part of the catalogue for the samples of all ranks.

    Args:
        model: The model, on every rank.
        loader: Unshuffled samples.
        mesh: The ranks.
        k: Items per sample.
        filter_seen: Leave out everything in the history, however long ago.
        keep: Which items may be returned, by id [items] bool; None: all.
        num_candidates: Of a mixture of logits: score only the items that a dot product of the summed vectors puts
            first, so many of them, as the h-indexer does (https://arxiv.org/abs/2306.04039); None: all, exactly.
        catalogue: What :func:`catalogue_part` returned, for who asks more than once; None: it is looked up.
        memory: What stands for old events; None: the whole history is run.
    """
    part = catalogue or catalogue_part(model, loader, mesh)
    coarse = coarse_vectors(model, part) if num_candidates is not None else None
    for rows, queries in user_vectors(model, loader, mesh, memory):
        if rows.numel() == 0:
            continue
        seen = seen_before(loader.dataset, loader.split, rows) if filter_seen else None
        few = None if coarse is None or num_candidates is None else (coarse, num_candidates)
        yield rows, best_items(model, mesh, queries, part, k, seen=seen, keep=keep, few=few)


@torch.no_grad()
def best_items(
    model: RetrievalModel,
    mesh: Mesh,
    queries: Tensor,
    part: CataloguePart,
    k: int,
    *,
    seen: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
    few: tuple[Tensor, int] | None = None,
) -> TopK:
    """Return the ``k`` best items of each of ``queries`` [Q, ..], the same on every rank.

    Args:
        model: The model.
        mesh: The ranks.
        queries: What :func:`user_vectors` yields.
        part: What :func:`catalogue_part` returned.
        k: Items per query.
        seen: Rows and item ids [S] of what may not be returned.
        keep: Which items may be returned, by id [items] bool; None: all.
        few: What :func:`coarse_vectors` returned, and how many items are scored; None: all, exactly.
    """
    gather, (first, vectors) = mesh.tokens.gather if mesh.tokens.size > 1 else None, part
    if few is None:
        return top_k(queries, _split(first, vectors), k, seen=seen, keep=keep, score=model.scores, gather=gather)
    (coarse, count), mixture = few, _mixture(model)
    guides = mixture.coarse_queries(queries)
    some = top_k(guides, _split(first, coarse), count, seen=seen, keep=keep, gather=gather).items
    return best_of(queries, some, part, k, score=mixture.own_scores, gather=gather)


def coarse_vectors(model: RetrievalModel, part: CataloguePart) -> Tensor:
    """Return what stands for the items of ``part`` in a dot product that comes close to a mixture of logits."""
    return _mixture(model).coarse_items(part[1])


def _mixture(model: RetrievalModel) -> MixtureOfLogits:
    assert isinstance(model.similarity, MixtureOfLogits), "other similarities are exact at this price"
    return model.similarity


@torch.no_grad()
def user_vectors(
    model: RetrievalModel, loader: BatchLoader, mesh: Mesh, memory: StoredMemory | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, batch by batch, rows of ``loader.split`` [Q] in ascending order and what scores items, [Q, ..]."""
    model.eval()
    if memory is not None:
        for batch, hidden in _behind_memory(loader, mesh, memory):
            yield _joined(mesh, _labelled_samples(batch), model.query_vectors(hidden))
        return
    for batch in loader.epoch(0):
        request = model.scoring_request(batch.to(mesh.device))
        yield _joined(mesh, _labelled_samples(request.batch), model.queries(request))


@torch.no_grad()
def score_candidates(
    model: RankingModel, loader: BatchLoader, mesh: Mesh, memory: StoredMemory | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, batch by batch, rows of ``loader.split`` [Q] in ascending order and predictions [Q, K] float64.

    Scored is the event ``split.stop - 1``: the probability of each class or, for binary tasks, of the label 1, and of
    regression the number, as evaluation computes them. :class:`Requests` of one user share one pass over the history,
    where the backbone keeps keys and values; they are then yielded after all of them have been scored.
    """
    model.eval()
    if isinstance(loader.dataset, Requests) and scores_slates(model):
        yield from _score_slates(model, loader, loader.dataset.slates(SLATE), mesh, memory)
        return
    if memory is not None:
        for batch, hidden in _behind_memory(loader, mesh, memory):
            yield _joined(mesh, _labelled_samples(batch), model.predictions_of(hidden))
        return
    for batch in loader.epoch(0):
        request = model.scoring_request(batch.to(mesh.device))
        yield _joined(mesh, _labelled_samples(request.batch), model.predictions(request))


def _behind_memory(loader: BatchLoader, mesh: Mesh, memory: StoredMemory) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches of recent events, and the rows that carry their labels."""
    for batch in memory.loader(loader).epoch(0):
        requests = batch.sample_ids.numpy()
        yield (moved := batch.to(mesh.device)), memory.hidden_rows(moved, requests)


def _score_slates(
    model: RankingModel, loader: BatchLoader, slates: Slates, mesh: Mesh, memory: StoredMemory | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score slates, the history of each user once, and yield all pairs in their order."""
    loader = loader if memory is None else memory.loader(loader)
    pairs, scores = [], []
    together = loader.batch_size * loader.world_size
    for first in range(0, len(slates.number), together):
        users = np.arange(first, min(first + together, len(slates.number)))
        own, cache = users[loader.rank :: loader.world_size], None
        for slate in range(int(slates.number[users].max())):  # as many on every rank: lookups are collective
            rows = slates.rows(own, slate)
            batch = loader.collate(slates.requests, slates.requests.split, rows, rows, 0).to(mesh.device)
            if memory is not None:
                asking = slates.asking[own] if own.size else np.full(1, -1)  # a rank without users has nobody's batch
                hidden = memory.hidden_rows(batch, asking)
            else:
                if cache is None:
                    _, cache = model.extend(None, batch, history_alone=True)
                hidden, _ = model.extend(cache, batch)
            pairs.append(torch.from_numpy(slates.pairs_of(rows)).to(mesh.device))
            scores.append(model.predictions_of(hidden))
    if not pairs:
        return
    every, values = _joined(mesh, torch.cat(pairs), torch.cat(scores))
    yield from zip(every.split(_WRITTEN_ROWS), values.split(_WRITTEN_ROWS), strict=True)


@torch.no_grad()
def item_vectors(model: RetrievalModel, loader: BatchLoader, mesh: Mesh) -> Iterator[tuple[int, Tensor]]:
    """Yield (first item id, vectors [n, ..] float32) of the whole catalogue in ascending order, on every rank."""
    yield from _look_up(model, loader, mesh, 0, model.num_items)


@torch.no_grad()
def score_pairs(
    model: RetrievalModel,
    loader: BatchLoader,
    mesh: Mesh,
    items: Tensor,
    catalogue: CataloguePart | None = None,
    memory: StoredMemory | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, batch by batch, rows of ``loader.split`` [Q] in ascending order and the score of one item each, [Q, 1].

    Args:
        model: The model, on every rank.
        loader: Unshuffled samples.
        mesh: The ranks.
        items: Item id that each row asks about, [S] int64 on the device.
        catalogue: As in :func:`recommend`.
        memory: As in :func:`recommend`.
    """
    part = catalogue or catalogue_part(model, loader, mesh)
    for rows, queries in user_vectors(model, loader, mesh, memory):
        if rows.numel():
            yield rows, item_scores(model, mesh, queries, items[rows], part)


@torch.no_grad()
def item_scores(model: RetrievalModel, mesh: Mesh, queries: Tensor, items: Tensor, part: CataloguePart) -> Tensor:
    """Return the score of one item for each of ``queries`` [Q, ..], the same on every rank.

    Args:
        model: The model.
        mesh: The ranks.
        queries: What :func:`user_vectors` yields.
        items: Item ids [Q] int64.
        part: What :func:`catalogue_part` returned.

    Returns:
        [Q, 1] float32.
    """
    gather = mesh.tokens.gather if mesh.tokens.size > 1 else None

    def own(queries: Tensor, vectors: Tensor) -> Tensor:
        if isinstance(model.similarity, MixtureOfLogits):
            return model.similarity.own_scores(queries, vectors)
        return torch.einsum("qd,qcd->qc", queries, vectors)

    return best_of(queries, items[:, None], part, 1, score=own, gather=gather).scores


@torch.no_grad()
def similar_items(model: RetrievalModel, mesh: Mesh, items: Tensor, part: CataloguePart, k: int) -> TopK:
    """Return the ``k`` other items whose vectors are closest by cosine to those of ``items`` [Q] int64, on every rank.

    What is added to the scores of items is left out.
    """
    first, vectors = part
    gather = mesh.tokens.gather if mesh.tokens.size > 1 else None

    def directions(vectors: Tensor) -> Tensor:
        return F.normalize((vectors if model.item_bias is None else vectors[:, :-1]).float(), dim=1)

    here = (items >= first) & (items < first + vectors.shape[0])
    own = vectors.new_zeros(items.shape[0], *vectors.shape[1:])
    own[here] = vectors[items[here] - first]
    itself = torch.arange(items.shape[0], device=items.device), items
    return top_k(
        directions(mesh.tokens.sum(own)),
        _split(first, vectors),
        k,
        seen=itself,
        score=lambda queries, some: queries @ directions(some).T,
        gather=gather,
    )


CataloguePart: TypeAlias = tuple[int, Tensor]
"""Id of the first item of this rank's part of the catalogue, and vectors [n, ..]."""


@torch.no_grad()
def catalogue_part(model: RetrievalModel, loader: BatchLoader, mesh: Mesh) -> CataloguePart:
    """Look up this rank's part of the catalogue: the id of its first item, and vectors [n, ..]."""
    share = -(-model.num_items // mesh.tokens.size)
    first = mesh.tokens.rank * share
    return first, torch.cat([vectors for _, vectors in _look_up(model, loader, mesh, first, share)])


def _look_up(
    model: RetrievalModel, loader: BatchLoader, mesh: Mesh, first: int, count: int
) -> Iterator[tuple[int, Tensor]]:
    model.eval()
    nobody = np.empty(0, np.int64)
    batch = loader.collate(loader.dataset, loader.split, nobody, nobody, 0).to(mesh.device)
    for start in range(first, first + count, _LOOKUP_ROWS):
        # Lookups are collective: as many on every rank, even where the catalogue ends before its part does.
        stop = min(start + _LOOKUP_ROWS, first + count, model.num_items)
        yield start, model.catalogue_vectors(batch, torch.arange(start, max(start, stop), device=mesh.device))


def _split(first: int, vectors: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, vectors.shape[0], _SCORED_ROWS):
        yield first + start, vectors[start : start + _SCORED_ROWS]


def _labelled_samples(batch: Batch) -> Tensor:
    """Return the row in the split of each label's sample, [L]; the first epoch numbers samples so."""
    owner = torch.repeat_interleave(batch.lengths(batch.item))
    return batch.sample_ids[owner[batch.label_events]]


def _joined(mesh: Mesh, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Join the samples of all ranks, in the order of their rows."""
    rows, values = mesh.tokens.gather(rows), mesh.tokens.gather(values)
    order = rows.argsort()
    return rows[order], values[order]
