"""Planted titles, and half the items never met in training: who reads titles ranks these, who has rows alone cannot."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hstu.data.planted_text import title_words
from hstu.metrics.retrieval import target_ranks
from hstu.parallel import Mesh
from hstu.training.evaluate import _ModelScorer
from tests.tiny import write_tiny
from tests.toy_text import save_model
from tests.training.runs import trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="pip install 'hstu[text]'"),
]
PLANTED = dict(num_items=240, num_clusters=12, clusters_per_type=2, min_seqlen=8, max_seqlen=30)
# Negatives of the batch: a catalogue of negatives would teach that items of the future are never right.
LINES = ("NetworkArgs.hidden_size=32", "NetworkArgs.kv_channels=16", "OptimizerArgs.learning_rate=4e-3",
         "TrainerArgs.max_train_iters=300", "TrainerArgs.max_epochs=99", "TrainerArgs.eval_interval=150",
         "TrainerArgs.log_interval=50", "RetrievalArgs.num_negatives=-1", "RetrievalArgs.filter_seen=True",
         "RetrievalArgs.eval_metrics=('HR@10',)", "FeatureArgs.item_features=()",
         "DatasetArgs.max_history_seqlen=30")  # fmt: skip


@torch.no_grad()
def hits(data: Path, run_dir: Path, mesh: Mesh, *lines: str) -> tuple[float, float, float]:
    """Train; return HR@10 of all test targets, of the cold ones among cold items alone, and the latter's chance."""
    with torch.enable_grad(), trainer(data, run_dir, "retrieval", *LINES, *lines, mesh=mesh) as run:
        score = run.train()["metrics"]["HR@10"]
    run.model.eval()
    scorer, cold = _ModelScorer(run.model, run.loaders["test"], mesh), ~run.assembly.trained_items
    ranks = []
    for batch in run.loaders["test"].epoch(0):
        labelled, of = scorer.scored(batch)
        scores, targets = of(slice(None)), labelled.labels
        kept = cold[targets]
        place = cold.cumsum(0) - 1
        ranks.append(target_ranks(scores[kept][:, cold], place[targets[kept]], None))
    return score, float((torch.cat(ranks) <= 10).float().mean()), 10 / int(cold.sum())


def test_text_ranks_items_that_were_never_trained(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "synthetic", num_users=1500, titles=True, cold_share=0.5, **PLANTED)
    save_model(tmp_path / "bert", ["title", ":", *title_words(12)], hidden_size=128, num_hidden_layers=1)
    text = f"ItemTextArgs.model={str(tmp_path / 'bert')!r}", "ItemTextArgs.max_tokens=12"
    with Mesh.create() as mesh:
        id_all, id_cold, chance = hits(data, tmp_path / "id", mesh, "NetworkArgs.item_embedding='local'")
        both_all, both_cold, _ = hits(data, tmp_path / "both", mesh, *text, "NetworkArgs.item_embedding='both'")
    # Measured: id 0.137 and 0.089, text and id 0.145 and 0.148, chance 0.083; about 1,000 cold targets, so that the
    # standard error of the second numbers is 0.009 to 0.011.
    assert both_cold > chance + 0.02
    assert abs(id_cold - chance) < 0.036
    assert both_all > id_all - 0.036, "rows of items lose nothing by the text beside them"
