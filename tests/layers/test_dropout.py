"""Dropout: shares, scale and gradient; the same for the same seed; off when it should be."""

from __future__ import annotations

import pytest
import torch

from hstu.layers.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1001, 99), (3,), (0, 4)])
def test_share_and_scale(p: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.rand(shape, dtype=torch.float64).add_(1).requires_grad_()
    y = dropout(x, p, True)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=1e-4, atol=0)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad != 0, kept)
    if x.numel() > 1000:
        error = 4 * (p * (1 - p) / x.numel()) ** 0.5
        assert abs(1 - float(kept.double().mean()) - p) < error
        # Neighbours share a random number but not its bits.
        both = float((kept[:, :-1] & kept[:, 1:]).double().mean())
        assert abs(both - (1 - p) ** 2) < 2 * error


def test_masks_follow_the_seed() -> None:
    x = torch.ones(50, 7)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(dropout(x, 0.5, True))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_nothing_is_dropped(p: float, training: bool) -> None:
    x = torch.ones(50, 7)
    assert torch.equal(dropout(x, p, training), x)


def test_everything_is_dropped() -> None:
    assert not dropout(torch.ones(50, 7), 1.0, True).any()
