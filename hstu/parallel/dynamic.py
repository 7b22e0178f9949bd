"""Tables whose rows go to the ids that training meets, spread over ranks.

The map from ids to rows (``hstu.parallel.row_map``) lies in parts, by a hash of the id, and each part belongs to one
rank: so no number of ranks changes which id has which row. Every lookup settles at once who has a row.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import KeyedJaggedTensor

from hstu.config import DynamicEmbeddingArgs, EmbeddingArgs, OptimizerArgs
from hstu.data.batch import POOL, keyed_features
from hstu.models.embedding import Table, table_named
from hstu.ops.row_sets import BLOCKED, PARTS, WAYS
from hstu.parallel.compiled_row_map import row_map
from hstu.parallel.embedding import ShardedTables
from hstu.parallel.mesh import Mesh
from hstu.parallel.row_history import RowHistory
from hstu.parallel.row_map import part_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a training lookup of one table changes besides the map, once the model has come so far.

    Attributes:
        rows: Rows with a new id, of all ranks; -1: none.
        places: Where this rank holds the ids that were looked up.
        evicted: Ids of this rank's parts that lost their rows.
        tally: What ``Found.tally`` counts, over all ranks.
    """

    rows: Tensor
    places: Tensor
    evicted: Tensor
    tally: Tensor


@dataclass(frozen=True, kw_only=True)
class Held:
    """Who has the rows of one part of a map.

    Attributes:
        ids: [n] int64.
        rows: The row of each, [n] int64.
        steps: The last step in which each was trained, [n] int32.
        evicted: Ids that lost their rows and have none now, [m] int64.
    """

    ids: Tensor
    rows: Tensor
    steps: Tensor
    evicted: Tensor


