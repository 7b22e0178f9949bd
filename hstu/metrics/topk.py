"""Top-k over a catalogue that is scored chunk by chunk, or over some candidates, on one rank or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP = 32  # neighbouring items that are looked at one by one only if the best of them could be among the k
_SCORES_AT_ONCE = 1 << 25
_LOW = 0xFFFFFFFF
_NONE = torch.iinfo(torch.int64).min


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k best items of each query, best first; of equal scores the lower item id stands first.

    Attributes:
        items: [Q, k] int64; -1 where fewer than k items may be recommended.
        scores: [Q, k] float32; -inf there.
    """

    items: Tensor
    scores: Tensor

    def cpu(self) -> TopK:
        """Return the same in host memory."""
        return TopK(items=self.items.cpu(), scores=self.scores.cpu())


def dot_product(queries: Tensor, vectors: Tensor) -> Tensor:
    """Score [Q, D] against [n, D]: [Q, n]."""
    return queries @ vectors.T


@torch.no_grad()
def top_k(
    queries: Tensor,
    chunks: Iterable[tuple[int, Tensor]],
    k: int,
    *,
    seen: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
    score: Callable[[Tensor, Tensor], Tensor] = dot_product,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> TopK:
    """Return the ``k`` best items of each query, exactly as sorting all scores would.

    Memory is that of one block of scores, whatever the catalogue and the number of queries. An item whose score
    is not a number is never returned.

    Args:
        queries: [Q, D] float32.
        chunks: The catalogue, or this rank's part of it: (id of the first item, vectors [n, D]) of runs of
            consecutive ids.
        k: At least 1.
        seen: Rows and item ids [S] of what may not be returned; ids outside the chunks are allowed.
        keep: Which items may be returned, by id [items] bool; None: all.
        score: Scores of [Q, D] against [n, D], [Q, n] float32.
        gather: Joins the rows of all ranks in rank order (``Mesh.gather``) where each holds a part of the
            catalogue; every rank then has the same queries, and gets the same answer.

    Raises:
        ValueError: if ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k = {k}: must be at least 1")
    best = torch.full((queries.shape[0], k), _NONE, device=queries.device)
    if seen is not None:
        order = seen[1].argsort()
        seen = seen[0][order], seen[1][order]
    for first, vectors in chunks:
        rows_at_once = max(1, _SCORES_AT_ONCE // max(1, vectors.shape[0]))
        for start in range(0, queries.shape[0] if vectors.shape[0] else 0, rows_at_once):
            rows = slice(start, start + rows_at_once)
            scores = score(queries[rows], vectors)
            if keep is not None:
                scores[:, ~keep[first : first + vectors.shape[0]]] = float("-inf")
            if seen is not None:
                _remove(scores, first, start, seen)
            best[rows] = _improve(best[rows], scores, first)
    if gather is not None:
        parts = gather(best).view(-1, *best.shape)
        best = parts.transpose(0, 1).flatten(1).topk(k).values
    return _unpack(best)


@torch.no_grad()
def best_of(
    queries: Tensor,
    candidates: Tensor,
    part: tuple[int, Tensor],
    k: int,
    *,
    score: Callable[[Tensor, Tensor], Tensor],
    gather: Callable[[Tensor], Tensor] | None = None,
) -> TopK:
    """Return the ``k`` best of some candidates of each query.

    Args:
        queries: [Q, ..].
        candidates: [Q, C] int64 item ids, distinct in a row; -1 is none.
        part: The catalogue, or this rank's part of it: (id of the first item, vectors [n, ..]).
        k: At least 1.
        score: Scores of queries [q, ..] against items of their own [q, C, ..], [q, C] float32.
        gather: As in :func:`top_k`.
    """
    first, vectors = part
    best = torch.full((queries.shape[0], max(k, candidates.shape[1])), _NONE, device=queries.device)
    step = max(1, _SCORES_AT_ONCE // max(1, candidates.shape[1] * vectors.shape[1]))
    for start in range(0, queries.shape[0] if vectors.shape[0] else 0, step):
        ids = candidates[start : start + step]
        here = (ids >= first) & (ids < first + vectors.shape[0])
        scores = score(queries[start : start + step], vectors[(ids - first).clamp(0, vectors.shape[0] - 1)])
        scores = scores.masked_fill(~here | scores.isnan(), float("-inf"))
        best[start : start + step, : ids.shape[1]] = _keys(scores, ids)
    best = best.topk(k).values
    if gather is not None:
        best = gather(best).view(-1, *best.shape).transpose(0, 1).flatten(1).topk(k).values
    return _unpack(best)


def _remove(scores: Tensor, first: int, first_row: int, seen: tuple[Tensor, Tensor]) -> None:
    """Set the scores [q, n] of seen items to -inf; ``seen`` is sorted by item."""
    bounds = torch.tensor([first, first + scores.shape[1]], device=scores.device)
    begin, end = torch.searchsorted(seen[1], bounds).tolist()
    rows, items = seen[0][begin:end] - first_row, seen[1][begin:end] - first
    here = (rows >= 0) & (rows < scores.shape[0])
    scores[rows[here], items[here]] = float("-inf")


def _improve(best: Tensor, scores: Tensor, first: int) -> Tensor:
    """Merge the items of ``scores`` [q, n] into the keys ``best`` [q, k], looking at few of them one by one."""
    k = best.shape[1]
    if missing := -scores.shape[1] % _GROUP:
        scores = F.pad(scores, (0, missing), value=float("-inf"))
    groups = scores.view(scores.shape[0], -1, _GROUP)
    maxima = groups.amax(2)
    if maxima.isnan().any():
        groups = groups.nan_to_num(float("-inf"), float("inf"), float("-inf"))
        maxima = groups.amax(2)
    least = _scores(best[:, -1:])
    if maxima.shape[1] >= k and least.min() == float("-inf"):
        # k groups reach this score, so k items do: nothing below it is among the k best.
        least = torch.maximum(least, maxima.topk(k).values[:, -1:])
    rows, numbers = (maxima >= least).nonzero(as_tuple=True)
    opened = groups[rows, numbers]
    pairs, places = (opened >= least[rows]).nonzero(as_tuple=True)
    rows, items = rows[pairs], first + numbers[pairs] * _GROUP + places
    # The promising items of a row side by side, as wide as the row that has most of them.
    counts = torch.bincount(rows, minlength=best.shape[0])
    column = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    found = best.new_full((best.shape[0], int(counts.max())), _NONE)
    found[rows, column] = _keys(opened[pairs, places], items)
    return torch.cat([best, found], 1).topk(k).values


def _keys(scores: Tensor, ids: Tensor) -> Tensor:
    """Pack scores and ids (below 2**32) into int64 that sort by score, then by falling id; -inf sorts last."""
    bits = (scores.float() + 0.0).view(torch.int32)  # adding zero makes -0.0 the same number as 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.long() << 32) | (_LOW - ids)
    return keys.masked_fill_(scores == float("-inf"), _NONE)


def _scores(keys: Tensor) -> Tensor:
    """Return the scores of packed keys."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32).masked_fill(keys == _NONE, float("-inf"))


def _unpack(keys: Tensor) -> TopK:
    items = (_LOW - (keys & _LOW)).masked_fill(keys == _NONE, -1)
    return TopK(items=items, scores=_scores(keys))
