"""Models whose batches stand in slots, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hstu.config import load_config
from hstu.data import SequenceDataset
from hstu.data.loader import BatchLoader
from hstu.data.splits import leave_one_out
from hstu.models import RankingModel, RetrievalModel, build_model, make_collator
from hstu.models.lookup import Lookup
from hstu.models.negatives import count_items
from hstu.models.padding import ROWS
from tests.parallel.cases import BPR, CANDIDATES, FULL, IN_BATCH, LLAMA_BCE, MEMORY, NCE, RESEARCH, SASREC, WIDTHS
from tests.tiny import BINDINGS

TIMES = ("NetworkArgs.num_time_buckets=16", "NetworkArgs.time_bucket_of='gap'")
MOL = ("RetrievalArgs.similarity='mol'", "RetrievalArgs.mol_dropout=0.0", "RetrievalArgs.mol_mutual_information=0.1")
POPULAR = ("RetrievalArgs.sampling_strategy='log_uniform'", "RetrievalArgs.logq_correction=True")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "candidates": ("ranking", (*CANDIDATES, *TIMES)),
    "added": ("ranking", ("NetworkArgs.token_layout='add'", *SASREC, *CANDIDATES)),
    "concat": ("retrieval", ("NetworkArgs.token_layout='concat'", *WIDTHS)),
    "research": ("retrieval", (*RESEARCH, "DatasetArgs.contextual_feature_names=()")),
    "recomputed": ("retrieval", (*RESEARCH, "NetworkArgs.recompute='selective'")),
    "sasrec-in-batch": ("retrieval", (*SASREC, *IN_BATCH, "RetrievalArgs.logq_correction=True")),
    "llama-bce": ("retrieval", LLAMA_BCE),
    "mol": ("retrieval", (*MOL, *POPULAR)),
    "full": ("retrieval", (*FULL, "RetrievalArgs.label_smoothing=0.1", "RetrievalArgs.item_bias=True")),
    "bpr": ("retrieval", (*BPR, *IN_BATCH)),
    "nce-memory": ("retrieval", (*NCE, *IN_BATCH, *MEMORY)),
}


def model_and_batches(
    dataset: SequenceDataset, task: str, *bindings: str, batch_size: int = 13
) -> tuple[RankingModel | RetrievalModel, list[Any]]:
    """Return a model in float64, and batches as training has them."""
    config = load_config(task, [], [*BINDINGS[task], *bindings]).config  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = build_model(config, dataset.schema).double()
    split = leave_one_out(dataset.lengths)["train"]
    if isinstance(model, RetrievalModel):
        model.sampler.set_counts(count_items(dataset, split))
    collate = make_collator(config, dataset.schema)
    loader = BatchLoader(
        dataset=dataset, split=split, collate=collate, batch_size=batch_size, seed=1, shuffle=True, num_workers=0
    )
    return model, [model.training_batch(batch) for batch in loader.epoch(0)]


def differentiated(
    model: RankingModel | RetrievalModel, found: dict[str, Tensor], request: Lookup
) -> tuple[Any, dict[str, Tensor | None]]:
    """Return the loss and its gradients, of rows of tables and of weights."""
    leaves = {name: rows.detach().requires_grad_() for name, rows in found.items()}
    loss = model.loss(leaves, request)
    own = {name: weight for name, weight in model.named_parameters() if not name.startswith("embeddings.")}
    inputs = {**{ROWS + name: leaf for name, leaf in leaves.items()}, **own}
    return loss, dict(zip(inputs, torch.autograd.grad(loss.total, [*inputs.values()], allow_unused=True), strict=True))
