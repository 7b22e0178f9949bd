"""Tables with fewer rows than ids: which row each id has, on which rank that is known, and who loses one.

TorchRec's managed collision, cut into buckets by a hash of the id. Each bucket has its own rows and forgets its own
ids, and belongs to one rank: so no number of ranks changes which id has which row. TorchRec's own collection instead
evicts over whatever rows lie on a rank, and keeps ids that wait for an eviction where no checkpoint sees them; here
every lookup evicts, and nothing waits.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor

from hstu.config import DynamicEmbeddingArgs, EmbeddingArgs, OptimizerArgs
from hstu.data.batch import POOL, keyed_features
from hstu.models.embedding import Table
from hstu.parallel.embedding import ShardedTables
from hstu.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

BUCKETS = 16
_POLICIES = {"lru": LRU_EvictionPolicy, "lfu": LFU_EvictionPolicy, "distance_lfu": DistanceLFU_EvictionPolicy}
_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as int64: Fibonacci hashing


def bucket_of(ids: Tensor) -> Tensor:
    """Return the bucket of each id, [n] int64 in [0, BUCKETS)."""
    return (ids * _GOLDEN >> 60) & (BUCKETS - 1)


class _Bucket(MCHManagedCollisionModule):
    """Rows [start, stop) of a table and the ids that have them; the last one is for ids without a row."""

    def __init__(self, start: int, stop: int, strategy: str, device: torch.device) -> None:
        super().__init__(
            zch_size=stop - start,
            device=device,
            eviction_policy=_POLICIES[strategy](),
            eviction_interval=1,
            output_global_offset=start,
        )

    @torch.no_grad()
    def admit(self, ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Give rows to ``ids`` [n], each once, met ``counts`` [n] times now.

        Returns:
            The rows with a new id [m], and how many of them had another one and how many of ``ids`` got none, [2].
        """
        free = self._free()
        self._current_iter_tensor += 1
        self._current_iter = int(self._current_iter_tensor)
        times = {"last_access_iter": torch.full_like(ids, self._current_iter)}
        self._update_and_evict(ids, counts, times)
        changed = self.evict()
        assert changed is not None
        without = (self.rows(ids) == self._output_global_offset + self._zch_size - 1).sum()
        return changed, torch.stack([changed.numel() - (free - self._free()), without])

    def _free(self) -> Tensor:
        """Return how many rows no id has."""
        return (self._mch_sorted_raw_ids == self._delimiter).sum()

    def rows(self, ids: Tensor) -> Tensor:
        """Return the row of each of ``ids`` [n]."""
        return self.remap({"": JaggedTensor(values=ids, lengths=ids.new_tensor([ids.numel()]))})[""].values()

    def state(self) -> dict[str, Tensor]:
        """Return all that the next lookup depends on; loading writes into it."""
        own = {"ids": self._mch_sorted_raw_ids, "rows": self._mch_remapped_ids_mapping}
        return own | self._mch_metadata | {"lookups": self._current_iter_tensor}


