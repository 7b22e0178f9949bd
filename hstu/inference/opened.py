"""A trained model opened from its run directory, without a trainer: no moments, nothing to go on with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from hstu.config import Config, load_config
from hstu.data.loader import BatchLoader
from hstu.data.reader import SequenceDataset
from hstu.models import RankingModel, RetrievalModel
from hstu.parallel import Mesh
from hstu.training.assembly import Assembly
from hstu.training.checkpoint import Checkpointer
from hstu.training.checkpoint_files import find_checkpoint, no_checkpoint
from hstu.training.item_text import with_kept_model
from hstu.training.met import read_met
from hstu.training.run_data import find_dataset, open_dataset, recorded_task, require_vocabularies, trained_on
from hstu.training.run_directory import RunDirectory
from hstu.training.windows import last_window

logger = logging.getLogger(__name__)

# However it was trained: any number of ranks may ask it, each on samples of its own, and SGD keeps no moments.
_ASKED = (
    "ContextParallelArgs.context_parallel_size = 1",
    "TensorModelParallelArgs.tensor_model_parallel_size = 1",
    "TensorModelParallelArgs.sequence_parallel = False",
    "OptimizerArgs.optimizer_str = 'sgd'",
    "OptimizerArgs.sparse_optimizer_str = 'sgd'",
    "OptimizerArgs.use_distributed_optimizer = False",
)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A trained model and its data set.

    Attributes:
        assembly: The model on the mesh, and what feeds it.
        run: Its run directory.
        checkpoint: The checkpoint that was loaded.
        step: Its step.
        columns: Role -> column of the table that the data set was made of, where that is on record.
    """

    assembly: Assembly
    run: RunDirectory
    checkpoint: Path
    step: int
    columns: dict[str, str | None]

    @property
    def config(self) -> Config:
        return self.assembly.config

    @property
    def model(self) -> RankingModel | RetrievalModel:
        return self.assembly.model

    @property
    def dataset(self) -> SequenceDataset:
        return self.assembly.dataset

    @property
    def loader(self) -> BatchLoader:
        """Samples of the test split, which requests stand in for."""
        return self.assembly.loaders["test"]

    @property
    def about(self) -> dict[str, object]:
        """What files with its answers say of it."""
        return {"run": self.run.path.name, "task": self.config.task, "step": self.step}


def open_trained(run_dir: str | Path, choice: str, bindings: list[str], mesh: Mesh) -> Opened:
    """Load a checkpoint into the model that its run directory describes.

    Args:
        run_dir: A run directory.
        choice: latest, best, a step, or a path.
        bindings: Gin lines that win over the run's config.
        mesh: The ranks.

    Raises:
        ValueError: if there is no run, checkpoint or data set, or they do not fit together.
    """
    run = RunDirectory(mesh.on_main(lambda: last_window(Path(run_dir).resolve())))
    task = recorded_task(run)
    if task is None:
        raise ValueError(f"--run_dir = {str(run_dir)!r}: holds no run (no operative.gin); give the directory of one")
    config = load_config(task, [str(run.path / "operative.gin")], [*bindings, *_ASKED]).config
    checkpoint = mesh.on_main(lambda: find_checkpoint(run.checkpoints, choice))
    if checkpoint is None:
        raise ValueError(f"--run_dir = {str(run_dir)!r}: {no_checkpoint(run.checkpoints, choice)}")
    columns = trained_on(run).get("columns", {})
    dataset = open_dataset(find_dataset(config.dataset, run), mesh)
    require_vocabularies(checkpoint, dataset, mesh, resume=False)
    config = with_kept_model(config, run.path)
    with torch.random.fork_rng():  # a checkpoint holds a random state, which the caller's is not to become
        assembly = Assembly(config, dataset, mesh)
        own = assembly.identity, assembly.vocabularies
        reader = Checkpointer(run.checkpoints, assembly.parallel, None, *own, 1)
        step = reader.load(checkpoint, optimizer=False).step
        reader.close()
        assembly.also_met(read_met(checkpoint))
    logger.info("%s of %s, step %d", task, run.path, step)
    for note in assembly.notes:
        logger.info("%s", note)
    return Opened(assembly=assembly, run=run, checkpoint=checkpoint, step=step, columns=columns)
