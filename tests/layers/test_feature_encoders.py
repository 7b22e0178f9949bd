"""Encoders of features and their merge, against plain loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hstu.layers.feature_encoders import FeatureMerge, NumberEncoder, QuantileNormalize, Standardize, pool_sets

NAN = float("nan")


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of ``out``, in which no entry weighs as much as another."""
    weights = torch.linspace(0.5, 2.0, out.numel(), dtype=out.dtype).view_as(out)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def same(found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for one, other in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_sets_are_pooled_one_by_one(pooling: str) -> None:
    lengths = torch.tensor([2, 0, 3, 1, 0])
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    expected = []
    for own in rows.split(lengths.tolist()):
        total = own.sum(0)
        expected.append(total / max(1, len(own)) if pooling == "mean" else total)
    same(pool_sets(rows, lengths, pooling), torch.stack(expected), rows)  # type: ignore[arg-type]
    assert pool_sets(rows[:0], lengths[:0], pooling).shape == (0, 3)  # type: ignore[arg-type]


def test_quantiles_spread_values_evenly() -> None:
    data = np.sort(np.random.default_rng(0).lognormal(3, 2, 5001)).astype(np.float32)
    spread = QuantileNormalize(tuple(np.quantile(data, np.linspace(0, 1, 101)).tolist()))
    found = spread(torch.from_numpy(data)).double()
    expected = (torch.arange(5001).double() / 5000 * 2 - 1) * math.sqrt(3)
    # Between two of 101 knots the log-normal is not straight: at most the whole gap of one.
    assert (found - expected).abs().max() < 2 * math.sqrt(3) / 100 and (found.diff() >= 0).all()
    assert abs(found.std().item() - 1) < 0.01 and found[[0, -1]].abs().sub(math.sqrt(3)).abs().max() < 1e-6
    assert spread(torch.tensor([-1e30, 1e30])).tolist() == pytest.approx([-math.sqrt(3), math.sqrt(3)])


def test_a_repeated_value_takes_the_middle_of_its_places() -> None:
    half = QuantileNormalize((0.0,) * 51 + tuple(np.linspace(0.1, 5, 50).tolist()))
    assert half(torch.tensor([0.0])).item() == pytest.approx((2 * 0.25 - 1) * math.sqrt(3))
    constant = QuantileNormalize((7.0,) * 101)
    assert constant(torch.tensor([6.0, 7.0, 8.0])).tolist() == pytest.approx([-math.sqrt(3), 0, math.sqrt(3)], abs=1e-6)


@pytest.mark.parametrize("kind", ["raw", "linear", "soft_one_hot"])
def test_numbers_against_a_loop(kind: str) -> None:
    torch.manual_seed(0)
    encoder = NumberEncoder(kind, 3, scaling=Standardize(2.0, 4.0), bins=5).double()  # type: ignore[arg-type]
    numbers, expected = [1.0, NAN, -3.0, 0.0], []
    for number in numbers:
        x = torch.tensor((number - 2) / 4, dtype=torch.float64)
        if kind == "raw":
            expected.append(torch.tensor([0.0, 1.0]) if math.isnan(number) else torch.stack([x, torch.zeros_like(x)]))
        elif math.isnan(number):
            expected.append(encoder.missing)
        elif kind == "linear":
            expected.append(x * encoder.weight[0])  # type: ignore[index]
        else:
            bins, rows = encoder.bins, encoder.weight
            assert bins is not None and rows is not None
            shares = [torch.exp(x * bins.weight[p, 0] + bins.bias[p]) for p in range(5)]
            expected.append(sum(share / sum(shares) * rows[p] for p, share in enumerate(shares)))
    found = encoder(torch.tensor(numbers, dtype=torch.float64)[:, None])
    assert found.shape == (4, encoder.width)
    if kind == "raw":
        torch.testing.assert_close(found, torch.stack([row.double() for row in expected]))
    else:
        same(found, torch.stack(expected), *encoder.parameters())
    assert encoder(torch.empty(0, 1, dtype=torch.float64)).shape == (0, encoder.width)


def test_a_vector_with_a_missing_number_is_missing() -> None:
    encoder = NumberEncoder("linear", 2, in_features=3).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    holes = x.clone()
    holes[2, 1] = NAN
    assert encoder.weight is not None
    expected = torch.stack([row @ encoder.weight for row in x])
    expected = torch.stack([*expected[:2], encoder.missing, expected[3]])
    same(encoder(holes), expected, x, *encoder.parameters())


def test_constant_numbers_are_not_divided_by_zero() -> None:
    assert Standardize(5.0, 0.0)(torch.tensor([5.0, 6.0])).tolist() == [0.0, 1.0]


WIDTHS = {"item": 4, "brand": 2, "price": 1, "tags": 4}


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return unit * layer.weight + layer.bias


@pytest.mark.parametrize("kind", ["concat", "mlp", "sum", "multiply"])
@pytest.mark.parametrize("normed", [(), tuple(WIDTHS)])
def test_merges_against_their_formulas(kind: str, normed: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    hidden = 7 if kind == "mlp" else None
    merging = "concat" if kind == "mlp" else kind
    merge = FeatureMerge(merging, WIDTHS, 4, base="item", hidden=hidden, norm=normed).double()  # type: ignore[arg-type]
    for weight in merge.parameters():  # so that nothing is one, or zero
        nn.init.normal_(weight)
    parts = {name: torch.randn(5, width, dtype=torch.float64, requires_grad=True) for name, width in WIDTHS.items()}
    assert set(merge.norms) == set(normed) - {"price"}, "a norm of width 1 would make a constant of it"
    own = {name: norm(merge.norms[name], x) if name in merge.norms else x for name, x in parts.items()}  # type: ignore[arg-type]
    layers = [layer for layer in merge.modules() if isinstance(layer, nn.Linear)]
    if merging == "concat":
        expected = torch.cat([own[name] for name in WIDTHS], 1) @ layers[0].weight.T + layers[0].bias
        if kind == "mlp":
            expected = expected * torch.sigmoid(expected) @ layers[1].weight.T + layers[1].bias
    else:
        own |= {n: own[n] @ merge.projections[n].weight.T + merge.projections[n].bias for n in ("brand", "price")}  # type: ignore[operator,union-attr]
        others = own["brand"] + own["price"] + own["tags"]
        expected = own["item"] + others if kind == "sum" else own["item"] * (1 + others)
        assert set(merge.projections) == {"brand", "price"}
    same(merge(parts), expected, *parts.values(), *merge.parameters())


def test_dropout_is_of_training_alone() -> None:
    merge = FeatureMerge("sum", {"a": 64, "b": 64}, 64, dropout=0.5)
    parts = {name: torch.ones(100, 64) for name in "ab"}
    assert (merge(parts) == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)  # 8 deviations of 6400 draws
    assert (merge.eval()(parts) == 2).all()
