"""A run on GPUs that are not here: memory, communication and time of a step from a stated model.

Per GPU, with world = data x context x tensor ranks, and rates from the data sheets:

- memory: weights and gradients of 4 bytes (backbone matrices over the tensor ranks), moments, tables and their moments
  as TorchRec's planner puts them, and activations: the most that a forward and backward pass over a real batch has at
  once, measured here and divided by context and tensor ranks (which split tokens too, by sequence parallelism);
- arithmetic: counted operations at ``efficiency`` of the peak;
- memory traffic: moments once, weights once and activations three times a batch;
- tables: rows of the looked-up ids, out and back; dense gradients: a ring all-reduce; context: keys and values to the
  other ranks of the group, and twice that backward; tensor: two all-reduces of the stream for each matrix that ends a
  sublayer. A group that fits into a node uses NVLink, another one the network;
- a step is the sum of these, with moments and gradients once and the rest for each batch that it accumulates; with
  overlap, gradients hide behind two thirds of the arithmetic of its last batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchrec import KeyedJaggedTensor
from torchrec.distributed.planner import Topology

from hstu.config import Config, ConfigError, ContextParallelArgs, TensorModelParallelArgs
from hstu.data.batch import Batch
from hstu.data.reader import SequenceDataset
from hstu.layers.hstu import HSTULayer
from hstu.models import RankingModel, RetrievalModel, build_model
from hstu.models.embedding import Embeddings, Table
from hstu.parallel.embedding import place
from hstu.training.batch_flops import batch_flops, matrix_elements
from hstu.training.hardware import Gpu

_FLOAT = 4
_USED = 0.9  # of a GPU's memory: the rest is for what no plan counts


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a batch of one data rank needs, however it is spread.

    Attributes:
        dense: Elements of the dense weights, replicated tables among them.
        backbone: Those of them that tensor ranks share.
        tables: The sharded tables.
        activations: Most bytes of a forward and backward pass at once.
        flops: Operations of a forward and backward pass.
        tokens: Tokens of the stream.
        lookups: Bytes of the rows looked up.
    """

    dense: int
    backbone: int
    tables: tuple[Table, ...]
    activations: int
    flops: float
    tokens: int
    lookups: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One choice of degrees. Memory in bytes a GPU, times in seconds a step."""

    data: int
    context: int
    tensor: int
    dense_memory: float
    table_memory: float
    activation_memory: float
    arithmetic: float
    traffic: float
    table_time: float
    gradient_time: float
    context_time: float
    tensor_time: float
    tokens_per_second: float
    mfu: float

    @property
    def memory(self) -> float:
        """Bytes in all."""
        return self.dense_memory + self.table_memory + self.activation_memory

    @property
    def step(self) -> float:
        """Seconds in all."""
        exposed = self.table_time + self.gradient_time + self.context_time + self.tensor_time
        return self.arithmetic + self.traffic + exposed


class _Blank(Embeddings):
    """Stands for tables that need not be here."""

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return rows of the right shapes."""
        counts = dict(zip(features.keys(), features.length_per_key(), strict=True))
        widths = self.widths
        return {name: torch.rand(counts[name], widths[name], requires_grad=True) for name in counts if name in widths}


def measure_demand(config: Config, dataset: SequenceDataset, batch: Batch) -> Demand:
    """Build the model without its tables, and pass ``batch`` of one data rank through it, in the form for GPUs."""
    model = build_model(config, dataset.schema, allocate_tables=False)
    for layer in model.modules():
        if isinstance(layer, HSTULayer):
            layer.fused = True
    if model.item_encoder is not None:
        model.item_encoder.read(dataset)
    every = model.embeddings.tables
    model.embeddings = _Blank(every)
    tables = tuple(table for table in every if config.embedding.of(table.name) != "data_parallel")
    replicated = sum(table.rows * table.width for table in every if table not in tables)
    asked = model.request(model.training_batch(batch)).features  # with negatives, and what stands for items
    sizes, widths = dict(zip(asked.keys(), asked.length_per_key(), strict=True)), _widths(every)
    return Demand(
        dense=sum(p.numel() for p in model.parameters()) + replicated,
        backbone=matrix_elements(model.backbone),
        tables=tables,
        activations=activation_bytes(model, batch),
        flops=batch_flops(model, config, model.training_batch(batch)),
        tokens=model.num_tokens(batch),
        lookups=sum(count * widths.get(name, 0) for name, count in sizes.items()) * _FLOAT,
    )


