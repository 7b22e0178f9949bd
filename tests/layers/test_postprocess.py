"""Rows that carry a label, normalised as the name says; the MLP and its initialisation."""

from __future__ import annotations

import pytest
import torch

from hstu.layers.mlp import MLP, initialize
from hstu.layers.postprocess import Postprocess, l2_normalize
from hstu.layers.tokens import Tokens
from tests.layers.streams import make_tokens


def interleaved() -> Tokens:
    # Two samples: context, three events of which the last is a candidate; then one event with its action.
    tokens = make_tokens((6, 2), (1, 0), (1, 0))
    return Tokens(**{**vars(tokens), "event_rows": torch.tensor([1, 3, 5, 6]), "tokens_per_event": 2})


def test_rows_of_items_and_rows_of_the_last_token_of_an_event() -> None:
    tokens = interleaved()
    hidden = torch.randn(8, 10)
    events, every = torch.tensor([0, 2, 3]), Postprocess(10, "none", 1e-6, last_token=False)
    assert torch.equal(every(hidden, every.rows(tokens, events)), hidden[[1, 5, 6]])
    last = Postprocess(10, "none", 1e-6, last_token=True)
    assert torch.equal(last(hidden, last.rows(tokens, torch.tensor([0, 1, 3]))), hidden[[2, 4, 7]])
    assert Postprocess(10, "l2", 1e-6, last_token=True)(hidden, events[:0]).shape == (0, 10)
    sharded = tokens.shard(torch.tensor([5, 1]))
    assert every.rows(sharded, events).tolist() == [1, 0, -1]


def test_each_norm_does_what_it_says() -> None:
    tokens, hidden = interleaved(), 3 + torch.randn(8, 10)
    hidden[3] = 0
    rows = hidden[tokens.event_rows]
    l2 = Postprocess(10, "l2", 1e-6, last_token=False)(hidden, tokens.event_rows)
    lengths = rows.pow(2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(l2, torch.where(lengths > 0, rows / lengths.clamp(min=1e-6), 0.0))
    layer = Postprocess(10, "layer_norm", 1e-3, last_token=False)
    torch.nn.init.normal_(layer.layer_norm.weight)  # type: ignore[union-attr]
    torch.nn.init.normal_(layer.layer_norm.bias)  # type: ignore[union-attr]
    centred = rows - rows.mean(1, keepdim=True)
    expected = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-3).sqrt()
    expected = expected * layer.layer_norm.weight + layer.layer_norm.bias  # type: ignore[union-attr]
    torch.testing.assert_close(layer(hidden, tokens.event_rows), expected)
    assert Postprocess(10, "none", 1.0, last_token=False).layer_norm is None


def test_normalisation_happens_in_float32() -> None:
    hidden = torch.randn(8, 10, dtype=torch.bfloat16)
    out = Postprocess(10, "l2", 1e-6, last_token=False)(hidden, interleaved().event_rows)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4))


def test_epsilon_bounds_the_length_of_small_vectors() -> None:
    torch.testing.assert_close(l2_normalize(torch.tensor([[3e-4, 4e-4]]), 1e-2), torch.tensor([[0.03, 0.04]]))


def test_gradients_of_units() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    x[0], x[1, 0] = 0.0, 1e-3 * x[1, 0]  # shorter than eps
    x.requires_grad_()
    found = l2_normalize(x, 0.1)
    wanted = torch.nn.functional.normalize(x, dim=-1, eps=0.1)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(x)
    (own,), (other,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(wanted, x, grad)
    torch.testing.assert_close(own, other)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_has_an_activation_between_layers_and_none_at_the_end(activation: str, bias: bool) -> None:
    mlp = MLP(4, (5, 3), activation=activation, bias=bias)
    first, second = mlp.layers[0], mlp.layers[2]
    x = torch.randn(7, 4)
    between = getattr(torch.nn.functional, activation)(first(x))
    assert torch.equal(mlp(x), second(between)) and len(mlp.layers) == 3
    assert (first.bias is not None) == (second.bias is not None) == bias
    assert len(MLP(4, (5,)).layers) == 1


def test_initialisation_reaches_every_linear_layer() -> None:
    torch.manual_seed(0)
    mlp = MLP(200, (300, 100))
    initialize(mlp, "normal", 0.1)
    for layer in (mlp.layers[0], mlp.layers[2]):
        assert abs(float(layer.weight.detach().std()) - 0.1) < 0.005 and not layer.bias.any()
    initialize(mlp, "xavier_uniform", 0.0)
    bound = (6 / 500) ** 0.5
    assert 0.95 * bound < float(mlp.layers[0].weight.detach().abs().max()) <= bound
