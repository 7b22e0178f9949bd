"""Which row of a table an id has: a hash map whose places are the rows, so that a lookup costs what it asks for.

Rows form sets of ``WAYS``. An id may stand in either of two sets that a hash names, and a lookup reads both and
nothing else. A new id goes to the emptier one and there takes a free row, or that of the id with the lowest score.
All of it are tensor operations whose outcome no order of threads changes.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hstu.config import DynamicEmbeddingArgs
from hstu.models.negatives import random_columns
from hstu.ops.row_sets import AGEING, BLOCKED, FREE, GOLDEN, NEVER, PARTS, WAYS

_MOST = 255  # that the sketch counts
_RESTORED = 64  # parts in which ids of another map come, so that they spread over their sets


def part_of(ids: Tensor) -> Tensor:
    """Return the part of the map that knows each id, [n] int64 in [0, PARTS)."""
    return (ids * GOLDEN >> 60) & (PARTS - 1)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of n ids.

    Attributes:
        rows: Row of each id, [n].
        places: Where each is held, [n]; one beyond the last place if nowhere.
        changed: Rows with a new id; -1: none.
        evicted: Ids that lost their rows; ``FREE``: none.
        tally: Rows given out, those of them that another id lost, and ids that should have got one and did not; [3].
    """

    rows: Tensor
    places: Tensor
    changed: Tensor
    evicted: Tensor
    tally: Tensor


