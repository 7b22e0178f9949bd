"""Knobs of the embedding tables: how they lie over ranks, and which of them have fewer rows than ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hstu.config.base import Args

ShardingType = Literal["auto", "row_wise", "table_wise", "column_wise", "data_parallel"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingArgs(Args):
    """How tables are laid out over ranks: one type for all, or by table name.

    ``auto`` leaves row-, table- or column-wise to TorchRec's planner; ``data_parallel`` is whole on every rank.
    """

    #: Of all tables that table_sharding_types does not name.
    sharding_type: ShardingType = "row_wise"
    #: By name of a table.
    table_sharding_types: dict[str, ShardingType] = field(default_factory=dict)
    #: Sharded tables that stay in host memory, with a cache on the GPU. Without a GPU all tables are there.
    uvm_caching_tables: tuple[str, ...] = ()
    #: Share of their rows that the cache holds.
    uvm_cache_load_factor: float = 0.2

    limits: ClassVar = {"uvm_cache_load_factor": (0, 1)}

    def of(self, table: str) -> str:
        """Return the sharding type of ``table``."""
        return self.table_sharding_types.get(table, self.sharding_type)

    def validate(self) -> None:
        if not 0 < self.uvm_cache_load_factor <= 1:
            raise self.error("uvm_cache_load_factor", "must be above 0 and at most 1")
        for table in self.uvm_caching_tables:
            if self.of(table) == "data_parallel":
                raise self.error("uvm_caching_tables", f"table {table!r} is data_parallel: a dense weight on the GPU")


@dataclass(frozen=True, kw_only=True)
class DynamicEmbeddingArgs(Args):
    """Tables whose rows go to the ids that training meets; see ``hstu.parallel.dynamic``.

    An id gets a row when a training batch meets it, for the ``min_count``-th time. When no row is free for it, it takes
    that of another id, if ``evict_strategy`` lets it, with fresh weights and without the other's past. Ids without a
    row share one of a few rows kept for them; only training gives out rows.
    """

    #: Rows by table, at least 32. Other tables have a row for each id.
    capacity: dict[str, int] = field(default_factory=dict)
    #: Who loses a row: "lru", the id not met for longest; "lfu", the one met least often, to an id met more often
    #: lately; "ttl", one not met for ``ttl`` batches; "none", nobody.
    evict_strategy: Literal["lru", "lfu", "ttl", "none"] = "lru"
    #: Training batches of the whole job for which a row is kept for its id, with evict_strategy = "ttl".
    ttl: int | None = None
    #: How often an id has to be met, lately, before it gets a row; at most 255.
    min_count: int = 1

    limits: ClassVar = {"capacity": (32, 2**40), "ttl": (1, 2**40), "min_count": (1, 255)}

    def validate(self) -> None:
        if (self.ttl is None) == (self.evict_strategy == "ttl"):
            raise self.error(
                "ttl", f"goes with evict_strategy = 'ttl' and no other, and that is {self.evict_strategy!r}"
            )

    def check(self, embedding: EmbeddingArgs) -> None:
        """Raise ``ConfigError`` for what dynamic tables do not go with."""
        for table in self.capacity:
            if embedding.of(table) == "data_parallel":
                raise embedding.error("sharding_type", f"table {table!r} is dynamic and has to be sharded; use "
                                      "'row_wise', or leave it out of DynamicEmbeddingArgs.capacity")  # fmt: skip
            if table in embedding.uvm_caching_tables:
                raise embedding.error("uvm_caching_tables", f"table {table!r} is dynamic: a row that changes hands is "
                                      "written outside the cache; choose one of the two")  # fmt: skip
