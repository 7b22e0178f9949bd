"""Trains cases on the ranks of this job and writes their losses: ``worker.py REQUEST.json RESULT.json``.

The request: {"data": directory, "cases": [[name, fault], ...], "plain": [name, ...], "mesh": bool, "rings": bool,
"save": directory to keep the state of SPLITS and FEATURES in after ``SAVED_STEP`` steps, "load": directory to go on
from}.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed import comm_ops

from hstu.config import Config, ConfigError, OptimizerArgs
from hstu.data.batch import Batch
from hstu.data.loader import BatchLoader
from hstu.data.reader import SequenceDataset
from hstu.data.seen import met_categories, trained_items
from hstu.data.splits import make_splits
from hstu.models import build_model, make_collator
from hstu.models.losses import LossSum
from hstu.ops import hstu_attention
from hstu.parallel import Mesh
from hstu.parallel.context import ContextParallel
from hstu.parallel.mesh import Group
from hstu.parallel.spread import each_on_one_rank
from hstu.training.checkpoint_files import find_checkpoint
from hstu.training.run_directory import RunDirectory
from hstu.training.schedule import schedule_factor
from hstu.training.trainer import Trainer
from tests.ops.attention_cases import CASES as ATTENTION
from tests.ops.attention_cases import build
from tests.parallel.cases import CASES, FEATURES, GRIDS, MOVED, SAVED_STEP, SPLITS, THREES, config_of


class _LocalCounts(Group):
    """Sums as if every rank had the labels of this one."""

    def sum(self, values: Tensor) -> Tensor:
        return values * self.size


@contextmanager
def fault(name: str | None, trainer: Trainer) -> Iterator[None]:
    """Plant a mistake in how gradients are averaged."""
    loss, mesh = trainer.model.loss, trainer.mesh
    if name == "divide by the local count":
        trainer.stepper.mesh = dataclasses.replace(mesh, tokens=_LocalCounts(**vars(mesh.tokens)))
    elif name == "divide by the world size once more":
        trainer.model.loss = lambda *args: _scaled(loss(*args), 1 / mesh.world_size)
    elif name == "do not divide the tables' gradients":
        comm_ops.set_gradient_division(False)
    elif name == "do not average the dense gradients":
        trainer.parallel.dense.reduce_gradients = lambda: None  # type: ignore[method-assign]
    elif name == "leave .grad from the last step":
        trainer.optimizer.megatron.zero_grad = lambda: None
    elif name == "own negatives only":
        trainer.model.sampler.gather = lambda ids: ids  # type: ignore[union-attr]
    else:
        assert name is None, name
    yield
    comm_ops.set_gradient_division(True)


def _scaled(loss: LossSum, factor: float) -> LossSum:
    # The value stays and the gradient is scaled, so that only a wrong step can change the losses.
    total = loss.total.detach() + (loss.total - loss.total.detach()) * factor
    return dataclasses.replace(loss, total=total)


def train(
    config: Config,
    dataset: SequenceDataset,
    mesh: Mesh,
    planted: str | None = None,
    *,
    save: Path | None = None,
    load: Path | None = None,
) -> dict[str, Any]:
    """Return the loss of each step, taken by the trainer itself, the last scores, and facts about the tables."""
    trainer = Trainer(config, dataset, mesh, RunDirectory(save or Path("unused")))
    if load is not None:
        trainer.resume(mesh.world.broadcast(find_checkpoint(load / "checkpoints", "latest")))
    losses = []
    with fault(planted, trainer):
        while trainer.progress.step < trainer.total_steps:
            loader = trainer.loaders["train"]
            number, step = divmod(trainer.progress.step, loader.steps_per_epoch)
            epoch = loader.epoch(number, step * loader.global_batch_size)
            for batches in trainer.stepper.steps(epoch, trainer.progress):
                trainer.stepper.take(batches, trainer.progress)
                losses.append(trainer.meter.read(trainer.progress.step)["loss"])
                if save is not None and trainer.progress.step == SAVED_STEP:
                    mesh.on_main(trainer.run.create)
                    trainer._save()
                    trainer.checkpointer.wait()
                if trainer.progress.step == trainer.total_steps:
                    break
    scores = trainer.assembly.score("valid", trainer.progress.step)["metrics"] if planted is None else {}
    shards = {
        name.split(".")[-2]: [list(s.shard_sizes) for s in weight.metadata().shards_metadata]
        for collection in trainer.parallel.tables.collections.values()
        for name, weight in collection.state_dict().items()
    }
    counters = trainer.parallel.tables.counters()
    return {"losses": losses, "shards": shards, "scores": scores, "counters": counters}


def steps_of(loader: BatchLoader, count: int) -> Iterator[list[Batch]]:
    """Yield the batches of the first ``count`` steps, epoch after epoch."""
    for step in range(count):
        epoch, first = divmod(step, loader.steps_per_epoch)
        yield list(itertools.islice(loader.epoch(epoch, first * loader.global_batch_size), loader.micro_batches))


def train_plain(config: Config, dataset: SequenceDataset, steps: int) -> list[float]:
    """Return the losses of the plain model under torch's own optimizers, in one process without any engine."""
    model, args = build_model(config, dataset.schema, allocate_tables=True), config.optimizer
    split = make_splits(config.dataset, dataset, config.recent_targets)["train"]
    collate = make_collator(config, dataset.schema)
    if model.item_encoder is not None:
        model.item_encoder.read(dataset, met_categories(dataset, trained_items(dataset, split, collate)))
    weights = model.embeddings.weights
    sparse_rate = args.sparse_learning_rate or args.learning_rate
    sharded = {name: weights[name] for name in weights if config.embedding.of(name) != "data_parallel"}
    replicated = [weights[name] for name in weights if name not in sharded]
    others = [p for name, p in model.named_parameters() if not name.startswith("embeddings.")]
    groups = [{"params": others, "rate": args.learning_rate}, {"params": replicated, "rate": sparse_rate}]
    betas = dict(betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps)
    if args.optimizer_str == "sgd":
        dense = torch.optim.SGD(groups, momentum=args.sgd_momentum, weight_decay=args.weight_decay)
    else:
        kind = torch.optim.AdamW if args.optimizer_str == "adamw" else torch.optim.Adam
        dense = kind(groups, weight_decay=args.weight_decay, **betas)
    loader = BatchLoader(
        dataset=dataset,
        split=split,
        collate=collate,
        batch_size=config.trainer.train_batch_size * config.trainer.gradient_accumulation_steps,
        seed=config.trainer.seed,
        shuffle=True,
    )
    losses, moments = [], {name: torch.zeros(2, *weight.shape) for name, weight in sharded.items()}
    for step, (batch,) in enumerate(steps_of(loader, steps)):
        model.zero_grad()
        loss = model(batch)
        (loss.total / loss.count).backward()
        losses.append(float(loss.total) / loss.count)
        if args.clip_grad:
            torch.nn.utils.clip_grad_norm_([*others, *replicated], args.clip_grad)
        factor = schedule_factor(args, step, config.trainer.max_train_iters or 0)
        for group in dense.param_groups:
            group["lr"] = group["rate"] * factor
        dense.step()
        for name, weight in sharded.items():
            _step_table(weight, _looked_up(name, model, batch), moments[name], step, sparse_rate * factor, args)
    return losses


