"""Every shipped config parses and takes two steps on tiny data in its format, through to the test score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hstu.config import load_config
from tests.launch import ROOT, entrypoint
from tests.tiny import write_tiny

TASKS = ("ranking", "retrieval")
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.gin"))
# Data set: number of classes of its actions; 0 is a binary action.
DATA = {"synthetic": 0, "custom": 0, "ml-100k": 5, "ml-1m": 5, "ml-20m": 10, "amazon-books": 5}
SMALL = (
    "TrainerArgs.train_batch_size=8",
    "TrainerArgs.eval_batch_size=16",
    "TrainerArgs.max_train_iters=2",
    "TrainerArgs.max_eval_iters=1",
    "TrainerArgs.log_interval=1",
    "TrainerArgs.loggers=()",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("configs")
    for name, classes in DATA.items():
        write_tiny(path / "tmp_data" / name, num_users=24, classes=classes)
    return path


def test_there_are_configs() -> None:
    wanted = {f"{data}_{task}.gin" for data in ("synthetic", "ml_100k", "movielen", "custom") for task in TASKS}
    models = ("hstu", "hstu_large", "sasrec")
    wanted |= {f"{data}_{model}_retrieval.gin" for data in ("ml_1m", "ml_20m", "amazon_books") for model in models}
    assert wanted <= set(CONFIGS)


@pytest.mark.parametrize("config", CONFIGS)
def test_two_steps(place: Path, config: str) -> None:
    task = Path(config).stem.rsplit("_", 1)[1]
    flags = [f"--gin-config-file={config}", f"--run-dir={config}.run", *(f"--gin-bindings={line}" for line in SMALL)]
    done = entrypoint()(task, *flags, cwd=place)
    assert done.code == 0, done.err
    run = place / f"{config}.run"
    losses = [r["loss"] for r in map(json.loads, (run / "metrics.jsonl").open()) if r["kind"] == "train"]
    assert len(losses) == 2
    given = load_config(task, [config]).config  # type: ignore[arg-type]
    record = json.loads((run / "eval.json").read_text())
    assert tuple(record["metrics"]) == given.eval_metrics and record["split"] == "test"
    # What was saved with the run says the same again.
    saved = [load_config(task, [str(run / name)]) for name in ("config.gin", "operative.gin")]  # type: ignore[arg-type]
    assert saved[0].operative == saved[1].operative == (run / "operative.gin").read_text()
    assert saved[0].config.network == given.network and saved[0].config.trainer.max_train_iters == 2