def activation_bytes(model: RankingModel | RetrievalModel, batch: Batch) -> int:
    """Return the most bytes that a forward and backward pass over ``batch`` has at once, weights and their sums aside.

    What operators allocate for themselves alone is not seen, nor counted what stays: buffers that a CPU uses again.
    Gradients of weights are added up and gone, as in training.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    hooks = [weight.register_post_accumulate_grad_hook(_forget) for weight in weights]
    with _Live() as live:
        model(batch).total.backward()
    for hook in hooks:
        hook.remove()
    return live.most - live.now


def _forget(weight: Tensor) -> None:
    weight.grad = None


class _Live(TorchDispatchMode):
    """Follows the bytes of the tensors that operators make, from the first to the last who has them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in before:
                self._meet(storage)
        return found

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            finalize(storage, self._leave, id(storage), storage.nbytes())

    def _leave(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def make_plans(config: Config, demand: Demand, gpu: Gpu, nodes: int, per_node: int, efficiency: float) -> list[Plan]:
    """Return a plan for each choice of degrees, the most tokens a second first, of those that fit before the others.

    Args:
        config: The run.
        demand: Of one data rank.
        gpu: What each GPU can do.
        nodes: Machines.
        per_node: GPUs of each.
        efficiency: Share of the peak that arithmetic reaches.
    """
    held = table_memory(config, demand.tables, gpu, nodes, per_node)
    plans = [
        _plan(config, demand, gpu, nodes * per_node, per_node, context, tensor, efficiency, held)
        for context, tensor in _degrees(config, nodes * per_node, per_node)
    ]
    return sorted(plans, key=lambda plan: (not fits(plan, gpu), -plan.tokens_per_second))


def fits(plan: Plan, gpu: Gpu) -> bool:
    """Return whether a plan leaves a tenth of the memory for what it does not count."""
    return plan.memory <= _USED * gpu.memory


def longest_sequence(
    config: Config, few: Demand, many: Demand, gpu: Gpu, nodes: int, per_node: int
) -> tuple[float, dict[int, float]]:
    """Return the bytes of a token, and by context ranks how many tokens a sequence may have, alone on its data rank.

    Tables, weights and what batches of ``few`` and of ``many`` tokens have in common stay as they are; zero tokens
    where these do not fit.
    """
    each = (many.activations - few.activations) / max(1, many.tokens - few.tokens)
    fixed = max(0.0, many.activations - each * many.tokens)
    plans = sorted(make_plans(config, many, gpu, nodes, per_node, 1.0), key=lambda plan: plan.context)
    free = {p.context: _USED * gpu.memory - p.dense_memory - p.table_memory - fixed for p in plans if p.tensor == 1}
    return each, {context: max(0.0, size) * context / each for context, size in free.items()}


def table_memory(config: Config, tables: tuple[Table, ...], gpu: Gpu, nodes: int, per_node: int) -> float:
    """Return the bytes of tables and moments on the fullest GPU, as TorchRec's planner lays them out; inf if it cannot.

    Of a table in host memory, that is the cache.
    """
    world = nodes * per_node
    topology = Topology(world, "cuda", hbm_cap=int(gpu.memory), ddr_cap=2**50, local_world_size=per_node)
    held, optimizer = np.zeros(world), config.optimizer.sparse_optimizer_str
    try:
        _, _, plan = place(tables, config.embedding, config.optimizer, topology)
    except ConfigError:
        return float("inf")
    for placed in (parameter for module in plan.plan.values() for parameter in module.values()):
        for shard in placed.sharding_spec.shards:
            rows, width = shard.shard_sizes
            weights, moments = shard_bytes(rows, width, optimizer)
            cached = placed.compute_kernel == "fused_uvm_caching"
            share = config.embedding.uvm_cache_load_factor * weights if cached else weights + moments
            held[shard.placement.rank()] += share
    return float(held.max())


def shard_bytes(rows: int, width: int, optimizer: str) -> tuple[int, int]:
    """Return the bytes of the weights and of the moments of a part of a table."""
    moments = {"sgd": 0, "adagrad": rows * width, "rowwise_adagrad": rows, "adam": 2 * rows * width}[optimizer]
    return rows * width * _FLOAT, moments * _FLOAT


def dense_bytes(config: Config, elements: int, ranks: int) -> tuple[int, int]:
    """Return the bytes of dense weights with their gradients, and of moments, over ``ranks`` if they are split."""
    args = config.optimizer
    moments = int(args.sgd_momentum > 0) if args.optimizer_str == "sgd" else 2
    share = ranks if args.use_distributed_optimizer else 1
    return 2 * elements * _FLOAT, -(-moments * elements // share) * _FLOAT


def _degrees(config: Config, world: int, per_node: int) -> Iterator[tuple[int, int]]:
    powers = [2**n for n in range(world.bit_length())]
    for tensor in (1, 2, 4, 8):
        for context in powers:
            if tensor <= per_node and world % (context * tensor) == 0 and _allowed(config, context, tensor):
                yield context, tensor


def _allowed(config: Config, context: int, tensor: int) -> bool:
    """Return whether training takes these degrees."""
    with suppress(ConfigError):
        replace(
            config,
            context_parallel=ContextParallelArgs(context_parallel_size=context),
            tensor_model_parallel=TensorModelParallelArgs(
                tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1
            ),
        )
        return True
    return False


def _plan(
    config: Config,
    demand: Demand,
    gpu: Gpu,
    world: int,
    per_node: int,
    context: int,
    tensor: int,
    efficiency: float,
    held: float,
) -> Plan:
    network = config.network
    data, element = world // (context * tensor), 2 if network.dtype_str == "bfloat16" else 4
    batches, sums = config.trainer.gradient_accumulation_steps, 2 if network.backbone == "hstu" else 4
    dense = demand.dense - demand.backbone + demand.backbone // tensor
    weights, moments = dense_bytes(config, dense, data * context)
    activations, tokens = demand.activations / (context * tensor), demand.tokens / context

    def rate(ranks: int) -> float:
        return gpu.node_rate if ranks <= per_node else gpu.network_rate

    values = network.value_channels or network.kv_channels
    heads = network.num_query_groups or network.num_attention_heads
    sent = tokens * heads * (network.kv_channels + values) / tensor * element * (context - 1)
    stream = tokens * network.hidden_size * element * 2 * (tensor - 1) / tensor
    again = 4 / 3 if network.recompute == "full" else 1.0  # one more forward pass beside three
    arithmetic = again * demand.flops / (context * tensor) / (efficiency * gpu.peak(network.dtype_str))
    gradients = 2 * dense * _FLOAT * (data * context - 1) / (data * context) / rate(world)
    hidden = 2 / 3 * arithmetic if config.optimizer.overlap_grad_reduce else 0.0
    plan = Plan(
        data=data,
        context=context,
        tensor=tensor,
        dense_memory=weights + moments,
        table_memory=held,
        activation_memory=activations,
        arithmetic=batches * arithmetic,
        traffic=(2 * (batches * weights + moments) + 3 * batches * activations) / gpu.memory_rate,
        table_time=batches * 2 * demand.lookups / context * (world - 1) / world / rate(world),
        gradient_time=max(0.0, gradients - hidden),
        context_time=batches * 3 * network.num_layers * sent / rate(context * tensor),
        tensor_time=batches * sums * network.num_layers * stream / rate(tensor),
        tokens_per_second=0.0,
        mfu=0.0,
    )
    speed = data * batches * demand.tokens / plan.step
    mfu = batches * demand.flops / (context * tensor) / plan.step / gpu.peak(network.dtype_str)
    return replace(plan, tokens_per_second=speed, mfu=mfu)


def _widths(tables: tuple[Table, ...]) -> dict[str, int]:
    return {feature: table.width for table in tables for feature in table.features}