def _looked_up(name: str, model: Any, batch: Batch) -> Tensor:
    """Return the rows of a table that this batch reads, which are the ones that a fused optimizer moves."""
    of_items = model.item_encoder is not None and name in [f.name for f in model.item_encoder.categories]
    rows = batch.ids(batch.item if of_items else name)
    if hasattr(model, "sampler") and (name == batch.item or of_items):
        rows = torch.cat([rows, model.sampler.pool(batch.labels, batch.step)])
    if of_items:
        rows = model.item_encoder.ids_of(rows, batch.step)[[f.name for f in model.item_encoder.categories].index(name)]
    return rows.unique()


@torch.no_grad()
def _step_table(weight: Tensor, rows: Tensor, moments: Tensor, step: int, rate: float, args: OptimizerArgs) -> None:
    assert weight.grad is not None
    gradient = weight.grad[rows]
    if args.optimizer_str == "sgd":
        weight[rows] -= rate * gradient
        return
    mean = args.adam_beta1 * moments[0, rows] + (1 - args.adam_beta1) * gradient
    square = args.adam_beta2 * moments[1, rows] + (1 - args.adam_beta2) * gradient**2
    moments[0, rows], moments[1, rows] = mean, square
    mean, square = mean / (1 - args.adam_beta1 ** (step + 1)), square / (1 - args.adam_beta2 ** (step + 1))
    weight[rows] -= rate * mean / (square.sqrt() + args.adam_eps)


