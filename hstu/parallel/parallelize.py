"""The only function that turns a plain model into a distributed one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from hstu.config import Config
from hstu.models import RankingModel, RetrievalModel
from hstu.parallel.context import ContextParallel, attend_across_ranks
from hstu.parallel.dense import DenseParallel
from hstu.parallel.dynamic import DynamicTables
from hstu.parallel.embedding import ShardedTables
from hstu.parallel.mesh import Mesh
from hstu.parallel.spread import each_on_one_rank
from hstu.parallel.tensor import TensorParallel


@dataclass(frozen=True, kw_only=True)
class Parallelized:
    """A model spread over ranks.

    Attributes:
        model: The model, called as before.
        tables: Its embeddings, sharded.
        dense: Its dense weights, under Megatron-Core.
        mesh: The ranks.
    """

    model: RankingModel | RetrievalModel
    tables: ShardedTables
    dense: DenseParallel
    mesh: Mesh


def parallelize(model: RankingModel | RetrievalModel, mesh: Mesh, config: Config) -> Parallelized:
    """Spread ``model``, built with ``allocate_tables=False``, over the ranks of ``mesh``, in place.

    Tables go to TorchRec; attention spans the context ranks, and the backbone is cut for the tensor ranks; every
    other weight goes to Megatron-Core's data parallelism. In-batch negatives are shared by all ranks. On one
    process only the wrappers change.

    Raises:
        ConfigError: if the config asks for what the mesh's devices cannot do.
    """
    if config.network.kernel_backend == "triton" and mesh.device.type == "cpu":
        raise config.network.error("kernel_backend", "Triton kernels need a GPU; use 'auto'")
    model.to(mesh.device)
    every, dynamic = model.embeddings.tables, config.dynamic_embedding
    prefetch = config.trainer.pipeline_type == "native"
    if dynamic.capacity:
        tables: ShardedTables = DynamicTables(
            every, config.embedding, dynamic, config.optimizer, mesh, prefetch=prefetch
        )
    else:
        tables = ShardedTables(every, config.embedding, config.optimizer, mesh, prefetch=prefetch)
    model.embeddings = tables
    if isinstance(model, RetrievalModel):
        model.sampler.gather = mesh.tokens.gather
        for table, rows in tables.maps.items() if isinstance(tables, DynamicTables) else ():
            if table.name == model.item:
                model.sampler.num_rows, model.sampler.holders = rows.map.usable, rows.holders
    if model.item_encoder is not None and model.item_encoder.text is not None:
        model.item_encoder.text.spread = partial(each_on_one_rank, mesh.tokens)
    if mesh.context.size > 1:
        context = ContextParallel(mesh.context)
        model.shard = context.shard
        attend_across_ranks(model.backbone, context)
    if mesh.tensor.size > 1:
        tensor = TensorParallel(mesh.tensor, config.tensor_model_parallel, mesh.device)
        model.backbone = tensor.split(model.backbone)
    parts = {name: part for name, part in model.named_children() if part is not tables}
    assert not model._parameters, "a weight outside the submodules would be neither trained nor saved"
    dense = DenseParallel(nn.ModuleDict({**parts, "replicated": tables.replicated}), config.optimizer)
    return Parallelized(model=model, tables=tables, dense=dense, mesh=mesh)