class DynamicRows:
    """The map from the ids of one table to its rows, spread over all ranks.

    Args:
        table: The table.
        args: Who loses a row.
        mesh: The ranks.
    """

    def __init__(self, table: Table, args: DynamicEmbeddingArgs, mesh: Mesh) -> None:
        self.mesh = mesh
        ends = [table.rows * bucket // BUCKETS for bucket in range(BUCKETS + 1)]
        self.buckets = {
            bucket: _Bucket(ends[bucket], ends[bucket + 1], args.evict_strategy, mesh.device)
            for bucket in range(mesh.rank, BUCKETS, mesh.world_size)
        }
        #: On all ranks: rows given out, those of them that another id lost, ids of a lookup that got none; [3].
        self.tally = torch.zeros(3, dtype=torch.int64, device=mesh.device)

    def __call__(self, ids: Tensor, met: Tensor | None) -> tuple[Tensor, Tensor]:
        """Look up ids of this rank; all ranks do so at once.

        Args:
            ids: [n] int64.
            met: [n] bool, those that get a row, an id of another rank included; None gives out none.

        Returns:
            The row of each id [n], and the rows that have a new id, the same on every rank.
        """
        ranks = self.mesh.world_size
        asked, inverse = ids.unique(return_inverse=True)
        counts = torch.zeros_like(asked)
        if met is not None and self.mesh.tensor.rank == 0:  # tensor ranks hold the same tokens: they count once
            counts = counts.index_add(0, inverse, met.long())
        owner = bucket_of(asked) % ranks
        order = owner.argsort(stable=True)
        questions, sizes = self.mesh.exchange(
            torch.stack([asked, counts], 1)[order], torch.bincount(owner, minlength=ranks).tolist()
        )
        rows, changed, tally = self._answer(*questions.unbind(1), admit=met is not None)
        answers, _ = self.mesh.exchange(rows, sizes)
        news = torch.cat([tally, changed])
        news, sizes = self.mesh.exchange(news.repeat(ranks), [news.numel()] * ranks)
        parts = news.split(sizes)
        changed = torch.cat([part[2:] for part in parts])
        self.tally[0] += changed.numel()
        self.tally[1:] += torch.stack([part[:2] for part in parts]).sum(0)
        return torch.empty_like(asked).index_copy(0, order, answers)[inverse], changed

    def _answer(self, ids: Tensor, counts: Tensor, *, admit: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows of ids of this rank's buckets [n] after ``counts`` [n] of them were met, those with a new
        id, and the sums of what ``_Bucket.admit`` counts.
        """
        bucket, rows, changed, tally = bucket_of(ids), torch.empty_like(ids), [ids[:0]], ids.new_zeros(2)
        for number, owned in self.buckets.items():
            mine = bucket == number
            if admit:
                met = mine & (counts > 0)
                each, inverse = ids[met].unique(return_inverse=True)
                fresh, counted = owned.admit(each, torch.zeros_like(each).index_add(0, inverse, counts[met]))
                changed.append(fresh)
                tally += counted
            rows[mine] = owned.rows(ids[mine])
        return rows, torch.cat(changed), tally

    def state(self) -> dict[str, Tensor]:
        """Return this rank's part of the map, by names that no number of ranks changes."""
        own = {f"{number}/{name}": x for number, owned in self.buckets.items() for name, x in owned.state().items()}
        return own | {"tally": self.tally}


class DynamicTables(ShardedTables):
    """Sharded tables, of which some have fewer rows than ids.

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
    ) -> None:
        super().__init__(tables, embedding, optimizer, mesh)
        self.maps = {table: DynamicRows(table, dynamic, mesh) for table in tables if table.name in dynamic.capacity}
        self._warned: set[str] = set()

    def row_maps(self) -> dict[str, Tensor]:
        states = {table.name: rows.state() for table, rows in self.maps.items()}
        return {f"{table}/{name}": value for table, state in states.items() for name, value in state.items()}

    def counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for table, rows in self.maps.items():
            given, evicted, without = rows.tally.tolist()
            used = (given - evicted) / (table.rows - BUCKETS)
            found |= {
                f"rows_in_use/{table.name}": used,
                f"evictions/{table.name}": float(evicted),
                f"ids_without_row/{table.name}": float(without),
            }
            if without and table.name not in self._warned and rows.mesh.is_main:
                logger.warning("table %s: %d times an id of a training batch got no row and shared one with others; if "
                               "that goes on, raise DynamicEmbeddingArgs.capacity", table.name, without)  # fmt: skip
                self._warned.add(table.name)
        return found

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        names, sizes = [*features.keys()], [*features.length_per_key()]
        values = dict(zip(names, features.values().split(sizes), strict=True))
        for table, rows in self.maps.items():
            present = [name for name in table.features if name in values]
            parts = [values[name] for name in present]
            met = torch.cat([torch.full_like(x, not n.startswith(POOL)) for n, x in zip(present, parts, strict=True)])
            found, changed = rows(torch.cat(parts), met > 0 if self.training else None)
            values |= dict(zip(present, found.split([x.numel() for x in parts]), strict=True))
            self.renew(table, changed)
        lengths = features.lengths().view(len(names), -1)
        return super().forward(keyed_features(names, torch.cat([*values.values()]), lengths, sizes))

    @torch.no_grad()
    def renew(self, table: Table, rows: Tensor) -> None:
        """Give ``rows`` [n] of ``table`` new weights, and forget what the optimizer knows of them."""
        for shard in self._shards.get(table.name, []):
            (row, column), (count, width) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            own = rows[(rows >= row) & (rows < row + count)]
            fresh = nn.functional.pad(self._fresh[table.name], (0, column + width))[:, column : column + width]
            shard.tensor[own - row] = fresh[own % len(fresh)]
        for shard in self._moments.get(table.name, []):
            row, count = shard.metadata.shard_offsets[0], shard.metadata.shard_sizes[0]
            shard.tensor[rows[(rows >= row) & (rows < row + count)] - row] = 0

    @cached_property
    def _fresh(self) -> dict[str, Tensor]:
        """Weights for rows that begin anew, [some, width] of each table."""
        return {t.name: t.initial_rows(0, min(t.rows, 4096)).to(rows.mesh.device) for t, rows in self.maps.items()}

    @cached_property
    def _shards(self) -> dict[str, list[Any]]:
        """This rank's parts of the tables' weights."""
        weights = (item for c in self.collections.values() for item in c.state_dict().items())
        return {name.split(".")[-2]: weight.local_shards() for name, weight in weights}

    @cached_property
    def _moments(self) -> dict[str, list[Any]]:
        """This rank's parts of what the optimizer keeps of each row."""
        found: dict[str, list[Any]] = {}
        for collection in self.collections.values():
            for name, moments in collection.fused_optimizer.state_dict()["state"].items():
                found[name.split(".")[-2]] = [shard for x in moments.values() for shard in x.local_shards()]
        return found
