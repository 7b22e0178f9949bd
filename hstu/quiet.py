"""Silence for known notices of TorchRec, Megatron-Core and torch that a user can do nothing about."""

from __future__ import annotations

import logging
import warnings

# (start of the message, category): why it is no news to the user.
_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Both libraries are optional; what Megatron-Core uses in their place is what this project is tested with.
    (r"Transformer Engine and Apex are not installed", UserWarning),
    # TorchRec's state dicts hold ShardedTensors; only a TorchRec release can change that.
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    # The planner's own default, built even when another reservation is passed.
    (r".*HeuristicalStorageReservation", FutureWarning),
    # Megatron-Core calls collectives by the names that torch 2.13 renamed.
    (r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)\b.*deprecated", FutureWarning),
    # The distributed optimizer looks at .grad of the views it keeps of the parameters.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    # A default of Megatron-Core's TransformerConfig, which no option of ours sets.
    (r".*full scope is deprecated", UserWarning),
)

# Loggers whose warnings speak of normal operation.
_LOGGERS: tuple[str, ...] = (
    "torchrec.distributed",  # the planner's and the topology's account of what they chose
    "megatron.core.rerun_state_machine",  # announces that it exists
    "torch.fx._symbolic_trace",  # advice to callers of is_fx_tracing(), which TorchRec's pipelines are
)


def silence_known_notices() -> None:
    """Filter the notices listed here and nothing else; call it before importing TorchRec or Megatron-Core.

    Errors of the same loggers still pass, and so do all other warnings.
    """
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
