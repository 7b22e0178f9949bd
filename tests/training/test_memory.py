"""What a run needs at the least: never more than it takes, and told before it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hstu.config import ConfigError
from hstu.models import build_model
from hstu.training import memory
from hstu.training.memory import free_bytes, least_needs
from hstu.training.plan import activation_bytes
from hstu.training.summary import memory_rows
from tests.training.runs import trainer


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
@pytest.mark.parametrize("backbone", ["hstu", "sasrec", "gru"])
def test_needs_are_what_a_run_takes(data: Path, tmp_path: Path, task: str, backbone: str) -> None:
    with trainer(data, tmp_path, task, f"NetworkArgs.backbone='{backbone}'", "TrainerArgs.train_batch_size=999") as run:
        dense, tables, activations, *_ = least_needs(run.config, run.dataset.schema, run.mesh, run.loaders["train"])
        rows = memory_rows(run.parallel, run.optimizer)
        assert dense.size == 2 * rows[0][3], "weights, gradients, and the two moments of Adam"
        assert tables.size == sum(row[3] + row[4] for row in rows[1:])
        batch = next(run.loaders["train"].epoch(0))
        kept = activation_bytes(build_model(run.config, run.dataset.schema), batch)
        assert 0.05 * kept < activations.size < kept


NEEDS = {
    "NetworkArgs.hidden_size = 131072": ("NetworkArgs.hidden_size=131072", "NetworkArgs.backbone='sasrec'"),
    "NetworkArgs.hidden_size = 65536": ("NetworkArgs.hidden_size=65536", "NetworkArgs.backbone='hf:gpt2'"),
    "RetrievalArgs.num_negatives = 16777216": ("RetrievalArgs.num_negatives=16777216",),
    "TrainerArgs.train_batch_size = 120": (
        "NetworkArgs.hidden_size=4096",
        "NetworkArgs.num_layers=500",
        "TrainerArgs.train_batch_size=120",
    ),
}


@pytest.mark.parametrize("field", NEEDS)
def test_too_little_memory_is_told_before_anything_is_allocated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**30)
    with pytest.raises(ConfigError) as caught, trainer(data, tmp_path, "retrieval", *NEEDS[field]):
        pass
    assert str(caught.value).startswith(f"{field}: a rank needs at least ") and "has 1.0 GiB" in str(caught.value)


def test_a_container_and_other_ranks_leave_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.stat").write_text("anon 400000\nfile 900000\n")
    monkeypatch.setattr(memory, "_CGROUPS", ((tmp_path / "memory.max", "anon"), (tmp_path / "none" / "x", "rss")))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = free_bytes(torch.device("cpu"))
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 10**6 and whole > 10**6
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_bytes(torch.device("cpu")) == 600000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(torch.device("cpu")) == 300000
