"""Tables over ranks: TorchRec shards and steps the large ones, small ones may stay whole on every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import UVMCacheStatsIndex
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor, optim
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_sharding import BaseSparseFeaturesDist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import (
    Awaitable,
    CacheParams,
    ModuleShardingPlan,
    NoWait,
    ShardingEnv,
    ShardingPlan,
)

from hstu.config import ConfigError, EmbeddingArgs, OptimizerArgs
from hstu.data.batch import keyed_features
from hstu.models.embedding import Embeddings, EmbeddingTables, Table, table_named
from hstu.parallel.fused_adam import adam_on_host
from hstu.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

_OPTIMIZERS = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
# By which the planner tells the size of the moments.
_CLASSES = {"sgd": optim.SGD, "adam": optim.Adam, "adagrad": optim.Adagrad, "rowwise_adagrad": optim.RowWiseAdagrad}


class HeldRows:
    """Rows of sharded tables, which step when the backward pass has come to the rows and its result is accepted.

    Args:
        rows: What was found of each feature, [n, width].
        held: Features whose tables are to wait.
    """

    def __init__(self, rows: dict[str, Tensor], held: list[str]) -> None:
        self._found = [rows[name] for name in held]
        self._leaves = [found.detach().requires_grad_() for found in self._found]
        #: What the loss is to be made of.
        self.rows = rows | dict(zip(held, self._leaves, strict=True))

    def step(self) -> None:
        """Let the tables step, with the gradients that the rows have by now."""
        reached = [
            (own, leaf.grad) for own, leaf in zip(self._found, self._leaves, strict=True) if leaf.grad is not None
        ]
        if reached:
            found, gradients = zip(*reached, strict=True)
            torch.autograd.backward(found, gradients)


class ShardedTables(Embeddings):
    """Looks up what ``EmbeddingTables`` looks up, over tables spread across all ranks.

    Tables of one width (rounded up to 4) form one TorchRec collection. Sharded tables step inside the backward
    pass, once for each lookup; replicated ones are dense weights.

    Args:
        tables: What to build. Weights are drawn shard by shard and are those of ``EmbeddingTables``.
        embedding: Sharding type of each table.
        optimizer: Of the sharded tables.
        mesh: The ranks.
        prefetch: Whether a pipeline brings the rows of the next batch into the caches of tables in host memory.

    Raises:
        ConfigError: for row-wise Adagrad on column-wise tables, whose state is per row.
    """

    def __init__(
        self,
        tables: tuple[Table, ...],
        embedding: EmbeddingArgs,
        optimizer: OptimizerArgs,
        mesh: Mesh,
        *,
        prefetch: bool = False,
    ) -> None:
        super().__init__(tables)
        self.cached = bool(embedding.uvm_caching_tables)
        self._requested = self._missed = 0  # rows that caches were asked for and lacked, when they were last counted
        replicated = tuple(t for t in tables if embedding.of(t.name) == "data_parallel")
        self.replicated = EmbeddingTables(replicated).to(mesh.device)
        self.collections: dict[str, DistributedModelParallel] = {}
        self._features: dict[str, list[str]] = {}
        #: How each table is laid out over ranks, and by which kernel.
        self.layout = dict.fromkeys((t.name for t in replicated), "data_parallel")
        sharded = tuple(t for t in tables if t not in replicated)
        collections, sharder, plan = place(sharded, embedding, optimizer, _topology(mesh), prefetch=prefetch)
        for width, collection in collections.items():
            self._features[width] = [name for config in collection.embedding_configs() for name in config.feature_names]
            self.collections[width] = _shard(collection, sharder, plan.plan[width], mesh)
            for table in (t for t in sharded if t.key in plan.plan[width]):
                placed = plan.plan[width][table.key]
                self.layout[table.name] = f"{placed.sharding_type} {placed.compute_kernel}"
        #: Number of the step that is being taken, from 1.
        self.step = 0
        self.shards = nn.ModuleDict(self.collections)
        self.fill()

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the sharded tables."""
        for collection in self.collections.values():
            for group in collection.fused_optimizer.param_groups:
                group["lr"] = value
            collection.fused_optimizer.step()  # hands the rate to the kernels; weights move in backward only

    def set_step(self, step: int) -> None:
        """Set the steps taken, which Adam's bias correction needs and the fused state does not hold."""
        for collection in self.collections.values():
            collection.fused_optimizer.set_optimizer_step(step)

    def forget_cached_rows(self) -> None:
        """Empty the caches on the GPU after weights were written from outside."""
        for collection in self.collections.values():
            for lookup in collection.module._lookups:
                lookup.purge()

    def unlock_cached_rows(self) -> None:
        """Let caches on the GPU give up any row, while no batch is under way.

        A row that is asked for ahead is kept until its backward pass, which evaluations and refused steps lack.
        """
        for kernel in self._caches():
            kernel.lxu_cache_locking_counter.zero_()

    def _caches(self) -> list[Any]:
        """Return FBGEMM's modules of this rank that have a cache."""
        kernels = (
            group.emb_module
            for collection in self.collections.values()
            for lookup in collection.module._lookups
            for group in lookup._emb_modules
        )
        return [kernel for kernel in kernels if kernel.lxu_cache_weights.numel()]

    def row_maps(self) -> dict[str, Tensor]:
        """Return which ids have which rows, where that is learned; loading writes into it."""
        return {}

    def counters(self) -> dict[str, float]:
        """Return what deserves to be on record: of rows that this rank's caches were asked for, the share they had."""
        caches = self._caches() if self.cached else []
        counted = sum((kernel.get_uvm_cache_stats().cpu() for kernel in caches), torch.zeros(6)).tolist()
        requested = int(counted[UVMCacheStatsIndex.num_unique_indices]) - self._requested
        missed = int(counted[UVMCacheStatsIndex.num_unique_misses]) - self._missed
        self._requested, self._missed = self._requested + requested, self._missed + missed
        return {"cache_hit_rate": 1 - missed / requested} if requested else {}

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Look up every feature: name -> [ids of the feature, width]."""
        chosen = self.request(features)
        self.begin()
        return self.found(features, [self.collections[width](ids) for width, ids in chosen.items()])

    def found(self, features: KeyedJaggedTensor, answers: Iterable[Mapping[str, JaggedTensor]]) -> dict[str, Tensor]:
        """Return the rows of every feature: from the ``answers`` of the collections, and from the replicated tables."""
        rows: dict[str, Tensor] = self.replicated(features)
        for answer in answers:
            rows |= {name: jagged.values()[:, : self.widths[name]] for name, jagged in answer.items()}
        return rows

    def request(self, features: KeyedJaggedTensor, *, ahead: bool = False) -> dict[str, KeyedJaggedTensor]:
        """Return what each collection looks up for ``features``, by width.

        Args:
            features: Ids.
            ahead: Whether other batches are computed before this one.
        """
        names, sizes = features.keys(), features.length_per_key()
        # TorchRec fixes the order of features by the first batch and would not notice another one.
        return {
            width: features if wanted == names else _chosen(features, sizes, [names.index(name) for name in wanted])
            for width, wanted in self._features.items()
        }

    def hold(self, rows: dict[str, Tensor]) -> HeldRows:
        """Return ``rows``, as they were found, cut off from the sharded tables until these are to step."""
        names = [name for names in self._features.values() for name in names if name in rows]
        return HeldRows(rows, [name for name in names if rows[name].requires_grad])

    def begin(self) -> None:
        """Make the tables ready for the rows of the oldest request that was not begun."""

    @torch.no_grad()
    def fill(self) -> None:
        """Write the initial weights into this rank's shards, and into the tables that every rank has."""
        tables = {table.name: table for table in self.tables}
        for table in (t for t in self.tables if t.key in self.replicated.weights):
            self.replicated.weights[table.key].copy_(table.initial_rows(0, table.rows))
        for collection in self.collections.values():
            for name, weight in collection.state_dict().items():
                table = tables[table_named(name)]
                for shard in weight.local_shards():
                    (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                    weights = table.initial_rows(row, row + rows)
                    stored = nn.functional.pad(weights, (0, _stored_width(table) - table.width))
                    shard.tensor.copy_(stored[:, column : column + columns])


class _AlreadyHere(BaseSparseFeaturesDist[KeyedJaggedTensor]):
    """Sends ids to the shards of a rank that has all of them: nothing is sent, and nothing asked of the device.

    TorchRec's own modules sort, count and list the ids on the way, which a rank alone waits for and then lets lie.
    """

    def forward(self, sparse_features: KeyedJaggedTensor) -> Awaitable[Awaitable[KeyedJaggedTensor]]:
        """Return ``sparse_features``."""
        return NoWait(NoWait(sparse_features))


def _chosen(features: KeyedJaggedTensor, sizes: list[int], wanted: list[int]) -> KeyedJaggedTensor:
    """Return the ``wanted`` of ``features``, by number; ``KeyedJaggedTensor.permute`` copies these to the device."""
    names, lengths = features.keys(), features.lengths().view(len(sizes), -1).unbind(0)
    values = features.values().split(sizes)
    return keyed_features(
        [names[i] for i in wanted],
        torch.cat([values[i] for i in wanted]),
        torch.cat([lengths[i] for i in wanted]),
        [sizes[i] for i in wanted],
    )


def _topology(mesh: Mesh) -> Topology:
    """Describe the ranks and their memory to the planner."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size))
    memory: dict[str, int] = {"ddr_cap": psutil.virtual_memory().total // local}
    if mesh.device.type == "cuda":
        memory["hbm_cap"] = torch.cuda.get_device_properties(mesh.device).total_memory
    return Topology(world_size=mesh.world_size, compute_device=mesh.device.type, local_world_size=local, **memory)


def _constraints(
    table: str, embedding: EmbeddingArgs, optimizer: str, device: str, prefetch: bool
) -> ParameterConstraints:
    """Return what the planner may choose from for ``table`` on a kind of device."""
    kinds = [embedding.of(table)]
    if kinds == ["auto"]:
        kinds = ["row_wise", "table_wise", *(["column_wise"] if optimizer != "rowwise_adagrad" else [])]
    if table not in embedding.uvm_caching_tables:
        return ParameterConstraints(sharding_types=kinds, compute_kernels=["fused"])
    if device == "cpu":
        logger.info("EmbeddingArgs.uvm_caching_tables: %s is in host memory as all tables are: there is no GPU", table)
        return ParameterConstraints(sharding_types=kinds, compute_kernels=["fused"])
    cache = CacheParams(load_factor=embedding.uvm_cache_load_factor, prefetch_pipeline=prefetch)
    return ParameterConstraints(sharding_types=kinds, compute_kernels=["fused_uvm_caching"], cache_params=cache)


def _stored_width(table: Table) -> int:
    """FBGEMM's kernels want rows of a multiple of 4; the columns beyond the table's own stay zero."""
    return -(-table.width // 4) * 4


def place(
    tables: tuple[Table, ...],
    embedding: EmbeddingArgs,
    optimizer: OptimizerArgs,
    topology: Topology,
    *,
    prefetch: bool = False,
) -> tuple[dict[str, EmbeddingCollection], EmbeddingCollectionSharder, ShardingPlan]:
    """Return collections of tables by stored width, what shards them, and where TorchRec's planner puts the shards.

    Raises:
        ConfigError: for a layout that the optimizer or the memory of ``topology`` does not allow.
    """
    kind = optimizer.sparse_optimizer_str
    if kind == "rowwise_adagrad" and any(embedding.of(t.name) == "column_wise" for t in tables):
        raise ConfigError(
            "OptimizerArgs.sparse_optimizer_str",
            "= 'rowwise_adagrad': keeps one number per row, which column_wise tables split; use 'adagrad'",
        )
    widths = sorted({_stored_width(t) for t in tables})
    collections = {str(width): _collection(tables, width) for width in widths}
    sharder: Any = EmbeddingCollectionSharder(
        fused_params=dict(
            optimizer=_OPTIMIZERS[kind],
            learning_rate=optimizer.sparse_learning_rate,
            eps=optimizer.adam_eps,
            beta1=optimizer.adam_beta1,
            beta2=optimizer.adam_beta2,
            gradient_clipping=optimizer.sparse_max_gradient > 0,
            max_gradient=optimizer.sparse_max_gradient,
            gather_uvm_cache_stats=topology.compute_device == "cuda" and bool(embedding.uvm_caching_tables),
        ),
        # Which sums the gradients of a row before they could be clipped one by one.
        # A rank alone exchanges nothing, and finding equal ids would have its host wait for their number.
        use_index_dedup=(
            topology.compute_device == "cuda" and topology.world_size > 1 and not optimizer.sparse_max_gradient
        ),
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints={t.key: _constraints(t.name, embedding, kind, topology.compute_device, prefetch) for t in tables},
        storage_reservation=FixedPercentageStorageReservation(percentage=0.15),
    )
    whole = nn.ModuleDict(collections)
    for weight in whole.parameters():
        weight._optimizer_classes = [_CLASSES[kind]]  # type: ignore[attr-defined]
    try:
        # Every rank plans for itself, which is deterministic: a plan that fails then fails everywhere.
        plan = planner.plan(whole, [sharder]) if collections else ShardingPlan({})
    except PlannerError as error:
        sizes = ", ".join(f"{t.name} {t.rows:,} x {t.width}" for t in tables)
        reason = str(error).strip().splitlines()[0]
        raise ConfigError("EmbeddingArgs.sharding_type", f": no layout of the tables {sizes} fits: {reason}") from None
    for weight in whole.parameters():
        # Or it would be the optimizer too.
        del weight._optimizer_classes  # type: ignore[attr-defined]
    return collections, sharder, plan


def _collection(tables: tuple[Table, ...], width: int) -> EmbeddingCollection:
    configs = [
        EmbeddingConfig(name=t.key, num_embeddings=t.rows, embedding_dim=width, feature_names=list(t.features))
        for t in tables
        if _stored_width(t) == width
    ]
    return EmbeddingCollection(tables=configs, device=torch.device("meta"))


def _shard(
    collection: EmbeddingCollection, sharder: EmbeddingCollectionSharder, plan: ModuleShardingPlan, mesh: Mesh
) -> DistributedModelParallel:
    with adam_on_host():
        sharded = DistributedModelParallel(
            collection,
            env=ShardingEnv.from_process_group(torch.distributed.group.WORLD),
            device=mesh.device,
            plan=ShardingPlan({"": plan}),
            sharders=[sharder],
            init_data_parallel=False,
        )
    for sharding in sharded.module._sharding_type_to_sharding.values() if mesh.world_size == 1 else ():
        sharding.create_input_dist = lambda device=None: _AlreadyHere()
    return sharded
