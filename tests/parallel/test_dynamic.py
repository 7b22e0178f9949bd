"""Which id has which row, against plain loops over a dictionary; rows that change hands begin anew; who is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hstu.config import ConfigError, DynamicEmbeddingArgs
from hstu.inference import export
from hstu.models.embedding import Table
from hstu.models.negatives import random_columns
from hstu.ops.loops import torch_only
from hstu.ops.row_sets import FREE, PARTS
from hstu.parallel import Mesh
from hstu.parallel.compiled_row_map import CompiledRowMap
from hstu.parallel.dynamic import DynamicRows, DynamicTables
from hstu.parallel.row_history import RowHistory
from hstu.parallel.row_map import RowMap, part_of
from tests.tiny import write_tiny
from tests.training.runs import losses, records, trainer

ROWS = 67  # 3 or 4 of a part, and one for ids without one
IDS = 2**62
KINDS = ("torch", "fixed shapes", "compiled")
STRATEGIES = {
    "lru": {},
    "lru-twice": {"min_count": 2},
    "lfu": {"evict_strategy": "lfu"},
    "lfu-twice": {"evict_strategy": "lfu", "min_count": 2},
    "ttl": {"evict_strategy": "ttl", "ttl": 4},
    "none": {"evict_strategy": "none"},
    "none-twice": {"evict_strategy": "none", "min_count": 2},
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh.create() as mesh:
        yield mesh


def args_of(strategy: str, rows: int) -> DynamicEmbeddingArgs:
    return DynamicEmbeddingArgs(capacity={"item": rows}, **STRATEGIES[strategy])  # type: ignore[arg-type]


def rows_of(mesh: Mesh, strategy: str = "lru", rows: int = ROWS) -> DynamicRows:
    table = Table(name="item", rows=rows, width=4, features=("item",), std=0.1, seed=0)
    return DynamicRows(table, args_of(strategy, rows), mesh)


def row_map(strategy: str, rows: int, kind: str = "torch", parts: range = range(PARTS)) -> RowMap:
    args = rows, args_of(strategy, rows), parts, torch.device("cpu")
    return CompiledRowMap(*args) if kind == "compiled" else RowMap(*args, fixed_shapes=kind == "fixed shapes")


class Reference:
    """The same, one id after another."""

    def __init__(self, strategy: str, rows: int) -> None:
        self.args, self.usable = args_of(strategy, rows), rows - PARTS
        self.sets = -(-self.usable // (PARTS * 8))
        self.table: dict[int, list[int | None]] = {}  # row -> id, score
        self.rows_of_set = {
            (part, number): [
                r for w in range(8) if (r := w * PARTS * self.sets + part * self.sets + number) < self.usable
            ]
            for part in range(PARTS)
            for number in range(self.sets)
        }
        self.owner: dict[int, int] = {}  # row -> id
        self.row: dict[int, int] = {}  # id -> row
        self.score: dict[int, int] = {}  # row -> score
        self.counters = 8 * self.sets * 8
        self.sketch: Counter[tuple[int, int]] = Counter()
        self.clock = 0
        self.given = self.evicted = self.without = 0

    @staticmethod
    def hashes(ids: list[int], count: int, bound: int, seed: int, salt: int = 0) -> dict[int, list[tuple[int, int]]]:
        """Return the part of each id and ``count`` numbers below ``bound``."""
        keys = torch.tensor(ids, dtype=torch.int64)
        drawn = random_columns(keys + torch.tensor(salt) * -7046029254386353131, count, bound, seed).tolist()
        parts = part_of(keys).tolist()
        return {i: [(part, n) for n in numbers] for i, part, numbers in zip(ids, parts, drawn, strict=True)}

    def __call__(self, ids: list[int], met: list[bool]) -> list[int]:
        self.clock += 1
        times = Counter(i for i, m in zip(ids, met, strict=True) if m)
        lfu = self.args.evict_strategy == "lfu"
        for i, count in times.items():
            if i in self.row:
                self.score[self.row[i]] = self.score[self.row[i]] + count if lfu else self.clock
        new = {i: times[i] for i in sorted(times) if i not in self.row}
        if lfu or self.args.min_count > 1:
            new = self.counted(new)
        coming: dict[tuple[int, int], list[int]] = {}
        due = [i for i in new if new[i] >= self.args.min_count]
        for i, (a, b) in self.hashes(due, 2, self.sets, 1).items():
            coming.setdefault(b if self.worth(b) < self.worth(a) else a, []).append(i)
        for place, group in coming.items():
            group.sort(key=lambda i: -new[i])
            rows = sorted(self.rows_of_set[place], key=lambda row: self.score.get(row, -1))
            for number, i in enumerate(group):
                self.give(i, new[i], rows[number] if number < len(rows) else None)
        parts = part_of(torch.tensor(ids, dtype=torch.int64)).tolist()
        return [self.row.get(i, self.usable + part) for i, part in zip(ids, parts, strict=True)]

    def give(self, i: int, count: int, row: int | None) -> None:
        if row in self.owner and not self.loses(self.score[row], count) or row is None:
            self.without += 1
            return
        if row in self.owner:
            self.evicted += 1
            del self.row[self.owner[row]]
        self.given += 1
        self.owner[row], self.row[i] = i, row
        self.score[row] = count if self.args.evict_strategy == "lfu" else self.clock

    def loses(self, score: int, count: int) -> bool:
        return {
            "lru": score < self.clock,
            "lfu": score < count,
            "ttl": self.clock - score > (self.args.ttl or 0),
            "none": False,
        }[self.args.evict_strategy]

    def worth(self, place: tuple[int, int]) -> int:
        scores = [self.score.get(row, -1) for row in self.rows_of_set[place]]
        return -scores.count(-1) or min(scores)

    def counted(self, new: dict[int, int]) -> dict[int, int]:
        cells = self.hashes([*new], 2, self.counters, 2)
        old = self.hashes([*new], 4, self.counters, 3, salt=self.clock)
        for cell in {cell for drawn in old.values() for cell in drawn}:
            self.sketch[cell] //= 2
        found = {i: min(255, min(self.sketch[cell] for cell in cells[i]) + new[i]) for i in new}
        for i in new:
            for cell in cells[i]:
                self.sketch[cell] = max(self.sketch[cell], found[i])
        return found


def stream(rows: int, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids of ten times as many as there are rows, some of them often; and which are met."""
    generator = torch.Generator().manual_seed(0)
    universe = torch.randint(-IDS, IDS, (10 * rows,), generator=generator)
    for step in range(steps):
        size = [0, 1, 7, rows // 2, 4 * rows][step % 5]
        place = (len(universe) * torch.rand(size, generator=generator) ** 4).long()
        yield universe[place], torch.rand(size, generator=generator) < 0.8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [ROWS, 400])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stream_of_ten_times_as_many_ids(strategy: str, rows: int, kind: str) -> None:
    own, wanted = row_map(strategy, rows, kind), Reference(strategy, rows)
    tally = torch.zeros(3, dtype=torch.int64)
    for ids, met in stream(rows, 30):
        before = dict(wanted.row)
        expected = wanted(ids.tolist(), met.tolist())
        found = own.look_up(ids, met)
        assert found.rows.tolist() == expected
        assert own.row_of(found.places[found.places < own.size]).tolist() == [r for r in expected if r < own.usable]
        assert sorted(found.changed[found.changed >= 0].tolist()) == sorted(
            row for i, row in wanted.row.items() if before.get(i) != row
        )
        assert sorted(found.evicted[found.evicted != FREE].tolist()) == sorted(before.keys() - wanted.row.keys())
        tally += found.tally
        assert tally.tolist() == [wanted.given, wanted.evicted, wanted.without]
    assert wanted.given > 30 and wanted.without > 0
    assert (wanted.evicted > 0) == ("none" not in strategy)


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_every_rank_count_has_the_same_rows(kind: str) -> None:
    """And the same state to the bit, whatever computes it."""
    whole = row_map("lru-twice", 400)
    parts = [row_map("lru-twice", 400, kind, range(r, PARTS, 3)) for r in range(3)]
    for ids, met in stream(400, 10):
        found = whole.look_up(ids, met)
        for rank, own in enumerate(parts):
            here = part_of(ids) % 3 == rank
            assert torch.equal(own.look_up(ids[here], met[here]).rows, found.rows[here])
    state = whole.state()
    pieces = {name: x for own in parts for name, x in own.state().items()}
    assert pieces.keys() == state.keys() and all(torch.equal(x, state[name]) for name, x in pieces.items())