class DynamicRows:
    """The map from the ids of one table to its rows, spread over all ranks.

    Args:
        table: The table.
        args: Who gets a row and who loses one.
        mesh: The ranks.
    """

    def __init__(self, table: Table, args: DynamicEmbeddingArgs, mesh: Mesh) -> None:
        self.mesh = mesh
        parts = range(mesh.rank, PARTS, mesh.world_size)
        # Several ranks have to be told how many ids they exchange; one GPU alone need not wait for anything.
        fixed_shapes = mesh.device.type == "cuda" and mesh.world_size == 1
        self.map = row_map(table.rows, args, parts, mesh.device, waits=not fixed_shapes)
        self.history = RowHistory(self.map)
        #: What ``Found.tally`` counts, over all ranks and all lookups that the model has come to.
        self.tally = torch.zeros(3, dtype=torch.int64, device=mesh.device)

    def __call__(
        self, ids: Tensor, met: Tensor | None, *, min_count: int | None = None, ahead: bool = False
    ) -> tuple[Tensor, Change]:
        """Look up ids of this rank; all ranks do so at once.

        Args:
            ids: [n] int64.
            met: [n] bool, those that get a row, an id of another rank included; None gives out none.
            min_count: In place of the configured one.
            ahead: Whether a checkpoint may be taken before the model comes to this lookup.

        Returns:
            The row of each id [n], and what ``apply`` takes.
        """
        ranks = self.mesh.world_size
        if ranks == 1:
            found = self.map.look_up(ids, met, min_count=min_count, ahead=ahead)
            return found.rows, Change(rows=found.changed, places=found.places, evicted=found.evicted, tally=found.tally)
        if met is not None and self.mesh.tensor.rank:  # tensor ranks hold the same tokens: they count once
            met = torch.zeros_like(met)
        owner = part_of(ids) % ranks
        order = owner.argsort(stable=True)
        asked = torch.stack([ids, torch.zeros_like(ids) if met is None else met.long()], 1)
        questions, sizes = self.mesh.world.exchange(asked[order], torch.bincount(owner, minlength=ranks).tolist())
        wanted, flags = questions.unbind(1)
        found = self.map.look_up(wanted, None if met is None else flags > 0, min_count=min_count, ahead=ahead)
        answers, _ = self.mesh.world.exchange(found.rows, sizes)
        news = torch.cat([found.tally, found.changed])
        news, sizes = self.mesh.world.exchange(news.repeat(ranks), [news.numel()] * ranks)
        tallies, changed = zip(*((part[:3], part[3:]) for part in news.split(sizes)), strict=True)
        change = Change(
            rows=torch.cat(changed), places=found.places, evicted=found.evicted, tally=torch.stack(tallies).sum(0)
        )
        return torch.empty_like(ids).index_copy(0, order, answers), change

    def apply(self, change: Change, step: int) -> None:
        """Count ``change``, which the model comes to in ``step``."""
        self.tally += change.tally
        self.history.note(step, change.places, change.evicted)
        if self.map.overwritten:
            self.map.forget()

    def holders(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids that have one of ``rows`` [n], for which all ranks ask at once, and their number.

        Returns:
            Ids [n], arbitrary behind those, and the number [].
        """
        ids, there = facts = self.map.holders(rows)
        if self.mesh.world_size > 1:
            torch.distributed.all_reduce(facts)
        order = there.argsort(descending=True, stable=True)
        return ids[order], there.sum()

    def held(self, part: int, since: int = 0) -> Held:
        """Return what of ``part`` was trained or lost after step ``since``, in host memory; all ranks ask at once.

        Raises:
            ValueError: if more was lost since then than is remembered.
        """
        held: Held = self.mesh.on_main(lambda: self._held(part, since), rank=part % self.mesh.world_size)
        return held

    def _held(self, part: int, since: int) -> Held:
        size, number = self.map.sets * WAYS, self.map.parts.index(part)
        places = torch.arange(number * size, (number + 1) * size, device=self.mesh.device)
        ids, steps = self.map.ids[places], self.history.steps[places]
        lost = self.history.evicted_since(number, since)
        some = (ids < BLOCKED) & (steps > since)
        return Held(
            ids=ids[some].cpu(),
            rows=self.map.row_of(places[some]).cpu(),
            steps=steps[some].cpu(),
            evicted=lost[~torch.isin(lost, ids)].unique().cpu(),
        )

    def state(self) -> dict[str, Tensor]:
        """Return this rank's part of the map, by names that no number of ranks changes; loading writes into it."""
        return self.map.state() | self.history.state() | {"tally": self.tally}


class DynamicTables(ShardedTables):
    """Sharded tables, of which some give their rows to the ids that training meets.

    In training an id of the batch gets a row at its lookup; ids that are only looked at (negatives, a catalogue) and
    those of an evaluation do not. A row that gets another id begins anew, with weights as at first and no past in the
    optimizer.
    """

    def __init__(
        self,
        tables: tuple[Table, ...],
        embedding: EmbeddingArgs,
        dynamic: DynamicEmbeddingArgs,
        optimizer: OptimizerArgs,
        mesh: Mesh,
        *,
        prefetch: bool = False,
    ) -> None:
        super().__init__(tables, embedding, optimizer, mesh, prefetch=prefetch)
        self.maps = {table: DynamicRows(table, dynamic, mesh) for table in tables if table.name in dynamic.capacity}
        #: Changes of the lookups that the model has not come to yet.
        self._changes: deque[dict[Table, Change]] = deque()
        self._warned: set[str] = set()

    def row_maps(self) -> dict[str, Tensor]:
        states = {table.name: rows.state() for table, rows in self.maps.items()}
        return {f"{table}/{name}": value for table, state in states.items() for name, value in state.items()}

    def counters(self) -> dict[str, float]:
        found = super().counters()
        for table, rows in self.maps.items():
            given, evicted, without = rows.tally.tolist()
            found |= {
                f"rows_in_use/{table.name}": (given - evicted) / rows.map.usable,
                f"evictions/{table.name}": float(evicted),
                f"ids_without_row/{table.name}": float(without),
            }
            if without and table.name not in self._warned and rows.mesh.is_main:
                logger.warning("table %s: %d times an id of a training batch got no row and shared one with others; if "
                               "that goes on, raise DynamicEmbeddingArgs.capacity", table.name, without)  # fmt: skip
                self._warned.add(table.name)
        return found

    def request(self, features: KeyedJaggedTensor, *, ahead: bool = False) -> dict[str, KeyedJaggedTensor]:
        names, sizes = [*features.keys()], [*features.length_per_key()]
        values = dict(zip(names, features.values().split(sizes), strict=True))
        changes: dict[Table, Change] = {}
        for table, rows in self.maps.items():
            present = [name for name in table.features if name in values]
            parts = [values[name] for name in present]
            met = [
                torch.full_like(x, not n.startswith(POOL), dtype=torch.bool)
                for n, x in zip(present, parts, strict=True)
            ]
            found, changes[table] = rows(torch.cat(parts), torch.cat(met) if self.training else None, ahead=ahead)
            values |= dict(zip(present, found.split([x.numel() for x in parts]), strict=True))
        if self.training:
            self._changes.append(changes)
        lengths = features.lengths().view(len(names), -1)
        return super().request(keyed_features(names, torch.cat([*values.values()]), lengths, sizes))

    def begin(self) -> None:
        if not self.training:
            return
        for table, change in self._changes.popleft().items():
            self.maps[table].apply(change, self.step)
            self.renew(table, change.rows)

    @torch.no_grad()
    def restore(self, table: Table, ids: Tensor, scores: Tensor, clock: Tensor) -> Tensor:
        """Give rows of ``table``, which nobody has yet, to what another map held; see ``RowMap.restore``.

        Args:
            table: The table.
            ids: [n] int64 in host memory, the same on every rank.
            scores: What they had there, [n].
            clock: Of that map.

        Returns:
            The row of each, [n] int64 in host memory; -1 where there was no room.
        """
        rows, mesh = self.maps[table], self.maps[table].mesh
        mine = (part_of(ids) % mesh.world_size == mesh.rank).nonzero().squeeze(1)
        places = rows.map.restore(*(x.to(mesh.device) for x in (ids[mine], scores[mine], clock)))
        found = torch.full_like(ids, -1)
        found[mine] = torch.where(places < rows.map.size, rows.map.row_of(places), -1).cpu()
        if mesh.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=mesh.world.host_group)
        rows.history.steps[places] = 1  # all that a new run holds is new since its step 0
        rows.tally[0] = (found >= 0).sum()
        return found

    @torch.no_grad()
    def renew(self, table: Table, rows: Tensor) -> None:
        """Give ``rows`` [n] of ``table`` new weights, and forget what the optimizer knows of them; -1 is no row."""
        fresh = self._fresh[table.name]
        fixed_shapes = self.maps[table].map.fixed_shapes
        for shard in self._weights[table.name].local_shards():
            (row, column), (count, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            places, some = _within(rows, row, count, fixed_shapes=fixed_shapes)
            weights = nn.functional.pad(fresh, (0, column + width))[
                (places + row) % len(fresh), column : column + width
            ]
            shard.tensor[places] = weights if some is None else torch.where(some, weights, shard.tensor[places])
        for shard in (shard for moment in self._moments[table.name] for shard in moment.local_shards()):
            row, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
            places, some = _within(rows, row, count, fixed_shapes=fixed_shapes)
            shard.tensor[places] = 0 if some is None else torch.where(some, 0, shard.tensor[places])

    @torch.no_grad()
    def read(self, table: Table, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the weights of ``rows`` [n] of ``table`` and their moments; all ranks ask at once for the same.

        Returns:
            Weights [n, width] and moments [n, width], or [n] where there is one number a row, on the device.
        """
        rows = rows.to(self.maps[table].mesh.device)
        weights, *moments = (_gathered(x, rows) for x in (self._weights[table.name], *self._moments[table.name]))
        return weights[:, : table.width], [x[:, : table.width] if x.dim() > 1 else x for x in moments]

    @cached_property
    def _fresh(self) -> dict[str, Tensor]:
        """Weights for rows that begin anew, [some, width] of each table."""
        return {t.name: t.initial_rows(0, min(t.rows, 4096)).to(rows.mesh.device) for t, rows in self.maps.items()}

    @cached_property
    def _weights(self) -> dict[str, ShardedTensor]:
        """The weights of each table."""
        weights = (item for c in self.collections.values() for item in c.state_dict().items())
        return {table_named(name): weight for name, weight in weights}

    @cached_property
    def _moments(self) -> dict[str, list[ShardedTensor]]:
        """What the optimizer keeps of the rows of each table."""
        found: dict[str, list[ShardedTensor]] = {name: [] for name in self._weights}
        for collection in self.collections.values():
            for name, moments in collection.fused_optimizer.state_dict()["state"].items():
                found[table_named(name)] = [*moments.values()]
        return found


def _gathered(whole: ShardedTensor, rows: Tensor) -> Tensor:
    """Return ``rows`` [n] of ``whole`` from the ranks that have them."""
    out = torch.zeros(len(rows), *whole.size()[1:], device=rows.device)
    for shard in whole.local_shards():
        first, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
        here = ((rows >= first) & (rows < first + count)).nonzero().squeeze(1)
        part = shard.tensor[rows[here] - first]
        if part.dim() == 1:
            out[here] = part
        else:
            column = shard.metadata.shard_offsets[1]
            out[here, column : column + part.shape[1]] = part
    torch.distributed.all_reduce(out)
    return out


def _within(rows: Tensor, first: int, count: int, *, fixed_shapes: bool) -> tuple[Tensor, Tensor | None]:
    """Return where those of ``rows`` [n] are that lie in [first, first + count), from ``first``.

    With fixed shapes they are repeated up to [n], and whether there is any is said besides, for then it is [n] zeros.
    """
    inside = (rows >= first) & (rows < first + count)
    if not fixed_shapes:
        return rows[inside] - first, None
    number, order = inside.sum(), inside.int().argsort(descending=True, stable=True)
    chosen = rows[order][torch.arange(len(rows), device=rows.device) % number.clamp(min=1)]
    return torch.where(number > 0, chosen - first, 0), number > 0
