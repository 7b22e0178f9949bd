"""Checkpoints: everything the next step depends on, complete or not there at all."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from hstu.config import Config
from hstu.data.schema import Schema
from hstu.parallel import Parallelized
from hstu.parallel.embedding import sparse_optimizer_name
from hstu.training.optimizer import Optimizer

logger = logging.getLogger(__name__)

_MARKER = "complete.json"
_DENSE_OPTIMIZER = "optimizer/"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands: the step and what the choice of the best checkpoint needs.

    Attributes:
        step: Steps taken, skipped ones too.
        dense_steps: Steps of the dense optimizer.
        table_steps: Steps of the tables' optimizer.
        samples: Samples taken by all ranks; the data position follows from it, whatever their number.
        best_score: Best validation score so far.
        best_step: Its step.
        evaluations_since_best: For early stopping.
        stopped_early: Whether early stopping has ended the run.
        since_last_line: Sums that the next log line goes on from, see ``Meter.state``.
    """

    step: int = 0
    dense_steps: int = 0
    table_steps: int = 0
    samples: int = 0
    best_score: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    stopped_early: bool = False
    since_last_line: list[float] = dataclasses.field(default_factory=list)


def model_identity(config: Config, schema: Schema) -> dict[str, Any]:
    """Return what must agree between a checkpoint and the model that loads it, as JSON values."""
    runtime = {"hidden_dropout", "input_dropout", "dtype_str", "kernel_backend"}
    network = {
        f"NetworkArgs.{name}": value
        for name, value in dataclasses.asdict(config.network).items()
        if name not in runtime
    }
    identity = network | {
        "task": config.task,
        "DatasetArgs.max_history_seqlen": config.dataset.max_history_seqlen,
        "DatasetArgs.max_num_candidates": config.dataset.max_num_candidates,
        "DatasetArgs.contextual_feature_names": config.dataset.contextual_feature_names,
        "OptimizerArgs.optimizer_str": config.optimizer.optimizer_str,
        "OptimizerArgs.sparse_optimizer_str": sparse_optimizer_name(config.optimizer),
        "tables": {feature.name: feature.vocab_size for feature in schema.features},
    }
    if config.ranking is not None:
        head = ("prediction_head_arch", "prediction_head_act_type", "num_tasks")
        identity |= {f"RankingArgs.{name}": getattr(config.ranking, name) for name in head}
    if config.retrieval is not None:
        shape = ("similarity", "mol_query_groups", "mol_item_groups", "mol_channels", "mol_gate_channels")
        identity |= {f"RetrievalArgs.{name}": getattr(config.retrieval, name) for name in shape}
    loaded: dict[str, Any] = json.loads(json.dumps(identity))
    return loaded