def test_no_lookup_on_a_gpu_waits() -> None:
    """Where the device is another one, a tensor whose shape or value the host needs would raise here."""
    with FakeTensorMode(), torch_only():
        for strategy in STRATEGIES:
            own = row_map(strategy, 400, "fixed shapes")
            history = RowHistory(own)
            ids = torch.zeros(300, dtype=torch.int64)
            for met in (ids > 0, None):
                found = own.look_up(ids, met, ahead=met is not None)
                assert found.rows.shape == (300,)
            history.note(1, found.places, found.evicted)
            with pytest.raises(DataDependentOutputException):
                found.tally.tolist()


def test_an_id_keeps_its_row_while_it_is_met(mesh: Mesh) -> None:
    rows, generator = rows_of(mesh), torch.Generator().manual_seed(1)
    mine = torch.tensor([5, 2**61])
    first, _ = rows(mine, torch.ones(2, dtype=torch.bool))
    for _ in range(30):
        ids = torch.cat([mine, torch.randint(IDS, (50,), generator=generator)])
        found, change = rows(ids, torch.ones(52, dtype=torch.bool))
        assert torch.equal(found[:2], first) and not torch.isin(first, change.rows).any()


def test_looking_gives_out_nothing(mesh: Mesh) -> None:
    rows = rows_of(mesh, "lfu")
    rows(torch.arange(30), torch.ones(30, dtype=torch.bool))
    before = {name: value.clone() for name, value in rows.state().items()}
    found, change = rows(torch.arange(20, 90), None)
    assert change.rows.numel() == 0 and {*rows.state()} == {*before}
    assert all(torch.equal(value, before[name]) for name, value in rows.state().items())
    assert found[10:].unique().numel() <= PARTS  # ids that were never met share a row a part
    empty, _ = rows(torch.zeros(0, dtype=torch.int64), None)
    assert empty.shape == (0,)


