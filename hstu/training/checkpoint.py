"""Checkpoints: everything the next step depends on, complete or not there at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.remote_device import _remote_device

from hstu.config import RECOMPUTE, Config, FeatureArgs
from hstu.data.checksums import file_sums
from hstu.parallel import Parallelized
from hstu.training.checkpoint_files import (
    MARKER,
    CheckpointError,
    Progress,
    complete_checkpoints,
    first_line,
    point,
    read_marker,
    step_name,
    write_marker,
)
from hstu.training.met import Met, met_state
from hstu.training.optimizer import Optimizer
from hstu.training.vocabularies import Record

logger = logging.getLogger(__name__)

UNKNOWN_ROWS = "FeatureArgs.unknown_rate above 0"
_DENSE = "dense/"
_DENSE_OPTIMIZER = "optimizer/"


def feature_shape(config: Config) -> dict[str, Any]:
    """Return what decides the weights of declared features and is not the default; nothing without such features."""
    rates = {"unknown_rate", "swap_rate", "dropout"}
    shape = (field for field in dataclasses.fields(config.feature) if field.name not in rates)
    values = {field.name: (getattr(config.feature, field.name), getattr(FeatureArgs(), field.name)) for field in shape}
    return {name: value for name, (value, default) in values.items() if value != default and value != ()}


def model_identity(config: Config) -> dict[str, Any]:
    """Return what must agree between a checkpoint and the model that loads it beside its ids, as JSON values."""
    runtime = {
        "pretrained_backbone",
        "hidden_dropout",
        "input_dropout",
        "dtype_str",
        "residual_dtype_str",
        "kernel_backend",
        "recompute",
        *RECOMPUTE,
    }
    network = {
        f"NetworkArgs.{name}": value
        for name, value in dataclasses.asdict(config.network).items()
        if name not in runtime and (name != "backbone_options" or value)
    }
    # What others follow from comes first: the first difference is named.
    identity = {
        "task": config.task,
        "DatasetArgs.max_history_seqlen": config.dataset.max_history_seqlen,
        "DatasetArgs.max_num_candidates": config.dataset.max_num_candidates,
        "DatasetArgs.contextual_feature_names": config.dataset.contextual_feature_names,
        **network,
        "OptimizerArgs.optimizer_str": config.optimizer.optimizer_str,
        "OptimizerArgs.sparse_optimizer_str": config.optimizer.sparse_optimizer_str,
        UNKNOWN_ROWS: config.feature.unknown_rate > 0,
        "FeatureArgs": feature_shape(config) or None,
        "DynamicEmbeddingArgs.capacity": config.dynamic_embedding.capacity,
        "DynamicEmbeddingArgs.evict_strategy": config.dynamic_embedding.evict_strategy,
    }
    if config.dynamic_embedding.capacity:
        identity["DynamicEmbeddingArgs.min_count"] = config.dynamic_embedding.min_count
    if config.memory.num_memory_tokens:
        blocks = ("num_memory_tokens", "insert_method", "pretrain_item_num")
        identity |= {f"MemoryArgs.{name}": getattr(config.memory, name) for name in blocks}
    if config.item_text.is_vector:
        read = ("columns", "prompt", "max_tokens", "pooling", "freeze")
        identity |= {f"ItemTextArgs.{name}": getattr(config.item_text, name) for name in read}
    if config.ranking is not None:
        head = ("prediction_head_arch", "prediction_head_act_type", "num_tasks")
        identity |= {f"RankingArgs.{name}": getattr(config.ranking, name) for name in head}
        if config.ranking.tasks:
            identity["RankingArgs.tasks"] = config.ranking.tasks
    if config.retrieval is not None:
        shape = ("similarity", "item_bias", "mol_query_groups", "mol_item_groups", "mol_channels", "mol_gate_channels")
        identity |= {f"RetrievalArgs.{name}": getattr(config.retrieval, name) for name in shape}
        if config.retrieval.learned_temperature:
            identity["RetrievalArgs.learned_temperature"] = True
    loaded: dict[str, Any] = json.loads(json.dumps(identity))
    return loaded


class Checkpointer:
    """Writes and reads ``step_000000500`` directories below ``directory``.

    Tensors are safetensors files, one a rank: loading executes no pickle, and any number of ranks may load.
    A checkpoint is written beside its place, completed by a marker with the checksum of each file and its own, and
    renamed: one without the marker does not exist. ``latest`` and ``best`` are links.

    Training waits for a copy of the tensors to host memory; a thread of each rank writes it. Used as a context, the
    end waits for this rank's thread.

    Args:
        directory: Where checkpoints are.
        parallel: The model.
        optimizer: Both optimizers; None: nothing is saved, and weights alone are loaded.
        identity: Of the model, see ``model_identity``.
        vocabularies: What its ids stand for, see ``describe_vocabularies``.
        keep_last: How many of the newest to keep; the best is always kept.
        met: Returns which ids training has met, for the record; None: nothing is saved.
    """

    def __init__(
        self,
        directory: Path,
        parallel: Parallelized,
        optimizer: Optimizer | None,
        identity: dict[str, Any],
        vocabularies: Record,
        keep_last: int,
        met: Callable[[], Met] | None = None,
    ) -> None:
        self.directory, self.parallel, self.optimizer = directory, parallel, optimizer
        self.identity, self.vocabularies = identity, vocabularies
        self.keep_last, self.mesh, self._met = keep_last, parallel.mesh, met
        self._saved_step: int | None = None
        # Of their own: what the threads of the ranks say to each other must not meet what training says.
        self._writers = None if optimizer is None else torch.distributed.new_group(backend="gloo")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._copying = False

    def save(self, progress: Progress) -> None:
        """Copy the state after ``progress.step`` steps, and have it written; nothing to do if it is there.

        Raises:
            Exception: what kept the save before this one from being written.
        """
        if self._saved_step == progress.step:
            return
        self._copying = True
        try:
            self.wait()
            final, at = self.directory / step_name(progress.step), _copy(progress)
            partial = self.directory / f".{final.name}.partial"
            self.mesh.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            met = met_state(self._met()) if self._met is not None else {}
            tensors = {name: _host_copy(value) for name, value in self._tensors().items()} | met
            self._pending.append(self._executor.submit(self._write, tensors, at, partial, final))
            self._saved_step = progress.step
        finally:
            self._copying = False

    def amend(self, progress: Progress, *, best: bool) -> None:
        """Have the checkpoint of this step say ``progress``, for it was evaluated since; ``best`` links to it."""
        assert self._saved_step == progress.step
        if self.mesh.is_main:
            self._pending.append(self._executor.submit(self._amend, _copy(progress), best))

    def close(self) -> None:
        """Give back what saving needs, threads and connections; nothing can be saved afterwards."""
        self._executor.shutdown()
        if self._writers is not None:
            torch.distributed.destroy_process_group(self._writers)
            self._writers = None

    def busy(self) -> bool:
        """Return whether a save is under way."""
        return self._copying or any(not pending.done() for pending in self._pending)

    def wait(self) -> None:
        """Wait until the last save is written by all ranks.

        Raises:
            Exception: what kept it from being written, on every rank.
        """
        error = self._failure()
        self._pending = []
        if self.mesh.world.any(error is not None):
            raise error or CheckpointError(f"a checkpoint in {self.directory} was not written: another rank failed")

    def _failure(self) -> BaseException | None:
        """Wait for this rank's writer, and return what went wrong first."""
        errors = [pending.exception() for pending in self._pending]
        return next((error for error in errors if error is not None), None)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self.busy():
            logger.error("rank %d: %s; a checkpoint is still being written", self.mesh.rank, first_line(error))
        self._executor.shutdown()  # asks no other rank, for one may be gone
        failure = self._failure()
        if failure is not None:
            what = f"{type(failure).__name__}: {first_line(failure)}"
            logger.error("rank %d: the last checkpoint was not written: %s", self.mesh.rank, what)
            logger.debug("traceback", exc_info=failure)

    def _write(self, tensors: dict[str, Any], progress: Progress, partial: Path, final: Path) -> None:
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self._writers)
        except CheckpointException as error:
            raise _reason(error, partial) from error
        own = file_sums(sorted(partial.glob(f"shard-{self.mesh.rank + 1:05d}-*.safetensors")))
        sums: list[dict[str, Any]] = [{}] * self.mesh.world_size
        torch.distributed.all_gather_object(sums, own, group=self._writers)
        if self.mesh.is_main:
            self._complete(partial, final, progress, {name: value for part in sums for name, value in part.items()})
            point(self.directory / "latest", final.name)
            self._prune()

    def load(self, path: Path, *, optimizer: bool = True) -> Progress:
        """Load ``path`` in place and return where it stood.

        Args:
            path: A checkpoint directory.
            optimizer: False loads only what evaluation needs.

        Raises:
            CheckpointError: naming the directory and what is wrong with it.
        """
        marker = self.mesh.on_main(lambda: read_marker(path))
        for name, value in self.identity.items():
            needed = optimizer or not name.startswith("OptimizerArgs.")
            if name == UNKNOWN_ROWS and not any(table.unknown for table in self.parallel.tables.tables):
                continue  # a model without such features is the same
            if name == UNKNOWN_ROWS and not marker["model"].get(name):
                raise CheckpointError(f"checkpoint {path} has no rows for unknown values of features; set "
                                      "FeatureArgs.unknown_rate = 0 (--gin-bindings) to use it")  # fmt: skip
            if needed and marker["model"].get(name) != value:
                raise CheckpointError(
                    f"checkpoint {path} is of another model: {name} is {marker['model'].get(name)!r} there and "
                    f"{value!r} here; use the config of its run, or another --run-dir"
                )
        tensors = self._tensors(optimizer=optimizer)
        same_ranks = marker["ranks"] == self.mesh.degrees
        if not same_ranks:
            tensors = {name: value for name, value in tensors.items() if not name.startswith("rng/")}
        try:
            reader = HuggingFaceStorageReader(str(path))
            dcp.load(tensors, storage_reader=reader, process_group=self.mesh.world.host_group)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            reason = _reason(error, path) if isinstance(error, CheckpointException) else error
            raise CheckpointError(f"checkpoint {path} cannot be read: {first_line(reason)}") from error
        progress = Progress(**marker["progress"])
        self.parallel.dense.load(_below(_DENSE, tensors))
        self.parallel.tables.forget_cached_rows()
        self.parallel.tables.set_step(progress.table_steps)
        if optimizer:
            assert self.optimizer is not None
            if path.resolve().parent == self.directory.resolve():
                self._saved_step = progress.step
            self.optimizer.load(_below(_DENSE_OPTIMIZER, tensors), progress.dense_steps)
        if same_ranks:
            _set_random_state({name: value for name, value in tensors.items() if name.startswith("rng/")})
        else:  # each rank had a random state of its own; another number of ranks starts new ones
            torch.manual_seed((progress.step << 16) + self.mesh.tokens.rank)
        return progress

    def _tensors(self, *, optimizer: bool = True) -> dict[str, Any]:
        """Return every tensor of the state under one flat key each; loading writes into them."""
        tables = self.parallel.tables
        state: dict[str, Any] = {_DENSE + name: value for name, value in self.parallel.dense.state().items()}
        for width, collection in tables.collections.items():
            state |= {f"tables/{width}/{name}": value for name, value in collection.state_dict().items()}
        state |= {f"row_maps/{name}": value for name, value in tables.row_maps().items()}
        if not optimizer:
            return state
        assert self.optimizer is not None
        state |= {_DENSE_OPTIMIZER + name: value for name, value in self.optimizer.state().items()}
        for width, collection in tables.collections.items():
            for weight, moments in collection.fused_optimizer.state_dict()["state"].items():
                state |= {f"tables_optimizer/{width}/{weight}/{name}": value for name, value in moments.items()}
        return state | _random_state(self.mesh.rank)

    def _complete(self, partial: Path, final: Path, progress: Progress, sums: dict[str, Any]) -> None:
        marker = {
            "progress": dataclasses.asdict(progress),
            "ranks": self.mesh.degrees,
            "model": self.identity,
            "vocabularies": self.vocabularies,
            "files": sums,
        }
        write_marker(partial, marker)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)

    def _amend(self, progress: Progress, best: bool) -> None:
        final = self.directory / step_name(progress.step)
        marker = json.loads((final / MARKER).read_text())
        del marker["checksum"]
        if best:  # first: a run killed in between goes on before the evaluation and finds it again
            point(self.directory / "best", final.name)
        write_marker(final, marker | {"progress": dataclasses.asdict(progress)})
        self._prune()

    def _prune(self) -> None:
        keep = {path.name for path in complete_checkpoints(self.directory)[-self.keep_last :]}
        keep |= {
            os.readlink(link) for link in (self.directory / "best", self.directory / "latest") if link.is_symlink()
        }
        for path in self.directory.glob("step_*"):
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)


def _reason(error: CheckpointException, path: Path) -> BaseException:
    """Return what went wrong on the first rank on which something did, with a path."""
    reason = next(iter(error.failures.values()))[0]
    if isinstance(reason, OSError) and reason.filename is None:
        reason.filename = str(path)
    return reason


def _copy(progress: Progress) -> Progress:
    return dataclasses.replace(progress, since_last_line=list(progress.since_last_line))


def _below(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _host_copy(value: Any) -> Any:
    """Return a copy of a tensor, or of the shards of one, in host memory."""
    if not isinstance(value, ShardedTensor):
        return value.detach().to("cpu", copy=True)
    metadata = copy.deepcopy(value.metadata())
    for shard in metadata.shards_metadata:
        assert shard.placement is not None
        shard.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
    places = {tuple(shard.shard_offsets): shard for shard in metadata.shards_metadata}
    shards = [
        Shard(_host_copy(shard.tensor), places[tuple(shard.metadata.shard_offsets)]) for shard in value.local_shards()
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


def _random_state(rank: int) -> dict[str, torch.Tensor]:
    state = {f"rng/{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng/{rank}/cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        (torch.cuda if name.endswith("cuda") else torch).set_rng_state(value.cpu())
