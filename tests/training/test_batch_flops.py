"""Counted work against loops over tokens; what a rank without a sample counts; the table at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu.config import load_config
from hstu.models.backbone import make_backbone
from hstu.parallel.mesh import Group, parallel_state
from hstu.parallel.tensor import TensorParallel
from hstu.training.batch_flops import _item_elements, batch_flops, encoded_pool, feature_products, matrix_elements
from hstu.training.summary import memory_rows, memory_table
from tests.models.test_features import LENGTHS, WAYS, batch_of, build, config_of
from tests.samples import declared_features, make_dataset
from tests.tiny import BINDINGS
from tests.training.runs import grid, trainer


@pytest.mark.parametrize("candidates", [0, 3])
def test_ranking_work_by_hand(data: Path, tmp_path: Path, candidates: int) -> None:
    with trainer(data, tmp_path, "ranking", f"DatasetArgs.max_num_candidates={candidates}") as run:
        batch = next(run.loaders["train"].epoch(0))
        found = batch_flops(run.model, run.config, batch)
    hidden, heads, width, layers, expected = 16, 2, 8, 2, 0
    for events, own in zip(batch.lengths("item_id").tolist(), batch.num_candidates.tolist(), strict=True):
        history = 1 + 2 * (events - own)  # one context token, then item and action of each event
        pairs = sum(i + 1 for i in range(history)) + own * (history + 1)
        tokens = history + own
        expected += layers * 6 * tokens * (hidden * 4 * heads * width + heads * width * hidden)
        expected += layers * 2 * pairs * heads * (2 * width + 5 * width)
    expected += 6 * batch.labels.numel() * (16 * 16 + 16)
    assert found == expected


@pytest.mark.parametrize("backbone", ["hstu", "sasrec", "llama", "gru", "lstm", "mean"])
def test_products_of_the_backbone_are_those_that_torch_counts(data: Path, tmp_path: Path, backbone: str) -> None:
    """Of one token, which attends to itself alone: what is left are the products with weights."""
    with trainer(data, tmp_path, "retrieval", f"NetworkArgs.backbone='{backbone}'") as run:
        one = torch.nn.Sequential(*[m for m in run.model.backbone.modules() if isinstance(m, torch.nn.Linear)])
        with FlopCounterMode(display=False) as counter:
            for layer in one:
                layer(torch.zeros(1, layer.in_features))
        gates = {"gru": 3, "lstm": 4}.get(backbone)
        if gates is None:
            assert counter.get_total_flops() == 2 * matrix_elements(run.model.backbone)
        else:
            assert matrix_elements(run.model.backbone) == 2 * 2 * gates * 16 * 16


@pytest.mark.parametrize(
    ("kind", "way"), [("candidates", "defaults"), ("next", "merged"), ("next", "sums"), ("history", "raw")]
)
def test_products_of_features_are_those_that_torch_counts(tmp_path: Path, kind: str, way: str) -> None:
    dataset = make_dataset(tmp_path / "small", LENGTHS, num_items=30, declared=declared_features())
    config = config_of(kind, *WAYS[way])
    model, batch = build(dataset, config), batch_of(dataset, config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch)
    counted = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    pool = 0 if config.retrieval is None else encoded_pool(model, batch) * _item_elements(model.item_encoder)
    expected = 2 * (feature_products(model, batch) + pool)
    assert (
        sum(counted.get(part, 0) for part in ("feature_tokens", "item_encoder.encoders", "item_encoder.merge"))
        == expected
    )
    assert expected > 0


@pytest.mark.parametrize("backbone", ["hstu", "sasrec", "llama"])
def test_products_count_whole_where_ranks_share_them(backbone: str) -> None:
    line = f"NetworkArgs.backbone='{backbone}'"
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], line]).config
    module = make_backbone(config.network, 17)
    whole = matrix_elements(module)
    with grid(1, 2):
        group = Group.of(parallel_state.get_tensor_model_parallel_group())
        TensorParallel(group, config.tensor_model_parallel, torch.device("cpu")).split(module)
    assert matrix_elements(module) == whole > sum(w.numel() for w in module.parameters() if w.dim() == 2)


def test_a_stand_in_counts_nothing(data: Path, tmp_path: Path) -> None:
    with trainer(data, tmp_path, "ranking") as run:
        loader = replace(run.loaders["train"], batch_size=119, rank=1, world_size=2, balance=None)
        (full, *_), loader = list(loader.epoch(0)), replace(loader, batch_size=1, rank=1)
        split = replace(loader.split, users=loader.split.users[:1], stop=loader.split.stop[:1])
        (empty,) = replace(loader, split=split).epoch(0)
        assert full.num_samples > 0 and empty.num_samples == 1
        run.stepper.take([empty], run.progress)
        record = run.meter.read(1)
    assert record["sequences_per_second"] == record["tokens_per_second"] == record["flops_per_second"] == 0


def test_the_table_at_the_start(data: Path, tmp_path: Path) -> None:
    with trainer(data, tmp_path, "ranking", "OptimizerArgs.sparse_optimizer_str='rowwise_adagrad'") as run:
        rows = {row[0]: row[1:] for row in memory_rows(run.parallel, run.optimizer)}
        text = memory_table(run.parallel, run.optimizer)
        dense = sum(p.numel() for p in run.parallel.dense.ddp.module.parameters())
    assert rows["dense, with gradients"] == (f"{dense:,}", "", 8 * dense, 8 * dense)
    assert rows["table item_id"] == ("120 x 16", "row_wise fused", 120 * 16 * 4, 120 * 4)
    assert text.splitlines()[-1].split()[0] == "all" and len(text.splitlines()) == len(rows) + 2
