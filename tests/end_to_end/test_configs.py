"""Every shipped config parses and takes two steps on tiny data in its format, through to the test score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hstu.cli.preprocess import DATASETS
from hstu.config import load_config
from tests.launch import ROOT, entrypoint
from tests.preprocessing.conftest import exposures, make, ratings, write_amazon, write_kuairand
from tests.tiny import write_tiny

TASKS = ("ranking", "retrieval")
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.gin"))
# Data set: number of classes of its actions; 0 is a binary action.
DATA = {"synthetic": 0, "custom": 0, "ml-100k": 5, "ml-1m": 5, "ml-20m": 10, "amazon-books": 5}
# Made of raw files in their published layouts.
# Another one of the same model, or of the same layout of data, is run in their place by the quick tests.
TWINS = ("_large_", "kuairand_1k", "kuairand_27k", "amazon_sports", "amazon_toys", "ml_20m", "books_sasrec", "movielen")
KUAIRAND, AMAZON = ("kuairand-pure", "kuairand-1k", "kuairand-27k"), ("amazon-beauty", "amazon-sports", "amazon-toys")
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
    for name in KUAIRAND:
        write_kuairand(path / "raw" / name, name, exposures(num_users=24), range(24))
    for name in AMAZON:
        rows = [(f"A{user}", f"B{item}", float(stars), time) for user, item, stars, time in ratings(24)]
        write_amazon(path / "raw" / name / DATASETS[name].logs[0], rows)
    for name in (*KUAIRAND, *AMAZON):
        everyone = {} if name in KUAIRAND else {"min_user_events": 0, "min_item_events": 0}
        make(name, path / "raw" / name, directory=path / "tmp_data" / name, **everyone)
    return path


def test_there_are_configs() -> None:
    wanted = {f"{data}_{task}.gin" for data in ("synthetic", "ml_100k", "movielen", "custom") for task in TASKS}
    models = ("hstu", "hstu_large", "sasrec")
    wanted |= {f"{data}_{model}_retrieval.gin" for data in ("ml_1m", "ml_20m", "amazon_books") for model in models}
    wanted |= {f"{data.replace('-', '_')}_{task}.gin" for data in KUAIRAND for task in TASKS}
    wanted |= {f"{data.replace('-', '_')}_retrieval.gin" for data in AMAZON}
    assert wanted <= set(CONFIGS)


@pytest.mark.parametrize(
    "config",
    [pytest.param(c, marks=pytest.mark.slow) if any(twin in c for twin in TWINS) else c for c in CONFIGS],
)
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
    of_all_tasks = tuple(name for name in record["metrics"] if "/" not in name)
    assert of_all_tasks == given.eval_metrics and record["split"] == "test"
    # What was saved with the run says the same again.
    saved, applied = (load_config(task, [str(run / name)]) for name in ("config.gin", "operative.gin"))  # type: ignore[arg-type]
    assert applied.operative == (run / "operative.gin").read_text()
    assert saved.config.network == given.network and saved.config.trainer.max_train_iters == 2
    assert "filter_seen = None" not in applied.operative, "what the data decided is there too"
    of_data = {"RetrievalArgs.filter_seen", "DatasetArgs.contextual_feature_names"}
    of_data |= {"NetworkArgs.num_position_buckets", "NetworkArgs.scaling_seqlen", "NetworkArgs.item_embedding"}
    of_data |= {"FeatureArgs.event_features", "FeatureArgs.item_features"}
    both = set(saved.operative.splitlines()) ^ set(applied.operative.splitlines())
    assert {line.split(" = ")[0] for line in both} <= of_data