def mesh_facts(mesh: Mesh) -> dict[str, Any]:
    """Return what this rank got from each operation of the mesh."""
    own = torch.arange(mesh.rank * 2, dtype=torch.float64).view(-1, 2) + 10 * mesh.rank

    def fails() -> None:
        raise ConfigError(f"TrainerArgs.seed_of_rank_{mesh.rank}", "= 1: said")

    try:
        mesh.on_main(fails)
        raised = None
    except ConfigError as error:
        raised = str(error)
    return {
        "gather": mesh.tokens.gather(own).tolist(),
        "gather nothing": list(mesh.tokens.gather(torch.zeros(0, 3)).shape),
        "gather flags": mesh.tokens.gather(torch.tensor([mesh.rank == 0])).tolist(),
        "sum": mesh.tokens.sum(torch.tensor([1.0, mesh.rank])).tolist(),
        "each on one rank": spread_rows(mesh),
        "broadcast": mesh.world.broadcast({"from": mesh.rank}),
        "on main": mesh.on_main(lambda: f"done by {mesh.rank}"),
        "raised": raised,
        "any": [mesh.world.any(mesh.rank == 1), mesh.world.any(False)],
        "is main": mesh.is_main,
    }


def spread_rows(mesh: Mesh) -> list[Any]:
    """Return how often each of 7 items is made on all ranks, and the gradient of each, three asked for by each rank."""
    weight, made = torch.arange(7.0, dtype=torch.float64).requires_grad_(), torch.zeros(7)

    def make(items: Tensor) -> Tensor:
        made[items] += 1
        return weight[items, None]

    items = torch.tensor([2, 0, 1]) + mesh.rank
    rows = each_on_one_rank(mesh.tokens, items, make)
    assert rows[:, 0].tolist() == items.tolist()
    rows.sum().backward()
    assert weight.grad is not None
    return [mesh.tokens.sum(made).tolist(), mesh.tokens.sum(weight.grad).tolist()]


def ring_errors(mesh: Mesh) -> dict[str, float]:
    """Return how far attention round the ring, and each of its gradients, is from that of one rank, in float64."""
    context, worst = ContextParallel(mesh.context), {}
    for name, case in ATTENTION.items():
        if case.queries is not None:  # every rank has the queries of its keys
            continue
        tensors, arguments = build(case, torch.float64)
        bias = arguments.get("bias")
        tables = [] if bias is None else [table for table in (bias.position, bias.time) if table is not None]
        for x in (*tensors, *tables):
            x.requires_grad_()
        local = context.shards(arguments["layout"])[context.rank].tokens
        whole = hstu_attention(*tensors, **arguments, backend="reference")
        weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = torch.autograd.grad((whole * weights).sum(), [*tensors, *tables], allow_unused=True)
        out = context.hstu_attention(*(x[local] for x in tensors), **arguments)
        found = torch.autograd.grad((out * weights[local]).sum(), [*tensors, *tables], allow_unused=True)
        errors = [(out - whole[local]).abs().sum()]
        for own, gradient in zip(found, wanted, strict=True):
            if gradient is not None:
                total = torch.zeros_like(gradient) if own is None else own.clone()
                errors.append((mesh.tokens.sum(total) - gradient).abs().sum())
        worst[name] = float(torch.stack(errors).max())
    return worst


def main() -> None:
    """Do what the request says."""
    request, result = json.loads(Path(sys.argv[1]).read_text()), {}
    torch.set_num_threads(1)
    kept = SPLITS | {name: case for cases in (*FEATURES.values(), *MOVED.values()) for name, case in cases.items()}
    cases = CASES | THREES | GRIDS | kept
    names = {cases[name].data for name, _ in request["cases"]} | {cases[name].data for name in request.get("plain", ())}
    data = {name: SequenceDataset.open(Path(request["data"], name, "synthetic")) for name in names}
    with Mesh.create() as mesh:
        for name, planted in request["cases"]:
            case = cases[name]
            config = config_of(case, mesh.world_size)
            states = {"save": name, "load": case.begins_as or name}
            folders = {key: Path(request[key], of) for key, of in states.items() if key in request and name in kept}
            result[f"{name} {planted}" if planted else name] = train(config, data[case.data], mesh, planted, **folders)
        for name in request.get("plain", ()):
            case = cases[name]
            result[f"{name} plain"] = train_plain(config_of(case, 1), data[case.data], case.plain_steps)
        if request.get("mesh"):
            facts: list[Any] = [None] * mesh.world_size
            torch.distributed.all_gather_object(facts, mesh_facts(mesh))
            result["mesh"] = facts
        if request.get("rings"):
            result["rings"] = ring_errors(mesh.with_degrees(mesh.world_size, 1))
        if mesh.is_main:
            Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