class RowMap:
    """The parts of a map that one rank knows.

    With ``fixed_shapes`` the shape of every tensor follows from the number of ids alone, so that the host never waits
    for a device; without it only ids that need a row are worked on once it is known which these are.

    Args:
        rows: Of the table, those for ids without one included.
        args: Who gets a row and who loses one.
        parts: Numbers of the parts, evenly spaced.
        device: Where it is.
        fixed_shapes: See above.
    """

    def __init__(
        self, rows: int, args: DynamicEmbeddingArgs, parts: range, device: torch.device, *, fixed_shapes: bool
    ) -> None:
        self.args, self.parts, self.fixed_shapes = args, parts, fixed_shapes
        self.usable = rows - PARTS
        self.sets = math.ceil(self.usable / (PARTS * WAYS))  # of a part
        self.size = len(parts) * self.sets * WAYS
        #: The row in the first place of each set; those in the others follow ``PARTS * sets`` apart.
        self.first_rows = torch.cat([part * self.sets + torch.arange(self.sets) for part in parts] or [torch.arange(0)])
        self.first_rows = nn.functional.pad(self.first_rows, (0, 1)).to(device)  # one more, as of all there is
        # One place more than there are: what must not be written is written there.
        self.ids = torch.full((self.size + 1,), FREE, device=device)
        #: The last lookup that met the id, or how often it was met; -1 where there is none.
        self.scores = torch.full((self.size + 1,), -1, dtype=torch.int32, device=device)
        blocked = self.row_of(torch.arange(self.size, device=device)) >= self.usable
        self.ids[:-1][blocked], self.scores[:-1][blocked] = BLOCKED, NEVER
        counts = args.min_count > 1 or args.evict_strategy == "lfu"
        self.counters = 8 * self.sets * WAYS if counts else 0  # of the sketch of a part
        #: How often ids without a row were met lately: a count-min sketch of two hashes (Cormode and Muthukrishnan).
        self.sketch = torch.zeros(len(parts) * self.counters + 1, dtype=torch.uint8, device=device)
        self.clock = torch.zeros(1, dtype=torch.int32, device=device)  # lookups that met ids
        #: For each lookup ahead of the model what it has overwritten: of which tensor, where, and the values.
        self.overwritten: deque[list[tuple[str, Tensor, Tensor]]] = deque()

    def row_of(self, places: Tensor) -> Tensor:
        """Return the row of each of ``places`` [n] int64."""
        return self.first_rows[places >> 3] + (places & (WAYS - 1)) * (PARTS * self.sets)

    def holders(self, rows: Tensor) -> Tensor:
        """Return the ids that have ``rows`` [n] int64 and whether they have one, 0 if another rank knows: [2, n]."""
        way, place = rows // (PARTS * self.sets), rows % (PARTS * self.sets)
        part = place // self.sets - self.parts.start
        place = (part // self.parts.step * self.sets + place % self.sets) * WAYS + way
        here = (part % self.parts.step == 0) & (part >= 0) & (rows < self.usable)
        held = self.ids[torch.where(here, place, self.size)]
        there = here & (held < BLOCKED)
        return torch.stack([torch.where(there, held, 0), there.long()])

    def look_up(self, ids: Tensor, met: Tensor | None, *, min_count: int | None = None, ahead: bool = False) -> Found:
        """Look up ids of these parts.

        Args:
            ids: [n] int64.
            met: [n] bool, those that score and get a row; None only looks.
            min_count: In place of the configured one.
            ahead: Whether to be able to tell what was before, until ``forget`` is called.
        """
        places = self._find(ids)
        changed, evicted, tally = ids[:0], ids[:0], torch.zeros(3, dtype=torch.int64, device=ids.device)
        if met is not None:
            if ahead:
                self.overwritten.append([])
            self._keep("clock", torch.zeros(1, dtype=torch.int64, device=ids.device), ahead)
            self.clock += 1
            self._score(places, met, ahead)
            new, counts = self._distinct(ids, met & (places == self.size) & (ids < BLOCKED))
            least = self.args.min_count if min_count is None else min_count
            if self.fixed_shapes or len(new):
                taken, evicted, tally = self._admit(new, self._estimated(new, counts, ahead), least, ahead)
                changed = torch.where(taken < self.size, self.row_of(taken), -1)
            if not self.fixed_shapes:
                changed, evicted = changed[changed >= 0], evicted[evicted < BLOCKED]
            if self.fixed_shapes or len(changed):
                places = self._after(ids, places)
        return Found(rows=self._rows(ids, places), places=places, changed=changed, evicted=evicted, tally=tally)

    def restore(self, ids: Tensor, scores: Tensor, clock: Tensor) -> Tensor:
        """Fill a map that holds nothing with ids that another one held; where room is short, low scores stay out.

        Args:
            ids: Of these parts, [n] int64, each once.
            scores: What they had there, [n] int32.
            clock: Of that map, [1] int32.

        Returns:
            Where each is held, [n]; one beyond the last place if nowhere.
        """
        order = scores.argsort(descending=True, stable=True)
        for block in ids[order].split(max(1, self.size // _RESTORED)):
            new, before = block.sort().values, -1
            while len(new) and len(new) != before:  # again with who found both sets as full as they were before
                self._admit(new, torch.ones_like(new), 0, ahead=False)
                new, before = new[self._find(new) == self.size], len(new)
        places = self._find(ids)
        self.scores[places] = torch.where(places < self.size, scores, -1)
        self.clock.copy_(clock)
        return places

    def forget(self) -> None:
        """Give up what was before the oldest lookup ahead."""
        self.overwritten.popleft()

    def state(self) -> dict[str, Tensor]:
        """Return all that the next lookup depends on, by names that no number of ranks changes; loading writes into it.

        With lookups ahead it is a copy of what was before them.
        """
        whole = {"ids": self.ids, "scores": self.scores, "sketch": self.sketch, "clock": self.clock}
        if self.overwritten:
            whole = {name: x.clone() for name, x in whole.items()}
            for writes in reversed(self.overwritten):
                for name, where, values in reversed(writes):
                    whole[name][where] = values
        return {"clock": whole.pop("clock")} | by_part(whole, self.parts)

    def _find(self, ids: Tensor) -> Tensor:
        """Return the place of each of ``ids`` [n]."""
        sets = self._sets(ids)
        equal = self.ids[:-1].view(-1, WAYS).index_select(0, sets.flatten()).view(-1, 2 * WAYS) == ids[:, None]
        # Of each set a byte a way; of both, the number of the highest bit is 8 way + which set, and -1 if none is set.
        first, second = equal.view(torch.int64).unbind(1)
        bit = (first + 2 * second).double().frexp().exponent.long() - 1
        place = torch.where((bit & 1) > 0, sets[:, 1], sets[:, 0]) * WAYS + (bit >> 3)
        return torch.where((bit >= 0) & (ids < BLOCKED), place, self.size)

    def _rows(self, ids: Tensor, places: Tensor) -> Tensor:
        """Return the row of each of ``ids`` [n], which are held at ``places``; without one, that of its part."""
        return torch.where(places < self.size, self.row_of(places), self.usable + part_of(ids))

    def _sets(self, ids: Tensor) -> Tensor:
        """Return the two sets that each of ``ids`` may stand in, [n, 2]."""
        part = (part_of(ids) - self.parts.start) // self.parts.step
        return part[:, None] * self.sets + random_columns(ids, 2, self.sets, seed=1)

    def _after(self, ids: Tensor, places: Tensor) -> Tensor:
        """Return the places of ``ids`` once rows have changed hands, which had ``places`` before."""
        if self.fixed_shapes:
            return self._find(ids)
        places = torch.where(self.ids[places] == ids, places, self.size)
        again = (places == self.size).nonzero().squeeze(1)
        return places.index_copy(0, again, self._find(ids[again]))

    def _score(self, places: Tensor, met: Tensor, ahead: bool) -> None:
        """Note at ``places`` [n] of ids that they were ``met``."""
        where = torch.where(met, places, self.size)
        self._keep("scores", where, ahead)
        if self.args.evict_strategy == "lfu":
            self.scores.index_add_(0, where, torch.ones_like(where, dtype=torch.int32))
        else:
            self.scores[where] = self.clock

    def _distinct(self, ids: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distinct ones of ``ids`` where ``some`` [n] bool is true, ascending, and how often each is there.

        With fixed shapes both are [n], with ``FREE`` behind the last one.
        """
        if not self.fixed_shapes:
            new, counts = ids[some].unique(return_counts=True)
            return new, counts
        ids = torch.where(some, ids, FREE).sort().values
        group = starts(ids).cumsum(0) - 1
        counts = torch.zeros_like(ids).index_add_(0, group, torch.ones_like(ids))
        return torch.full_like(ids, FREE).scatter_(0, group, ids), counts

    def _estimated(self, ids: Tensor, counts: Tensor, ahead: bool) -> Tensor:
        """Count ``ids`` [n], met ``counts`` [n] times now, and return how often they were met lately, hardly too often.

        With each id that is counted some counters are halved, so that what lies long ago does not sum up.
        """
        if not self.counters:
            return counts
        own, old = self._counters(ids)
        self._keep("sketch", old, ahead)
        self.sketch[old] = self.sketch[old] >> 1
        self._keep("sketch", own, ahead)
        counts = (self.sketch[own].view(-1, 2).amin(1) + counts).clamp(max=_MOST)
        self.sketch.scatter_reduce_(0, own, counts.to(torch.uint8).repeat_interleave(2), "amax")
        return counts

    def _counters(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return which counters of the sketch count each of ``ids`` [n], two each, and which it halves."""
        first = ((part_of(ids) - self.parts.start) // self.parts.step * self.counters)[:, None]
        own, valid = first + random_columns(ids, 2, self.counters, seed=2), (ids < BLOCKED)[:, None]
        old = first + random_columns(ids + self.clock.long() * GOLDEN, AGEING, self.counters, seed=3)
        own, old = (torch.where(valid, x, len(self.sketch) - 1).flatten() for x in (own, old))
        return own, old

    def _admit(self, ids: Tensor, counts: Tensor, least: int, ahead: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Give rows to those of ``ids`` [n], each once and ascending, that were met ``least`` times.

        Returns:
            The places taken; the ids that had them before; and what ``Found.tally`` counts.
        """
        due = (ids < BLOCKED) & (counts >= least)
        wanted = due.sum()
        if not self.fixed_shapes:
            ids, counts = ids[due], counts[due]
            due = due[due]
        places, ids, counts = self._chosen(ids, counts, due)
        taken = places < self.size
        evicted = torch.where(taken, self.ids[places], FREE)
        self._keep("ids", places, ahead)
        self._keep("scores", places, ahead)
        self.ids[places] = ids
        lfu = self.args.evict_strategy == "lfu"
        self.scores[places] = counts.int() if lfu else self.clock
        given = taken.sum()
        return places, evicted, torch.stack([given, (evicted < BLOCKED).sum(), wanted - given])

    def _chosen(self, ids: Tensor, counts: Tensor, due: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places that those of ``ids`` [n] take that are ``due``, in the order of sets, ids and counts.

        The place of an id that takes none is one beyond the last; a subclass may leave it out.
        """
        sets = self._sets(ids)
        scores = self.scores[:-1].view(-1, WAYS).index_select(0, sets.flatten()).view(-1, 2, WAYS)
        # The product sums bytes, of which each is a way.
        room = (scores < 0).view(torch.int64).squeeze(2) * 0x0101010101010101 >> 56
        worth = torch.where(room > 0, -room, scores.amin(2))
        second = worth[:, 1] < worth[:, 0]
        chosen = torch.where(due, torch.where(second, sets[:, 1], sets[:, 0]), self.size)
        scores = torch.where(second[:, None], scores[:, 1], scores[:, 0])
        # In a set the ids that were met most often come first, of equals the smaller one.
        order = (chosen * 2**20 - counts.clamp(max=2**20 - 1)).argsort(stable=True)
        ids, counts, due, chosen = ids[order], counts[order], due[order], chosen[order]
        score, way, turn = self._nth_lowest(scores.index_select(0, order), chosen)
        taken = due & (turn < WAYS) & ((score < 0) | self._loses(score, counts))
        return torch.where(taken, chosen * WAYS + way, self.size), ids, counts

    def _loses(self, score: Tensor, counts: Tensor) -> Tensor:
        """Return whether the holder of a row with ``score`` [n] loses it to an id that was met ``counts`` [n] times."""
        if self.args.evict_strategy == "lfu":
            return score < counts
        if self.args.evict_strategy == "none":
            return torch.zeros_like(score, dtype=torch.bool)
        return score < self.clock - (self.args.ttl or 0)

    def _nth_lowest(self, scores: Tensor, sets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, where an id is the n-th of those that come to one set, the n-th lowest score of the set and its way.

        Args:
            scores: [m, WAYS], of the set of each id.
            sets: [m], ascending.

        Returns:
            Scores, ways and n (from 0), [m]. The former mean nothing if n is not below ``WAYS``.
        """
        index = torch.arange(len(sets), device=sets.device)
        turn = index - torch.where(starts(sets), index, 0).cummax(0).values
        score, way = _lowest(scores)
        late, left, last = index, scores, way
        for number in range(1, WAYS):
            later = turn[late] >= number
            if not self.fixed_shapes:
                late, left, last = late[later], left[later], last[later]
                later = later[later]
                if not late.numel():
                    break
            left = left.scatter(1, last[:, None], NEVER)
            low, last = _lowest(left)
            score[late] = torch.where(later, low, score[late])
            way[late] = torch.where(later, last, way[late])
        return score, way, turn

    def _keep(self, name: str, where: Tensor, ahead: bool) -> None:
        """Keep what is about to be overwritten at ``where`` [n] of the tensor ``name``."""
        if ahead:
            self.overwritten[-1].append((name, where, getattr(self, name)[where]))


def held_rows(state: dict[str, Tensor], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids in the ``state`` of a map, as a checkpoint has it, the row and the score of each, [n] all.

    Args:
        state: Of all parts.
        rows: Of the table.
    """
    whole = RowMap(rows, DynamicEmbeddingArgs(), range(PARTS), torch.device("cpu"), fixed_shapes=False)
    ids = torch.cat([state[f"{part}/ids"] for part in range(PARTS)])
    places = (ids < BLOCKED).nonzero().squeeze(1)
    scores = torch.cat([state[f"{part}/scores"] for part in range(PARTS)])
    return ids[places], whole.row_of(places), scores[places]


def _lowest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest of each row of ``scores`` [m, WAYS], and the first way that has it: [m] and [m] int64."""
    lowest = scores.amin(1)
    there = (scores == lowest[:, None]).view(torch.int64).squeeze(1)  # a byte a way
    return lowest, (there & -there).double().frexp().exponent.long() - 1 >> 3


def by_part(whole: dict[str, Tensor], parts: range) -> dict[str, Tensor]:
    """Return the pieces of tensors that hold one after another those of each part, and one element more."""
    found: dict[str, Tensor] = {}
    for name, x in whole.items() if parts else ():
        pieces = x[:-1].view(len(parts), -1)
        found |= {f"{part}/{name}": piece for part, piece in zip(parts, pieces, strict=True) if piece.numel()}
    return found


def starts(values: Tensor) -> Tensor:
    """Return where a value [n] differs from the one before it, or is the first."""
    return torch.cat([torch.ones_like(values[:1], dtype=torch.bool), values[1:] != values[:-1]])