def test_more_ids_at_once_than_rows(mesh: Mesh) -> None:
    rows = rows_of(mesh)
    ids = torch.arange(1000).repeat(2)
    found, change = rows(ids, torch.ones(2000, dtype=torch.bool))
    rows.apply(change, 1)
    assert rows.tally.tolist() == [ROWS - PARTS, 0, 1000 - (ROWS - PARTS)] and change.rows.numel() == ROWS - PARTS
    shared = torch.bincount(found, minlength=ROWS)
    assert (shared > 2).sum() == PARTS and torch.equal(found[:1000], found[1000:])


@pytest.mark.parametrize("rows", [32, 67, 5_000, 20_000])
def test_nearly_every_row_can_be_used(mesh: Mesh, rows: int) -> None:
    """As many ids as there are rows, a few at a time: two sets for each leave hardly a row free."""
    own = rows_of(mesh, "none", rows)
    usable = rows - PARTS
    for ids in torch.randperm(usable, generator=torch.Generator().manual_seed(0)).split(max(1, usable // 20)):
        own.apply(own(ids, torch.ones_like(ids, dtype=torch.bool))[1], 1)
    found, _ = own(torch.arange(usable), None)
    assert int(own.tally[0]) == (found < usable).sum() == found[found < usable].unique().numel()
    assert (found < usable).float().mean() > (0.95 if rows > 1000 else 0.5)


def test_ids_that_are_only_looked_at_get_no_row(mesh: Mesh) -> None:
    rows = rows_of(mesh)
    ids, met = torch.tensor([3, 3, 4]), torch.tensor([False, True, False])
    found, change = rows(ids, met)
    assert found[0] == found[1] and change.rows.tolist() == [found[0]]
    assert torch.equal(rows(ids, None)[0], found)


def test_what_cannot_be_an_id_has_no_row(mesh: Mesh) -> None:
    rows = rows_of(mesh)
    rows(torch.arange(10), torch.ones(10, dtype=torch.bool))
    found, change = rows(torch.tensor([FREE, FREE - 1, FREE]), torch.ones(3, dtype=torch.bool))
    assert (found >= ROWS - PARTS).all() and change.rows.numel() == 0


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_row_is_given_when_an_id_is_met_often_enough(times: int) -> None:
    args = DynamicEmbeddingArgs(min_count=times)
    rows = RowMap(40_000, args, range(PARTS), torch.device("cpu"), fixed_shapes=False)
    ids, with_row = torch.arange(200), []
    for _ in range(times + 3):
        found = rows.look_up(ids, torch.ones(200, dtype=torch.bool)).rows
        with_row.append(int((found < rows.usable).sum()))
    assert sum(with_row[: times - 1]) <= 10, "few share both counters with others"
    assert with_row[times - 1] >= 180 and with_row[-1] == 200, "few counters were halved in between"


def test_what_lies_long_ago_does_not_count() -> None:
    """Ids met once each, for ever: where counters only rose, every id would soon look like one met often."""
    rows = RowMap(400, DynamicEmbeddingArgs(min_count=3), range(PARTS), torch.device("cpu"), fixed_shapes=False)
    given = [
        int(rows.look_up(torch.arange(100) + 100 * step, torch.ones(100, dtype=torch.bool)).tally[0])
        for step in range(200)
    ]
    assert sum(given[100:]) < 0.1 * 100 * 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["lru", "lfu-twice"])
def test_the_map_as_it_was_before_the_lookups_ahead(strategy: str, kind: str) -> None:
    own, plain = (row_map(strategy, ROWS, kind) for _ in range(2))
    states = []
    for number, (ids, met) in enumerate(stream(ROWS, 15)):
        states.append({name: value.clone() for name, value in plain.state().items()})
        plain.look_up(ids, met)
        own.look_up(ids, met, ahead=number > 9)
    for state in [*states[10:], plain.state()]:
        then = own.state()
        assert all(torch.equal(then[name], value) for name, value in state.items())
        if own.overwritten:
            own.forget()
    assert not torch.equal(then["clock"], states[-1]["clock"])


def test_history_tells_what_changed(mesh: Mesh) -> None:
    """Ids that are there and were looked up since a step, and ids that were there at it and are not now."""
    rows, held = rows_of(mesh, rows=400), [set()]
    trained: dict[int, int] = {}
    for step, (ids, met) in enumerate(stream(400, 12), 1):
        found, change = rows(ids, met)
        rows.apply(change, step)
        trained |= dict.fromkeys(ids[found < rows.map.usable].tolist(), step)
        held.append({int(i) for part in range(PARTS) for i in rows.held(part).ids})
    for since in (0, 3, 9, 12):
        parts = [rows.held(part, since) for part in range(PARTS)]
        assert {int(i) for p in parts for i in p.ids} == {i for i in held[-1] if trained[i] > since}
        assert all(trained[int(i)] == int(s) for p in parts for i, s in zip(p.ids, p.steps, strict=True))
        assert {int(i) for p in parts for i in p.evicted} >= held[since] - held[-1]
        assert not {int(i) for p in parts for i in p.evicted} & held[-1]
        for p in parts:
            assert torch.equal(rows(p.ids, None)[0], p.rows)


def test_parts_are_even() -> None:
    for ids in (torch.arange(16_000), 64 * torch.arange(16_000), torch.randint(IDS, (16_000,))):
        counts = torch.bincount(part_of(ids), minlength=PARTS)
        assert counts.numel() == PARTS and counts.min() > 850 and counts.max() < 1150


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
            (shard,) = tables._weights[table.name].local_shards()
            before = shard.tensor.clone()
            moments = [moment.local_shards()[0].tensor.clone() for moment in tables._moments[table.name]]
            renew(table, rows)
            assert torch.equal(shard.tensor[rows], table.initial_rows(0, 67)[rows])
            kept = torch.ones(67, dtype=torch.bool).index_fill(0, rows, False)
            assert torch.equal(shard.tensor[kept], before[kept])
            for whole, past in zip(tables._moments[table.name], moments, strict=True):
                (moment,) = whole.local_shards()
                assert not moment.tensor[rows].any() and torch.equal(moment.tensor[kept], past[kept])
            dirty = not torch.equal(before[rows], table.initial_rows(0, 67)[rows])
            seen.append((rows.numel(), dirty, any(bool(past[rows].any()) for past in moments)))

        tables.renew = watch  # type: ignore[method-assign]
        run.train()
    assert len(tables._moments["item_id"]) == {"adam": 2, "sgd": 0}.get(optimizer, 1)
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
        scores = [run.assembly.score("test", 3)["metrics"] for _ in range(2)]
        assert scores[0] == scores[1] and all(torch.equal(x, before[n]) for n, x in tables.row_maps().items())


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("ranking", ("DynamicEmbeddingArgs.capacity={'item_id': 31}",), "capacity = .*must be at least 32"),
        ("ranking", ("DynamicEmbeddingArgs.capacity={'items': 40}",), "capacity: no table 'items'; tables: item_id"),
        ("ranking", ("DynamicEmbeddingArgs.evict_strategy='fifo'",), "evict_strategy = 'fifo'"),
        ("ranking", ("DynamicEmbeddingArgs.evict_strategy='ttl'",), "ttl = None: goes with .*'ttl' and no other"),
        ("ranking", ("DynamicEmbeddingArgs.ttl=5",), "ttl = 5: goes with .*that is 'lru'"),
        (
            "ranking",
            ("DynamicEmbeddingArgs.evict_strategy='ttl'", "DynamicEmbeddingArgs.ttl=0"),
            "ttl = 0: must be at least 1",
        ),
        ("ranking", ("DynamicEmbeddingArgs.min_count=0",), "min_count = 0: must be at least 1 and at most 255"),
        ("ranking", ("DynamicEmbeddingArgs.min_count=256",), "min_count = 256"),
        (
            "retrieval",
            ("DynamicEmbeddingArgs.capacity={'item_id': 40}", "RetrievalArgs.loss='full_softmax'"),
            "'item_id': items not met yet have no row.*'in_batch' or 'uniform'",
        ),
        (
            "retrieval",
            (
                "DynamicEmbeddingArgs.capacity={'item_id': 40}",
                "RetrievalArgs.loss='bce'",
                "RetrievalArgs.num_negatives=1",
            ),
            "'item_id': bce draws its negatives from all items",
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
    ],
)
def test_what_makes_no_sense_is_refused(
    data: Path, tmp_path: Path, mesh: Mesh, task: str, lines: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message), trainer(data, tmp_path, task, *lines, mesh=mesh):
        pass


