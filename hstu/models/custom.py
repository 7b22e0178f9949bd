"""Registered backbones and losses: called, and looked at before anything is trained with them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from hstu.config import ConfigError, NetworkArgs, RetrievalArgs
from hstu.config.backbones import CUSTOM_BACKBONES
from hstu.config.retrieval import CUSTOM_LOSSES
from hstu.layers.similarity import DotProduct, MixtureOfLogits
from hstu.layers.tokens import Tokens
from hstu.models.losses import LossSum, SampledCandidates, candidate_scores, empty_loss
from hstu.ops import Layout


def make_custom(network: NetworkArgs, max_tokens: int) -> nn.Module:
    """Return the module of a registered backbone.

    Raises:
        ConfigError: if it cannot be made, or is no causal map of jagged tokens.
    """
    part = CUSTOM_BACKBONES.get(network.backbone)
    if part is None:
        raise network.error("backbone", "is a name that no module goes by")
    # Whoever only measures a model builds it on the meta device, on which not every module can be made.
    measured = torch.get_default_device().type == "meta"
    with torch.device("cpu") if measured else contextlib.nullcontext():
        module = _called(network, "backbone", part.make, network, max_tokens, **network.backbone_options)
    if not isinstance(module, nn.Module):
        raise network.error("backbone", f"gave a {type(module).__name__}; it must return a torch.nn.Module")
    if not measured:
        _try_out(module, network, min(max_tokens, 5))
    return module


def _called(owner: Any, field: str, make: Any, *given: Any, **options: Any) -> Any:
    try:
        return make(*given, **options)
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise owner.error(field, f"fails with {type(error).__name__}: {reason}") from error


@torch.no_grad()
def _try_out(module: nn.Module, network: NetworkArgs, longest: int) -> None:
    """Raise ``ConfigError`` unless a row is a finite function of its own sample, up to its own place."""
    lengths = [longest, 1]
    total, training = sum(lengths), module.training
    layout = Layout(torch.tensor([0, longest, total]), timestamps=torch.arange(total) * 60)
    values = torch.randn(total, network.hidden_size, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(values=values, layout=layout, event_rows=torch.arange(total), tokens_per_event=1)
    module.eval()
    rows = _called(network, "backbone", module, tokens)
    if not isinstance(rows, Tensor) or rows.shape != values.shape:
        found = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise network.error("backbone", f"maps tokens {list(values.shape)} to {found}; it must keep the shape")
    if not rows.isfinite().all():
        raise network.error("backbone", "gives numbers that are not finite")
    for place in range(total):
        changed = values.clone()
        changed[place] += 1.0
        other = _called(network, "backbone", module, tokens.with_values(changed))
        moved = ((other - rows).abs().amax(1) > 1e-4 * rows.abs().max().clamp(min=1e-6)).nonzero().squeeze(1).tolist()
        if any((row < longest) != (place < longest) for row in moved):
            raise network.error("backbone", "mixes samples: a row changes with a token of another one")
        if any(row < place for row in moved):
            raise network.error("backbone", "is not causal: a row changes with a later token, which it must not see")
    module.train(training)


def custom_loss(
    args: RetrievalArgs,
    sampled: SampledCandidates,
    similarity: DotProduct | MixtureOfLogits,
    *,
    temperature: float | Tensor,
) -> LossSum:
    """Return the registered loss of label tokens and their negatives.

    Raises:
        ConfigError: if it fails, or does not return one loss a token.
    """
    part, count = CUSTOM_LOSSES.get(args.loss), sampled.query.shape[0]
    assert part is not None, "RetrievalArgs has refused it"
    if count == 0:
        return empty_loss(sampled, similarity)
    right, wrong, live = candidate_scores(sampled, similarity, temperature)
    losses = _called(args, "loss", part.make, right, wrong, live, **args.loss_options)
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise args.error("loss", f"returned {found} for {count} label tokens; it must return one loss each, [L]")
    return LossSum(total=losses.sum(), count=count, live_negatives=live.sum().to(losses.dtype))
