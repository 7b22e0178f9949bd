"""Adam on host tables against the formula, row by row in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, EmbeddingLocation, PoolingMode

from hstu.parallel.fused_adam import HostAdamTables

ROWS, WIDTH, RATE = (7, 4), 4, 0.1
BETAS, EPS = (0.8, 0.95), 1e-6


def build(decay: float, limit: float | None = None) -> HostAdamTables:
    """Two tables; the first is shared by two features."""
    tables = HostAdamTables(
        [(rows, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in ROWS],
        feature_table_map=[0, 0, 1],
        pooling_mode=PoolingMode.NONE,
        optimizer=EmbOptimType.ADAM,
        learning_rate=RATE,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=decay,
        gradient_clipping=limit is not None,
        max_gradient=limit or 0.0,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        tables.flat_weights().copy_(torch.randn(sum(ROWS), WIDTH, generator=torch.Generator().manual_seed(0)))
    return tables


class NaiveAdam:
    """The definition: one row at a time."""

    def __init__(self, weights: np.ndarray, decay: float) -> None:
        self.weights, self.decay, self.steps = weights, decay, 0
        self.mean, self.square = np.zeros_like(weights), np.zeros_like(weights)

    def step(self, rows: list[int], gradients: np.ndarray) -> None:
        self.steps += 1
        for row in set(rows):
            gradient = sum(g for r, g in zip(rows, gradients, strict=True) if r == row)
            self.mean[row] = BETAS[0] * self.mean[row] + (1 - BETAS[0]) * gradient
            self.square[row] = BETAS[1] * self.square[row] + (1 - BETAS[1]) * gradient**2
            mean = self.mean[row] / (1 - BETAS[0] ** self.steps)
            square = self.square[row] / (1 - BETAS[1] ** self.steps)
            self.weights[row] -= RATE * (mean / (np.sqrt(square) + EPS) + self.decay * self.weights[row])


# Ids of each feature: two samples of the first, two of the second, two of the third; duplicates within and across.
BATCHES = (
    ([[0, 0, 3], [3, 6]], [[], [0]], [[1], [1, 1]]),
    ([[], []], [[], []], [[], []]),
    ([[5], []], [[5], [5, 2]], [[], []]),
    ([[], []], [[], []], [[3], [0, 3]]),
    ([[0, 3], [6]], [[1], []], [[1], [2]]),
)


def flat(batch: tuple[list[list[int]], ...]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return indices, offsets and the row of each index when tables lie one after another."""
    bags = [bag for feature in batch for bag in feature]
    offsets = np.cumsum([0, *map(len, bags)])
    rows = [i + start for feature, start in zip(batch, (0, 0, ROWS[0]), strict=True) for bag in feature for i in bag]
    return torch.tensor([i for bag in bags for i in bag], dtype=torch.int64), torch.tensor(offsets), rows


@pytest.mark.parametrize(("decay", "limit"), [(0.0, None), (0.3, None), (0.0, 0.4)])
def test_steps_follow_the_definition(decay: float, limit: float | None) -> None:
    tables, rng = build(decay, limit), np.random.default_rng(1)
    naive = NaiveAdam(tables.flat_weights().double().numpy().copy(), decay)
    for batch in BATCHES:
        indices, offsets, rows = flat(batch)
        found = tables(indices, offsets)
        np.testing.assert_allclose(found.detach().numpy(), naive.weights[rows].reshape(-1, WIDTH), rtol=1e-5, atol=1e-6)
        gradients = rng.standard_normal((len(rows), WIDTH))
        found.backward(torch.tensor(gradients, dtype=torch.float32))
        naive.step(rows, gradients if limit is None else gradients.clip(-limit, limit))
        np.testing.assert_allclose(tables.flat_weights().numpy(), naive.weights, rtol=1e-5, atol=1e-6)
    state = tables.get_optimizer_state()
    assert [moments["exp_avg"].shape for moments in state] == [(rows, WIDTH) for rows in ROWS]
    np.testing.assert_allclose(state[1]["exp_avg_sq"].numpy(), naive.square[ROWS[0] :], rtol=1e-5)


def test_state_is_shared_with_its_tensors_and_the_step_counts() -> None:
    """Loading writes into the returned tensors, and the bias correction needs the step."""
    tables, other = build(0.0), build(0.0)
    indices, offsets, _ = flat(BATCHES[0])
    for _ in range(3):
        tables(indices, offsets).backward(torch.ones(len(indices), WIDTH))
    with torch.no_grad():
        other.flat_weights().copy_(tables.flat_weights())
        for mine, theirs in zip(other.get_optimizer_state(), tables.get_optimizer_state(), strict=True):
            for name in mine:
                mine[name].copy_(theirs[name])
    forgetful = other.flat_weights().clone()
    other.set_optimizer_step(3)
    for module in (tables, other):
        module(indices, offsets).backward(torch.ones(len(indices), WIDTH))
    assert torch.equal(other.flat_weights(), tables.flat_weights())
    other.flat_weights().copy_(forgetful)
    other.set_optimizer_step(0)
    other(indices, offsets).backward(torch.ones(len(indices), WIDTH))
    assert not torch.allclose(other.flat_weights(), tables.flat_weights(), rtol=1e-3)


@pytest.mark.parametrize("limit", [None, 0.75])
def test_other_optimizers_stay_with_fbgemm(limit: float | None) -> None:
    tables = HostAdamTables(
        [(5, WIDTH, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        pooling_mode=PoolingMode.NONE,
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=RATE,
        gradient_clipping=limit is not None,
        max_gradient=limit or 0.0,
        device=torch.device("cpu"),
    )
    assert not tables.adam_on_host
    before = tables.weights_host.detach().clone().view(5, WIDTH)
    tables(torch.tensor([1, 1]), torch.tensor([0, 2])).backward(torch.ones(2, WIDTH))
    moved = tables.weights_host.detach().view(5, WIDTH) - before
    assert torch.allclose(moved[1], torch.tensor(-2 * RATE * (limit or 1))) and not moved[[0, 2, 3, 4]].any()