def test_an_export_since_a_step(data: Path, tmp_path: Path, mesh: Mesh) -> None:
    """The rows that changed after it, as the tables have them, and the ids that are gone, in original ids."""
    lines = ("DynamicEmbeddingArgs.capacity={'item_id': 67}", "TrainerArgs.train_batch_size=4")
    with trainer(data, tmp_path / "run", "ranking", *lines, "TrainerArgs.max_train_iters=9", mesh=mesh) as run:
        tables, seen, originals = tables_of(run), {}, run.dataset.vocabulary("item_id")
        (table,) = tables.maps
        begin = tables.begin

        def watch() -> None:
            begin()
            seen[tables.step] = {int(i) for part in range(PARTS) for i in tables.maps[table].held(part).ids}

        tables.begin = watch  # type: ignore[method-assign]
        run.train()
        (shard,) = tables._weights["item_id"].local_shards()
        opened = export.Opened(assembly=run.assembly, run=run.run, checkpoint=tmp_path, step=9, columns={})
        for since in (6, 0):
            export.export(opened, tmp_path / f"since {since}", export.ExportOptions(since=since))
        for since, wrong in ((-1, "from 0 to that"), (10, "the checkpoint is of step 9")):
            with pytest.raises(ValueError, match=wrong):
                export.export(opened, tmp_path / "none", export.ExportOptions(since=since))
    now, some, gone = (
        pl.read_parquet(tmp_path / folder / "tables" / f"item_id{end}.parquet")
        for folder, end in (("since 0", ""), ("since 6", ""), ("since 6", ".evicted"))
    )
    assert {*now["number"]} == seen[9] and 0 < some.height < now.height
    assert {*some["number"]} == {*now.filter(pl.col("step") > 6)["number"]} and some["step"].min() > 6
    assert {*gone["number"]} >= seen[6] - seen[9] and not {*gone["number"]} & seen[9] and gone.height > 0
    for frame in (some, gone):
        assert [str(x) for x in frame["id"]] == [str(originals[number]) for number in frame["number"]]
    rows, _ = tables.maps[table](torch.tensor(some["number"].to_list()), None)
    assert torch.equal(torch.tensor(some["weights"].to_list()), shard.tensor[rows])
