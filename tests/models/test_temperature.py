"""A learned temperature and negatives that are nearly the positive, in every retrieval loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hstu.config import ConfigError
from hstu.data import SequenceDataset
from hstu.models.losses import SampledCandidates
from tests.models.test_models import batch_of, build
from tests.samples import make_config, make_dataset

LOSSES = {
    "sampled": ("RetrievalArgs.num_negatives=-1",),
    "columns": ("RetrievalArgs.num_negatives=3",),
    "logq": ("RetrievalArgs.num_negatives=-1", "RetrievalArgs.logq_correction=True"),
    "full": ("RetrievalArgs.loss='full_softmax'", "RetrievalArgs.label_smoothing=0.1"),
    "bce": ("RetrievalArgs.loss='bce'",),
    "bpr_max": ("RetrievalArgs.loss='bpr_max'", "RetrievalArgs.num_negatives=3"),
    "top1": ("RetrievalArgs.loss='top1'", "RetrievalArgs.num_negatives=-1"),
    "mol": ("RetrievalArgs.similarity='mol'", "RetrievalArgs.mol_dropout=0.0", "RetrievalArgs.num_negatives=-1"),
    "bias": ("RetrievalArgs.item_bias=True", "RetrievalArgs.num_negatives=-1"),
}
T = 0.2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", [5, 3, 9, 4], num_items=30)


def model_of(dataset: SequenceDataset, name: str, *lines: str) -> Any:
    own = [line for line in LOSSES[name] if "num_negatives" not in line]
    number = [line for line in LOSSES[name] if "num_negatives" in line] or ["RetrievalArgs.num_negatives=-1"]
    config = make_config("retrieval", *number, *own, f"RetrievalArgs.temperature={T}", *lines)
    model: Any = build(dataset, config, spread=False)
    model.embeddings.weights["item"].data.normal_(generator=torch.Generator().manual_seed(1))
    model.sampler.set_counts(torch.arange(1, 31))
    return model


def loss_of(model: Any, dataset: SequenceDataset) -> torch.Tensor:
    batch = batch_of(dataset, make_config("retrieval"), "train", [0, 2, 3])
    return model(replace(batch, whole_history=None)).total


@pytest.mark.parametrize("name", LOSSES)
def test_a_learned_temperature_divides_scores_and_has_the_gradient_of_the_loss(
    dataset: SequenceDataset, name: str
) -> None:
    fixed = loss_of(model_of(dataset, name), dataset)
    model = model_of(dataset, name, "RetrievalArgs.learned_temperature=True")
    loss = loss_of(model, dataset)
    torch.testing.assert_close(loss, fixed, rtol=1e-5, atol=1e-5)
    loss.backward()
    slope, step = float(model.temperature.log_scale.grad), 1e-2
    around = [loss_of(model_of(dataset, name, f"RetrievalArgs.temperature={T * math.exp(-s)}"), dataset)
              for s in (step, -step)]  # fmt: skip
    assert slope == pytest.approx(float(around[0] - around[1]) / (2 * step), rel=0.02, abs=0.02)
    assert slope != 0


def test_a_learned_temperature_stays_within_its_bounds(dataset: SequenceDataset) -> None:
    model = model_of(dataset, "sampled", "RetrievalArgs.learned_temperature=True")
    for scale, wanted in ((-1.0, 1.0), (9.0, 0.01)):
        model.temperature.log_scale.data.fill_(scale)
        assert float(model.temperature()) == pytest.approx(wanted)
    with pytest.raises(ConfigError, match="RetrievalArgs.temperature = 2.0: is where a learned one begins"):
        make_config("retrieval", "RetrievalArgs.temperature=2.0", "RetrievalArgs.learned_temperature=True")


def without(x: SampledCandidates, none: torch.Tensor) -> list[SampledCandidates]:
    """Return each label token by itself, with a pool that lacks what is none of its negatives."""
    parts = []
    for row, gone in enumerate(none):
        alone, kept = x.rows(row, row + 1), ~gone
        if x.columns is not None:
            parts.append(replace(alone, columns=x.columns[row][kept][None], units=None))
            continue
        log_q = None if x.log_q is None else (x.log_q[0][row : row + 1], x.log_q[1][kept])
        parts.append(replace(alone, pool=x.pool[kept], pool_ids=x.pool_ids[kept], log_q=log_q, units=None))
    return parts


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("bce", "full")])
def test_what_is_nearly_the_positive_is_no_negative(dataset: SequenceDataset, name: str) -> None:
    plain, model = model_of(dataset, name), model_of(dataset, name, "RetrievalArgs.closest_negative=0.99")
    for each in (plain, model):  # every second item is nearly the one before it
        rows = each.embeddings.weights["item"].data
        rows[1::2] = 3 * rows[::2] + 0.01
    seen: list[SampledCandidates] = []
    inner = model._loss
    model._loss = lambda sampled, live: (seen.append(sampled), inner(sampled, live))[1]
    loss = loss_of(model, dataset)
    (x,) = seen
    ids = x.pool_ids[None] if x.columns is None else x.pool_ids[x.columns]
    twins = ids // 2 == x.positive_ids[:, None] // 2
    assert torch.equal(x.excluded, twins)
    if x.columns is None:
        assert (twins & (ids != x.positive_ids[:, None])).any()
    with torch.no_grad():
        parts = [plain._loss(part, None).total for part in without(x, twins)]
    torch.testing.assert_close(loss, torch.stack(parts).sum(), rtol=1e-5, atol=1e-5)
    assert abs(float(loss - loss_of(plain, dataset))) > 1e-3 or x.columns is not None


def test_bce_has_no_negative_where_it_is_nearly_the_positive(dataset: SequenceDataset) -> None:
    model = model_of(dataset, "bce", "RetrievalArgs.closest_negative=0.99")
    units = F.normalize(torch.ones(2, 8)), F.normalize(torch.tensor([[1.0] * 8, [1.0] * 4 + [0.0] * 4]))
    x = SampledCandidates(
        query=torch.randn(2, 8),
        positive=torch.randn(2, 8),
        positive_ids=torch.tensor([0, 1]),
        pool=torch.randn(2, 8),
        pool_ids=torch.tensor([5, 6]),
        columns=torch.tensor([[0], [1]]),
        units=units,
        closest=0.9,
    )
    loss = model._loss(x, torch.tensor([True, True]))
    right, wrong = (x.query * x.positive).sum(1) / T, (x.query * x.pool).sum(1) / T
    torch.testing.assert_close(loss.total, F.softplus(-right).sum() + F.softplus(wrong[1]))
    assert float(loss.live_negatives) == 1


def test_a_loss_may_have_both(dataset: SequenceDataset) -> None:
    model = model_of(dataset, "full", "RetrievalArgs.closest_negative=0.99", "RetrievalArgs.learned_temperature=True")
    loss_of(model, dataset).backward()
    assert float(model.temperature.log_scale.grad) != 0
