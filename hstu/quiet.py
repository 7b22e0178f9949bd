"""Silence for known notices of libraries that a user can do nothing about; a warning for what only pleases the eye."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator

logger = logging.getLogger(__name__)

# Warnings: (start of the message as a regular expression, category), each with the reason why it is no news.
_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Both are optional, and what Megatron-Core uses in their place is what this project is tested with.
    (r"Transformer Engine and Apex are not installed", UserWarning),
    # TorchRec's state dicts hold ShardedTensors; only a release of TorchRec can change that.
    (r"Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    # Megatron-Core calls two collectives by the names they had before torch 2.13.
    (r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated", FutureWarning),
    # Megatron-Core's distributed optimizer looks for gradients on its own views of the parameters.
    (r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed", UserWarning),
    # Advice on how CUDA overlaps the sums of tensor parallelism with products: given in docs/scaling.md.
    (r"When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE", UserWarning),
    # A default of Megatron-Core's TransformerConfig, about CUDA graphs, which nothing here turns on.
    (r"full scope is deprecated\. Use empty cuda_graph_scope", UserWarning),
)

# Log records: (logger, start of the message as a regular expression), each with its reason.
_RECORDS: tuple[tuple[str, str], ...] = (
    # The planner is given the topology of the process group, which is what we mean.
    ("torchrec.distributed.planner.types", r"The topology was constructed directly"),
    # Advice to the authors of TorchRec's pipelines on which tracing test to call.
    ("torch.fx._symbolic_trace", r"is_fx_tracing will return true"),
    # FBGEMM 1.6 is made for torch 2.11, but its own table of releases ends at 1.5 (said on the root logger).
    ("", r"\s*(\x1b\[33m)?\s*_fbgemm_torch_compat_table has no entry for 1\.6\."),
    # A CUDA build of torch, where there is a toolkit and no GPU: torch.utils builds no extensions here.
    ("torch.utils.cpp_extension", r"No CUDA runtime is found, using CUDA_HOME"),
    # Announces a debugging aid that stays off.
    ("megatron.core.rerun_state_machine", r"RerunStateMachine initialized|Implicit initialization of Rerun"),
)


class _Drop(logging.Filter):
    """Drops the records whose message starts with `pattern`."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())

    def __eq__(self, other: object) -> bool:  # addFilter then ignores a second copy
        return isinstance(other, _Drop) and other.pattern == self.pattern

    __hash__ = logging.Filter.__hash__


def silence_known_notices() -> None:
    """Drop the notices listed here and nothing else; call it before importing TorchRec or Megatron-Core."""
    for message, category in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for name, pattern in _RECORDS:
        logging.getLogger(name).addFilter(_Drop(pattern))


@contextlib.contextmanager
def warn_only(what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turn a failure in a block that is only for the eye, a picture or a curve, into one warning that says ``what``."""
    try:
        yield
    except kind as error:
        reason = (str(error).splitlines() or [""])[0]
        logger.warning("%s (%s: %s)", what, type(error).__name__, reason)
