"""``peak_worker.py DATA``: print the activations that a plan counts and the memory that a step takes, in bytes."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hstu.config import load_config
from hstu.data.reader import SequenceDataset
from hstu.parallel import Mesh
from hstu.training.plan import measure_demand
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer
from tests.tiny import BINDINGS

WIDE = (
    "NetworkArgs.hidden_size=64",
    "NetworkArgs.kv_channels=32",
    "NetworkArgs.num_layers=6",
    "DatasetArgs.max_history_seqlen=200",
)


def main() -> None:
    """Predict from a few sequences, and measure with all."""
    torch.set_num_threads(1)
    config = load_config("ranking", [], [*BINDINGS["ranking"], *WIDE]).config
    dataset = SequenceDataset.open(Path(sys.argv[1]))
    with Mesh.create() as mesh:
        trainer = Trainer(config, dataset, mesh, RunDirectory(Path("unused")))
        loader = trainer.loaders["train"]
        few = next(replace(loader, batch_size=16).epoch(0))
        demand = measure_demand(config, dataset, few)
        trainer.stepper.take([few], trainer.progress)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        many = next(replace(loader, batch_size=len(loader.split)).epoch(0))
        trainer.stepper.take([many], trainer.progress)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        tokens = trainer.model.num_tokens(many)
    print(json.dumps([demand.activations * tokens / demand.tokens, peak * 1024]))


if __name__ == "__main__":
    main()
