"""Which id has which row, against a plain dictionary; rows that change hands begin anew; who is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config import ConfigError, DynamicEmbeddingArgs
from hstu.models.embedding import Table
from hstu.parallel import Mesh
from hstu.parallel.dynamic import BUCKETS, DynamicRows, DynamicTables, bucket_of
from tests.tiny import write_tiny
from tests.training.runs import losses, records, trainer

ROWS = 67  # 4 or 5 a bucket
IDS = 2**62


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh.create() as mesh:
        yield mesh


def row_map(mesh: Mesh, strategy: str = "lru", rows: int = ROWS) -> DynamicRows:
    table = Table(name="item", rows=rows, width=4, features=("item",), std=0.1, seed=0)
    return DynamicRows(table, DynamicEmbeddingArgs(capacity={"item": rows}, evict_strategy=strategy), mesh)  # type: ignore[arg-type]


class Reference:
    """The same in one dictionary a bucket: id -> [row, times it was met, the last lookup that met it]."""

    def __init__(self, strategy: str, rows: int) -> None:
        self.key = {"lru": lambda e: e[2], "lfu": lambda e: e[1]}[strategy]
        self.ends = [rows * b // BUCKETS for b in range(BUCKETS + 1)]
        self.known: list[dict[int, list[int]]] = [{} for _ in range(BUCKETS)]
        self.lookup = 0

    def __call__(self, ids: list[int], met: Counter[int]) -> list[int]:
        self.lookup += 1
        for bucket, known in enumerate(self.known):
            mine = sorted(i for i in met if int(bucket_of(torch.tensor(i))) == bucket)
            for i in mine:
                if i in known:
                    known[i][1:] = [known[i][1] + met[i], self.lookup]
            fresh = {i: [-1, met[i], self.lookup] for i in mine if i not in known}
            # In a tie who has a row keeps it, then who is met more often now, then the smaller id.
            order = sorted(known.items()) + sorted(fresh.items(), key=lambda pair: (-pair[1][1], pair[0]))
            order.sort(key=lambda pair: -self.key(pair[1]))
            first, last = self.ends[bucket], self.ends[bucket + 1] - 1  # the last one is for those without a row
            stays = dict(order[: last - first])
            free = sorted({*range(first, last)} - {e[0] for i, e in stays.items() if i in known})
            self.known[bucket] = stays
            for entry in stays.values():
                if entry[0] == -1:
                    entry[0] = free.pop()
        buckets = bucket_of(torch.tensor(ids)).tolist() if ids else []
        return [
            self.known[b][i][0] if i in self.known[b] else self.ends[b + 1] - 1
            for i, b in zip(ids, buckets, strict=True)
        ]


@pytest.mark.parametrize("strategy", ["lru", "lfu"])
def test_a_stream_of_ten_times_as_many_ids(mesh: Mesh, strategy: str) -> None:
    rows, wanted = row_map(mesh, strategy), Reference(strategy, ROWS)
    generator = torch.Generator().manual_seed(0)
    universe = torch.randint(IDS, (10 * ROWS,), generator=generator)
    evicted = given = without = 0
    for step in range(60):
        size = [0, 1, 7, 40, 300][step % 5]
        place = (len(universe) * torch.rand(size, generator=generator) ** 3).long()
        ids, met = universe[place], torch.rand(size, generator=generator) < 0.8
        known = {i for bucket in wanted.known for i in bucket}
        expected = wanted(ids.tolist(), Counter(ids[met].tolist()))
        now = {i for bucket in wanted.known for i in bucket}
        found, changed = rows(ids, met)
        evicted, given = evicted + len(known - now), given + len(now - known)
        without += len({*ids[met].tolist()} - now)
        assert changed.numel() == changed.unique().numel() == len(now - known)
        # Which of the free rows an id gets does not matter: compare who has one, and that each has its own.
        spare = torch.tensor([end - 1 for end in wanted.ends[1:]])
        assert torch.equal(torch.isin(found, spare), torch.isin(torch.tensor(expected).long(), spare))
        owners = {(int(i), int(r)) for i, r in zip(ids, found, strict=True) if int(r) not in spare.tolist()}
        assert len(owners) == len({i for i, _ in owners}) == len({r for _, r in owners})
        assert rows.tally.tolist() == [given, evicted, without]
    assert evicted > 20 and without > 20


def test_an_id_keeps_its_row_while_it_is_met(mesh: Mesh) -> None:
    rows, generator = row_map(mesh), torch.Generator().manual_seed(1)
    mine = torch.tensor([5, 2**61])
    first, _ = rows(mine, torch.ones(2, dtype=torch.bool))
    for _ in range(30):
        ids = torch.cat([mine, torch.randint(IDS, (50,), generator=generator)])
        found, changed = rows(ids, torch.ones(52, dtype=torch.bool))
        assert torch.equal(found[:2], first) and not torch.isin(first, changed).any()


def test_looking_gives_out_nothing(mesh: Mesh) -> None:
    rows = row_map(mesh)
    rows(torch.arange(30), torch.ones(30, dtype=torch.bool))
    before = {name: value.clone() for name, value in rows.state().items()}
    found, changed = rows(torch.arange(20, 90), None)
    assert changed.numel() == 0 and {*rows.state()} == {*before}
    assert all(torch.equal(value, before[name]) for name, value in rows.state().items())
    assert found[10:].unique().numel() <= BUCKETS  # ids that were never met share a row a bucket
    empty, _ = rows(torch.zeros(0, dtype=torch.int64), None)
    assert empty.shape == (0,)


def test_more_ids_at_once_than_rows(mesh: Mesh) -> None:
    rows = row_map(mesh)
    ids = torch.arange(1000).repeat(2)
    found, changed = rows(ids, torch.ones(2000, dtype=torch.bool))
    assert rows.tally.tolist() == [ROWS - BUCKETS, 0, 1000 - (ROWS - BUCKETS)] and changed.numel() == ROWS - BUCKETS
    shared = torch.bincount(found, minlength=ROWS)
    assert (shared > 2).sum() == BUCKETS and torch.equal(found[:1000], found[1000:])


def test_ids_that_are_only_looked_at_get_no_row(mesh: Mesh) -> None:
    rows = row_map(mesh)
    ids, met = torch.tensor([3, 3, 4]), torch.tensor([False, True, False])
    found, changed = rows(ids, met)
    assert found[0] == found[1] and changed.tolist() == [found[0]]
    assert torch.equal(rows(ids, None)[0], found)


def test_buckets_are_even() -> None:
    for ids in (torch.arange(16_000), 64 * torch.arange(16_000), torch.randint(IDS, (16_000,))):
        counts = torch.bincount(bucket_of(ids), minlength=BUCKETS)
        assert counts.numel() == BUCKETS and counts.min() > 850 and counts.max() < 1150


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dynamic") / "synthetic", num_users=64)


def tables_of(run: Any) -> DynamicTables:
    tables = run.parallel.tables
    assert isinstance(tables, DynamicTables)
    return tables


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad", "rowwise_adagrad"])
def test_a_row_that_changes_hands_begins_anew(data: Path, tmp_path: Path, mesh: Mesh, optimizer: str) -> None:
    lines = ("DynamicEmbeddingArgs.capacity={'item_id': 67}", f"OptimizerArgs.sparse_optimizer_str={optimizer!r}")
    with trainer(data, tmp_path, "ranking", *lines, "TrainerArgs.max_train_iters=4", mesh=mesh) as run:
        tables, seen = tables_of(run), []
        (table,) = tables.maps
        renew = tables.renew

        def watch(table: Table, rows: torch.Tensor) -> None:
            (shard,) = tables._shards[table.name]
            before = shard.tensor.clone()
            moments = [moment.tensor.clone() for moment in tables._moments.get(table.name, [])]
            renew(table, rows)
            assert torch.equal(shard.tensor[rows], table.initial_rows(0, 67)[rows])
            kept = torch.ones(67, dtype=torch.bool).index_fill(0, rows, False)
            assert torch.equal(shard.tensor[kept], before[kept])
            for moment, past in zip(tables._moments.get(table.name, []), moments, strict=True):
                assert not moment.tensor[rows].any() and torch.equal(moment.tensor[kept], past[kept])
            dirty = not torch.equal(before[rows], table.initial_rows(0, 67)[rows])
            seen.append((rows.numel(), dirty, any(bool(past[rows].any()) for past in moments)))

        tables.renew = watch  # type: ignore[method-assign]
        run.train()
    assert len(tables._moments.get("item_id", [])) == {"adam": 2, "sgd": 0}.get(optimizer, 1)
    assert any(rows and dirty for rows, dirty, _ in seen[1:]), "rows that had learned something were given away"
    assert optimizer == "sgd" or any(moved for *_, moved in seen[1:])
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(tmp_path).values())


def test_items_and_contexts_at_once(tmp_path: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    data = write_tiny(tmp_path / "synthetic", num_users=64, num_types=50)
    lines = ("DynamicEmbeddingArgs.capacity={'item_id': 67, 'segment': 32}", "TrainerArgs.max_train_iters=4")
    with trainer(data, tmp_path / "run", "ranking", *lines, mesh=mesh) as run:
        run.train()
        sizes = {table.name: table.rows for table in run.parallel.tables.tables}
        assert (sizes["item_id"], sizes["segment"]) == (67, 32)
    first, *_, last = records(tmp_path / "run")
    for name in ("item_id", "segment"):
        assert 0 < first[f"rows_in_use/{name}"] <= last[f"rows_in_use/{name}"] <= 1
        assert last[f"evictions/{name}"] > 0 and last[f"ids_without_row/{name}"] > 0
        assert sum(f"table {name}: " in message for message in caplog.messages) == 1, "said once"


def test_evaluation_changes_nothing(data: Path, tmp_path: Path, mesh: Mesh) -> None:
    lines = ("DynamicEmbeddingArgs.capacity={'item_id': 67}", "RetrievalArgs.num_negatives=-1")
    with trainer(data, tmp_path, "retrieval", *lines, "TrainerArgs.max_train_iters=3", mesh=mesh) as run:
        run.train()
        tables = tables_of(run)
        before = {name: value.clone() for name, value in tables.row_maps().items()}
        scores = [run._score("test", 3)["metrics"] for _ in range(2)]
        assert scores[0] == scores[1] and all(torch.equal(x, before[n]) for n, x in tables.row_maps().items())


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("ranking", ("DynamicEmbeddingArgs.capacity={'item_id': 31}",), "capacity = .*needs at least 32 rows"),
        ("ranking", ("DynamicEmbeddingArgs.capacity={'item_id': 120}",), "'item_id' has 120 ids, so each can have"),
        ("ranking", ("DynamicEmbeddingArgs.capacity={'items': 40}",), "capacity: no table 'items'; tables: item_id"),
        ("ranking", ("DynamicEmbeddingArgs.evict_strategy='fifo'",), "evict_strategy = 'fifo'"),
        (
            "retrieval",
            ("DynamicEmbeddingArgs.capacity={'item_id': 40}",),
            "negatives drawn from all items would have no",
        ),
        (
            "ranking",
            ("DynamicEmbeddingArgs.capacity={'item_id': 40}", "EmbeddingArgs.sharding_type='data_parallel'"),
            "EmbeddingArgs.sharding_type = 'data_parallel'.*'item_id' is dynamic",
        ),
        (
            "ranking",
            ("DynamicEmbeddingArgs.capacity={'item_id': 40}", "EmbeddingArgs.uvm_caching_tables=('item_id',)"),
            "uvm_caching_tables.*'item_id' is dynamic",
        ),
        (
            "ranking",
            ("DynamicEmbeddingArgs.capacity={'item_id': 40}", "TrainerArgs.pipeline_type='native'"),
            "capacity.*pipeline_type = 'none'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    data: Path, tmp_path: Path, mesh: Mesh, task: str, lines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), trainer(data, tmp_path, task, *lines, mesh=mesh):
        pass