class Checkpointer:
    """Writes and reads ``step_000000500`` directories below ``directory``.

    Tensors are safetensors files, one a rank: loading executes no pickle, and any number of ranks may load.
    A checkpoint is written beside its place, completed by a marker that lists the files, and renamed: one
    without the marker does not exist. ``latest`` and ``best`` are links.

    Args:
        directory: Where checkpoints are.
        parallel: The model.
        optimizer: Both optimizers.
        identity: Of the model, see ``model_identity``.
        keep_last: How many of the newest to keep; the best is always kept.
    """

    def __init__(
        self,
        directory: Path,
        parallel: Parallelized,
        optimizer: Optimizer,
        identity: dict[str, Any],
        keep_last: int,
    ) -> None:
        self.directory, self.parallel, self.optimizer = directory, parallel, optimizer
        self.identity, self.keep_last, self.mesh = identity, keep_last, parallel.mesh
        self._saved_step: int | None = None

    def save(self, progress: Progress, *, best: bool = False) -> None:
        """Write the state after ``progress.step`` steps; ``best`` moves the ``best`` link to it."""
        final = self.directory / step_name(progress.step)
        partial = self.directory / f".{final.name}.partial"
        if self._saved_step != progress.step:
            self.mesh.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(self._tensors(), storage_writer=writer, process_group=self.mesh.host_group)
            self.mesh.on_main(lambda: self._complete(partial, final, progress))
            self._saved_step = progress.step
        self.mesh.on_main(lambda: self._publish(final, best))

    def load(self, path: Path, *, optimizer: bool = True) -> Progress:
        """Load ``path`` in place and return where it stood.

        Args:
            path: A checkpoint directory.
            optimizer: False loads only what evaluation needs.

        Raises:
            CheckpointError: naming the directory and what is wrong with it.
        """
        marker = read_marker(path)
        for name, value in self.identity.items():
            needed = optimizer or not name.startswith("OptimizerArgs.")
            if needed and marker["model"].get(name) != value:
                raise CheckpointError(
                    f"checkpoint {path} is of another model: {name} is {marker['model'].get(name)!r} there and "
                    f"{value!r} here; use the config of its run, or another --run-dir"
                )
        tensors = self._tensors(optimizer=optimizer)
        same_ranks = marker["world_size"] == self.mesh.world_size
        if not same_ranks:
            tensors = {name: value for name, value in tensors.items() if not name.startswith("rng/")}
        try:
            reader = HuggingFaceStorageReader(str(path))
            dcp.load(tensors, storage_reader=reader, process_group=self.mesh.host_group)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise CheckpointError(f"checkpoint {path} cannot be read: {_first_line(reason)}") from error
        progress = Progress(**marker["progress"])
        self.parallel.tables.set_step(progress.table_steps)
        if optimizer:
            moments = {name: value for name, value in tensors.items() if name.startswith(_DENSE_OPTIMIZER)}
            moments = {name.removeprefix(_DENSE_OPTIMIZER): value for name, value in moments.items()}
            self.optimizer.load(moments, progress.dense_steps)
        if same_ranks:
            _set_random_state({name: value for name, value in tensors.items() if name.startswith("rng/")})
        else:  # each rank had a random state of its own; another number of ranks starts new ones
            torch.manual_seed((progress.step << 16) + self.mesh.rank)
        return progress

    def _tensors(self, *, optimizer: bool = True) -> dict[str, Any]:
        """Return every tensor of the state under one flat key each; loading writes into them."""
        tables = self.parallel.tables
        state: dict[str, Any] = {
            f"dense/{name}": value for name, value in self.parallel.dense.ddp.module.state_dict().items()
        }
        for width, collection in tables.collections.items():
            state |= {f"tables/{width}/{name}": value for name, value in collection.state_dict().items()}
        if not optimizer:
            return state
        state |= {_DENSE_OPTIMIZER + name: value for name, value in self.optimizer.state().items()}
        for width, collection in tables.collections.items():
            for weight, moments in collection.fused_optimizer.state_dict()["state"].items():
                state |= {f"tables_optimizer/{width}/{weight}/{name}": value for name, value in moments.items()}
        return state | _random_state(self.mesh.rank)

    def _complete(self, partial: Path, final: Path, progress: Progress) -> None:
        marker = {
            "progress": dataclasses.asdict(progress),
            "world_size": self.mesh.world_size,
            "model": self.identity,
            "files": {path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))},
        }
        write_atomically(partial / _MARKER, json.dumps(marker, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)

    def _publish(self, final: Path, best: bool) -> None:
        # In this order: a run killed in between goes on from before the best one and finds it again.
        if best:
            point(self.directory / "best", final.name)
        point(self.directory / "latest", final.name)
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


def _random_state(rank: int) -> dict[str, torch.Tensor]:
    state = {f"rng/{rank}/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng/{rank}/cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    for name, value in state.items():
        (torch.cuda if name.endswith("cuda") else torch).set_rng_state(value.cpu())


def step_name(step: int) -> str:
    """Return the directory name of a checkpoint."""
    return f"step_{step:09d}"


def is_complete(path: Path) -> bool:
    """Return whether ``path`` is a checkpoint whose writing was finished."""
    return (path / _MARKER).is_file()


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the finished checkpoints below ``directory``, oldest first."""
    return sorted(path for path in directory.glob("step_*") if is_complete(path))


def find_checkpoint(directory: Path, choice: str) -> Path | None:
    """Return the checkpoint that ``choice`` names: latest, best, a step, or a path; None if there is none.

    When the latest is damaged, the one before it is taken, and the log says so.

    Raises:
        CheckpointError: for a step or path that is not there, or if all that there is is damaged.
    """
    if choice == "best":
        return (directory / choice).resolve() if is_complete(directory / choice) else None
    if choice == "latest":
        return _newest_sound(directory)
    path = directory / step_name(int(choice)) if choice.isdigit() else Path(choice)
    if not is_complete(path):
        have = ", ".join(p.name for p in complete_checkpoints(directory)) or "none"
        raise CheckpointError(f"--checkpoint = {choice!r}: no finished checkpoint {path}; in the run directory: {have}")
    return path.resolve()


def read_marker(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Raises:
        CheckpointError: if it is not a finished checkpoint, or one of its files is missing or cut short.
    """
    try:
        marker: dict[str, Any] = json.loads((path / _MARKER).read_text())
        Progress(**marker["progress"])
        marker["model"], marker["world_size"]
        sizes = dict(marker["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable {_MARKER}: {_first_line(error)}") from error
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise CheckpointError(f"checkpoint {path} is damaged: {name} {state}; choose another with --checkpoint")
    return marker


def _newest_sound(directory: Path) -> Path | None:
    """Return the checkpoint that ``latest`` points to or, when it is damaged, the newest that is not."""
    candidates = complete_checkpoints(directory)[::-1]
    if is_complete(directory / "latest"):
        candidates.insert(0, (directory / "latest").resolve())
    damage: CheckpointError | None = None
    for path in dict.fromkeys(candidates):
        try:
            read_marker(path)
        except CheckpointError as error:
            logger.warning("%s; an older one is used if there is any", error)
            damage = error
        else:
            return path
    if damage is not None:
        raise damage
    return None


def point(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to its neighbour ``target``, at once."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds all of it or what it held before."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
