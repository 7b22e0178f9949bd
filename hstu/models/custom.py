"""Registered backbones, encoders and losses: called, and looked at before anything is trained with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hstu.config import ConfigError, FeatureArgs, NetworkArgs, RetrievalArgs
from hstu.config.backbones import CUSTOM_BACKBONES
from hstu.config.features import CUSTOM_ENCODERS
from hstu.config.retrieval import CUSTOM_LOSSES
from hstu.data.schema import Feature
from hstu.layers.similarity import DotProduct, MixtureOfLogits
from hstu.layers.tokens import Tokens
from hstu.models.losses import LossSum, SampledCandidates, candidate_scores, empty_loss
from hstu.ops import Layout
from hstu.registry import Registered

Fault = Callable[[str], ConfigError]


def make_custom(network: NetworkArgs, max_tokens: int) -> nn.Module:
    """Return the module of a registered backbone.

    Raises:
        ConfigError: if it cannot be made, or is no causal map of jagged tokens.
    """
    part, fault = CUSTOM_BACKBONES.get(network.backbone), partial(network.error, "backbone")
    if part is None:
        raise fault("is a name that no module goes by")
    check = partial(_check_backbone, fault=fault, width=network.hidden_size, longest=min(max_tokens, 5))
    return _make(part, fault, check, network, max_tokens, **network.backbone_options)


def make_custom_encoder(feature: Feature, width: int, args: FeatureArgs) -> nn.Module:
    """Return the module of the registered encoder of a feature: numbers, or rows and lengths of sets, to [n, width].

    Raises:
        ConfigError: if it cannot be made, or mixes events, or fails where values are missing.
    """
    part = CUSTOM_ENCODERS.get(args.encoders[feature.name])
    assert part is not None, "FeatureArgs has refused it"

    def fault(message: str) -> ConfigError:
        return args.error("encoders", f"that of {feature.name!r} {message}")

    check = partial(_check_encoder, fault=fault, feature=feature, width=width)
    return _make(part, fault, check, feature, width, **args.encoder_options.get(feature.name, {}))


def _make(part: Registered, fault: Fault, check: Callable[[nn.Module], None], *given: Any, **options: Any) -> nn.Module:
    # Whoever only measures a model builds it on the meta device, on which not every module can be made.
    measured = torch.get_default_device().type == "meta"
    with torch.device("cpu") if measured else contextlib.nullcontext():
        module = _called(fault, part.make, *given, **options)
    if not isinstance(module, nn.Module):
        raise fault(f"gave a {type(module).__name__}; it must return a torch.nn.Module")
    if not measured:
        with _as_it_was(module):
            check(module)
    return module


def _called(fault: Fault, make: Callable[..., Any], *given: Any, **options: Any) -> Any:
    try:
        return make(*given, **options)
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise fault(f"fails with {type(error).__name__}: {reason}") from error


@contextlib.contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Leave modes, buffers and random numbers as they were."""
    modes = {part: part.training for part in module.modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        yield
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    for part, training in modes.items():
        part.training = training


def _moved(
    fault: Fault, module: nn.Module, rows: Callable[[Tensor], Tensor], values: Tensor
) -> Iterator[tuple[int, list[int]]]:
    """Yield each row of ``values`` and the rows of the result that change with it, in evaluation and in training.

    Raises:
        ConfigError: for a result that is not finite.
    """

    def once(x: Tensor) -> Tensor:
        torch.default_generator.manual_seed(0)  # so that dropout drops the same
        return rows(x)

    for training in (False, True):
        module.train(training)
        found = once(values)
        if not found.isfinite().all():
            raise fault("gives numbers that are not finite")
        for place in range(values.shape[0]):
            changed = values.clone()
            changed[place] = changed[place].nan_to_num() + 1.0
            far = (once(changed) - found).abs().amax(1) > 1e-4 * found.abs().max().clamp(min=1e-6)
            yield place, far.nonzero().squeeze(1).tolist()


def _require_shape(fault: Fault, what: str, found: Any, shape: tuple[int, ...], rule: str) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != shape:
        given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise fault(f"maps {what} to {given}; {rule}")
    return found


def _check_backbone(module: nn.Module, *, fault: Fault, width: int, longest: int) -> None:
    """Raise ``ConfigError`` unless a row is a finite function of its own sample, up to its own place."""
    total = longest + 1
    layout = Layout(torch.tensor([0, longest, total]), timestamps=torch.arange(total) * 60)
    values = torch.randn(total, width, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(values=values, layout=layout, event_rows=torch.arange(total), tokens_per_event=1)

    def rows(x: Tensor) -> Tensor:
        found = _called(fault, module, tokens.with_values(x))
        return _require_shape(fault, f"tokens {list(x.shape)}", found, (total, width), "it must keep the shape")

    for place, moved in _moved(fault, module, rows, values):
        if any((row < longest) != (place < longest) for row in moved):
            raise fault("mixes samples: a row changes with a token of another one")
        if any(row < place for row in moved):
            raise fault("is not causal: a row changes with a later token, which it must not see")


def _check_encoder(module: nn.Module, *, fault: Fault, feature: Feature, width: int) -> None:
    """Raise ``ConfigError`` unless each vector and its gradient are finite functions of one event, item or user."""
    is_set = feature.kind == "multi"
    columns, generator = (width if is_set else feature.width or 1), torch.Generator().manual_seed(0)
    values, lengths = torch.randn(4, columns, generator=generator), torch.tensor([1, 0, 3])
    owners = [0, 2, 2, 2] if is_set else [0, 1, 2, 3]
    if not is_set:
        values[1, -1], values[2] = torch.nan, torch.nan

    def rows(x: Tensor) -> Tensor:
        own = lengths if x.shape[0] else lengths[1:2]
        what = f"rows {list(x.shape)} of sets" if is_set else f"numbers {list(x.shape)}"
        shape = (own.shape[0] if is_set else x.shape[0], width)
        found = _called(fault, module, x, own) if is_set else _called(fault, module, x)
        return _require_shape(fault, what, found, shape, f"it must give {list(shape)}")

    for place, moved in _moved(fault, module, rows, values):
        if any(row != owners[place] for row in moved):
            raise fault("mixes events: the vector of one changes with the value of another")
    rows(values[:0])  # a batch, or a rank's part of one, may have none
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    with torch.enable_grad():
        total = rows(values.requires_grad_(is_set)).sum()
    if total.requires_grad and (wanted := [*weights, *([values] if is_set else [])]):
        for gradient in torch.autograd.grad(total, wanted, allow_unused=True):
            if gradient is not None and not gradient.isfinite().all():
                raise fault("has gradients that are not finite where a value is missing; replace NaN before anything "
                            "that learns, not after it")  # fmt: skip


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
    part, count, fault = CUSTOM_LOSSES.get(args.loss), sampled.query.shape[0], partial(args.error, "loss")
    assert part is not None, "RetrievalArgs has refused it"
    if count == 0:
        return empty_loss(sampled, similarity)
    right, wrong, live = candidate_scores(sampled, similarity, temperature)
    losses = _called(fault, part.make, right, wrong, live, **args.loss_options)
    if not isinstance(losses, Tensor) or losses.shape != (count,):
        found = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise fault(f"returned {found} for {count} label tokens; it must return one loss each, [L]")
    return LossSum(total=losses.sum(), count=count, live_negatives=live.sum().to(losses.dtype))
