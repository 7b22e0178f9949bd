"""What the config says of tables reaches TorchRec's planner."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torchrec.distributed.planner import planners

from hstu.config import ConfigError, EmbeddingArgs, OptimizerArgs
from hstu.models.embedding import Table
from hstu.parallel import embedding as module
from hstu.parallel.embedding import _constraints, place
from tests.tiny import write_tiny
from tests.training.runs import trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("layout") / "synthetic", num_users=40)


def test_kernels_and_types(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    caplog.set_level(logging.INFO, "hstu")
    own = dict(table_sharding_types={"b": "table_wise"}, uvm_caching_tables=("b",), uvm_cache_load_factor=0.3)
    args = EmbeddingArgs(sharding_type="auto", **own)  # type: ignore[arg-type]
    found = _constraints("a", args, "adam", "cuda", False)
    assert found.sharding_types == ["row_wise", "table_wise", "column_wise"] and found.compute_kernels == ["fused"]
    assert _constraints("a", args, "rowwise_adagrad", "cuda", False).sharding_types == [
        "row_wise",
        "table_wise",
    ]
    cached = _constraints("b", args, "adam", "cuda", True)
    assert (cached.sharding_types, cached.compute_kernels) == (["table_wise"], ["fused_uvm_caching"])
    assert cached.cache_params is not None and cached.cache_params.load_factor == 0.3
    assert cached.cache_params.prefetch_pipeline
    assert _constraints("b", args, "adam", "cpu", False).compute_kernels == ["fused"]
    assert "uvm_caching_tables: b is in host memory as all tables are" in caplog.text


@pytest.mark.parametrize("limit", [0.0, 0.1])
def test_each_lookup_is_clipped_on_its_own_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """There equal ids are looked up once, their gradients summed, unless that would change the clipping."""

    class Asked(Exception):
        pass

    def ask(*, use_index_dedup: bool, **_: object) -> None:
        raise Asked(use_index_dedup)

    monkeypatch.setattr(module, "EmbeddingCollectionSharder", ask)
    table = Table(name="t", rows=9, width=4, features=("t",), std=0.1, seed=0)
    args = OptimizerArgs(optimizer_str="adam", learning_rate=0.1, sparse_max_gradient=limit)
    with pytest.raises(Asked) as asked:
        place((table,), EmbeddingArgs(), args, planners.Topology(2, "cuda"))
    assert asked.value.args == (limit == 0.0,)


class Cache:
    """What a kernel of FBGEMM with a cache on the GPU has; a CPU has none."""

    def __init__(self) -> None:
        self.lxu_cache_weights, self.lxu_cache_locking_counter = torch.ones(1), torch.ones(4)
        self.stats = torch.zeros(6, dtype=torch.int64)

    def get_uvm_cache_stats(self) -> torch.Tensor:
        return self.stats


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_hits_of_caches_are_counted_and_their_rows_let_go(data: Path, tmp_path: Path, optimizer: str) -> None:
    """Since the last record; calls, ids, distinct ids, those of them that were missing, and so on: FBGEMM's order."""
    bindings = ("EmbeddingArgs.uvm_caching_tables=('item_id',)", f"OptimizerArgs.sparse_optimizer_str='{optimizer}'")
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        tables = run.parallel.tables
        assert tables._caches() == [] and tables.counters() == {}
        (group, *_) = next(iter(tables.collections.values())).module._lookups[0]._emb_modules
        group._modules["_emb_module"] = cache = Cache()
        for requested, missed, rate in ((200, 100, 0.5), (300, 110, 0.9), (300, 110, None)):
            cache.stats[2:4] = torch.tensor([requested, missed])
            assert tables.counters().get("cache_hit_rate") == (rate if rate is None else pytest.approx(rate))
        tables.unlock_cached_rows()
        assert not cache.lxu_cache_locking_counter.any()


def test_the_chosen_layout_is_told(data: Path, tmp_path: Path) -> None:
    bindings = ("EmbeddingArgs.sharding_type='auto'", "EmbeddingArgs.table_sharding_types={'segment': 'data_parallel'}")
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        layout = run.parallel.tables.layout
    assert layout["segment"] == "data_parallel" and layout.keys() == {"item_id", "action", "segment"}
    assert layout["item_id"].split()[0] in ("row_wise", "table_wise", "column_wise")


def test_tables_that_do_not_fit_are_named(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_topology", lambda mesh: planners.Topology(1, "cpu", ddr_cap=1000))
    with pytest.raises(ValueError, match="no layout of the tables .*item_id 120 x 16.* fits"), trainer(data, tmp_path):
        pass


@pytest.mark.parametrize(
    ("kind", "fits"), [("sgd", True), ("rowwise_adagrad", True), ("adagrad", False), ("adam", False)]
)
def test_moments_count_when_tables_are_placed(kind: str, fits: bool) -> None:
    """50 GB of weights, on the 68 GB of a GPU that are not reserved."""
    table = Table(name="t", rows=100_000_000, width=128, features=("t",), std=0.1, seed=0)
    args = OptimizerArgs(optimizer_str="adam", learning_rate=0.1, sparse_optimizer_str=kind)  # type: ignore[arg-type]
    gpus = planners.Topology(4, "cuda", hbm_cap=80 * 10**9, ddr_cap=2**50)
    place((table,), EmbeddingArgs(sharding_type="row_wise"), args, gpus)
    with (
        nullcontext() if fits else pytest.raises(ConfigError, match="no layout of the tables t 100,000,000 x 128 fits")
    ):
        place((table,), EmbeddingArgs(sharding_type="table_wise"), args, gpus)


def test_tables_of_several_widths_share_the_ranks() -> None:
    widths = (8, 16, 32, 64)
    tables = tuple(Table(name=f"t{w}", rows=1000, width=w, features=(f"t{w}",), std=0.1, seed=0) for w in widths)
    args = OptimizerArgs(optimizer_str="adam", learning_rate=0.1)
    _, _, plan = place(
        tables, EmbeddingArgs(sharding_type="table_wise"), args, planners.Topology(4, "cpu", ddr_cap=2**40)
    )
    ranks = [placed.ranks for module in plan.plan.values() for placed in module.values()]  # type: ignore[attr-defined]
    assert sorted(ranks) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(("binding", "message"), [
    ("EmbeddingArgs.uvm_caching_tables=('nothing',)", "no table 'nothing'"),
    ("EmbeddingArgs.uvm_cache_load_factor=0.0", "above 0"),
])  # fmt: skip
def test_mistakes(data: Path, tmp_path: Path, binding: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), trainer(data, tmp_path, "ranking", binding):
        pass
