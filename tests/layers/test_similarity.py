"""Similarities against their definitions, one pair at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hstu.layers import similarity as similarity_module
from hstu.layers.similarity import DotProduct, MixtureOfLogits, mutual_information
from tests.layers.naive import silu

D, P_Q, P_I, C = 6, 2, 3, 4


def mixture(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> MixtureOfLogits:
    torch.manual_seed(0)
    shape = dict(query_groups=P_Q, item_groups=P_I, channels=C, gate_channels=5)
    module = MixtureOfLogits(D, **shape, dropout=dropout, eps=1e-6).to(dtype)  # type: ignore[arg-type]
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def vectors(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, D, generator=generator, dtype=torch.float64).requires_grad_()


def two_layers(x: Tensor, mlp: nn.Module) -> Tensor:
    first, last = mlp.layers[0], mlp.layers[2]  # type: ignore[index]
    return silu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias


def naive_gates_and_score(m: MixtureOfLogits, q: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The gates [K] and the score of one query [D] and one item [D]."""
    q_vectors = (m.query_vectors.weight @ q + m.query_vectors.bias).view(P_Q, C)
    x_vectors = (m.item_vectors.weight @ x + m.item_vectors.bias).view(P_I, C)
    dots = torch.stack([(a / a.norm() * (b / b.norm())).sum() for a in q_vectors for b in x_vectors])
    logits = two_layers(q, m.query_gate) * two_layers(x, m.item_gate) + two_layers(dots, m.pair_gate)
    gates = logits.exp() / logits.exp().sum()
    return gates, (gates * dots).sum()


@pytest.mark.parametrize("chunk", [1 << 22, 1])
def test_mixture_of_logits_and_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_module, "_CHUNK_ELEMENTS", chunk)
    m, rows, items = mixture(), vectors(4), vectors(7, 2)
    found = m.scores(m.queries(rows), m.items(items))
    expected = torch.stack([torch.stack([naive_gates_and_score(m, q, x)[1] for x in items]) for q in rows])
    torch.testing.assert_close(found, expected)
    leaves = [rows, items, *m.parameters()]
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view_as(found)
    truth = torch.autograd.grad((expected * weights).sum(), leaves)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), leaves), truth, strict=True):
        torch.testing.assert_close(a, b)


def test_items_of_its_own_score_as_items_that_all_share() -> None:
    m, rows, items = mixture(), vectors(4), vectors(7, 2)
    columns = torch.tensor([[0, 3], [6, 6], [1, 0], [2, 5]])
    own, gates = m.mix(m.queries(rows), m.items(items)[columns])
    torch.testing.assert_close(own, m.scores(m.queries(rows), m.items(items)).gather(1, columns))
    torch.testing.assert_close(gates[1, 0], naive_gates_and_score(m, rows[1], items[6])[0])


def test_gates_drop_out_only_while_training() -> None:
    m, rows, items = mixture(dropout=0.5), vectors(4), vectors(7, 2)
    assert not torch.equal(m.scores(m.queries(rows), m.items(items)), m.scores(m.queries(rows), m.items(items)))
    m.eval()
    expected = naive_gates_and_score(m, rows[2], items[5])[1]
    torch.testing.assert_close(m.scores(m.queries(rows), m.items(items))[2, 5], expected)


@pytest.mark.parametrize(("queries", "items"), [(False, False), (False, True), (True, True)])
def test_dot_product_and_cosine(queries: bool, items: bool) -> None:
    s, q, x = DotProduct(normalize_queries=queries, normalize_items=items, eps=1e-6), vectors(2), vectors(3, 2)
    found = s.scores(s.queries(q), s.items(x))
    expected = sum(a.item() * b.item() for a, b in zip(q[1], x[2], strict=True))
    expected /= (float(q[1].norm()) if queries else 1) * (float(x[2].norm()) if items else 1)
    assert found[1, 2].item() == pytest.approx(expected)


def test_mutual_information() -> None:
    gates = torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]], [[0.9, 0.1], [0.5, 0.5]]])
    mean = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    third = mean - 0.5 * (-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) + math.log(2))
    assert mutual_information(gates).tolist() == pytest.approx([0.0, math.log(2), third], abs=1e-6)
    certain = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    mutual_information(certain).sum().backward()
    assert bool(certain.grad.isfinite().all())  # type: ignore[union-attr]
