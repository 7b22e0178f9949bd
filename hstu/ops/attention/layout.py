"""Where the tokens of a batch lie and what they are: made once a batch, and asked by every layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hstu.ops.checks import check_offsets, values_readable

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Layout:
    """T tokens of B sequences, no padding: in each, context first, then history, then candidates.

    Attributes:
        offsets: ``[B + 1]`` int64, from 0 to T.
        max_seqlen: tokens of the longest sequence (or a bound on them), an int on the host. None: read from
            ``offsets``, which must then be on the CPU, where that costs no wait.
        num_context: ``[B]`` int64, leading context tokens of each sequence; None for none.
        num_candidates: ``[B]`` int64, trailing candidates of each sequence; None for none.
        segments: ``[T]`` int32, segment of each token; None: all in one.
        is_memory: ``[T]`` bool, tokens that every later segment may attend to; None for none.
        timestamps: ``[T]`` int64 seconds; needed by a bias over time differences.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. Values on an accelerator are looked at
            only inside :func:`hstu.ops.debug_checks`.
    """

    offsets: Tensor
    _: KW_ONLY
    max_seqlen: int | None = None
    num_context: Tensor | None = None
    num_candidates: Tensor | None = None
    segments: Tensor | None = None
    is_memory: Tensor | None = None
    timestamps: Tensor | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.offsets, Tensor):
            raise ValueError(f"offsets must be a tensor, got {type(self.offsets).__name__}")
        check_offsets("offsets", self.offsets, None)
        for name, dtype in (("num_context", torch.int64), ("num_candidates", torch.int64)):
            self._expect(name, dtype, (self.num_samples,))
        for name, dtype in (("segments", torch.int32), ("is_memory", torch.bool), ("timestamps", torch.int64)):
            self._expect(name, dtype, None)
        if self.max_seqlen is None:
            if self.offsets.device.type != "cpu":
                raise ValueError(
                    f"max_seqlen is None and offsets are on {self.offsets.device}: give the longest length as an int, "
                    "reading it back would wait for the device"
                )
            object.__setattr__(self, "max_seqlen", int(self.lengths.max()) if self.num_samples else 0)
        if not isinstance(self.max_seqlen, (int, torch.SymInt)) or self.max_seqlen < 0:
            raise ValueError(f"max_seqlen is {self.max_seqlen!r}: give a bound on the longest sequence, an int >= 0")
        if values_readable(self.offsets):
            self._check_values()

    @property
    def num_samples(self) -> int:
        """Number B of sequences."""
        return self.offsets.numel() - 1

    @property
    def longest(self) -> int:
        """``max_seqlen``, which is always known after construction."""
        assert self.max_seqlen is not None
        return self.max_seqlen

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int64."""
        return self.keep("lengths", self.offsets.diff)

    @property
    def context(self) -> Tensor:
        """``[B]`` int64, context tokens: the place of the first token that is none."""
        count = self.num_context
        return self.keep("context", lambda: torch.zeros_like(self.lengths) if count is None else count)

    @property
    def history(self) -> Tensor:
        """``[B]`` int64, place of the first candidate."""
        return self.keep(
            "history", lambda: self.lengths if self.num_candidates is None else self.lengths - self.num_candidates
        )

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` gives, made once for this batch: whatever follows from the layout alone."""
        if key not in self._kept:
            self._kept[key] = make()
        result: T = self._kept[key]
        return result

    def _expect(self, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
        tensor = getattr(self, name)
        if tensor is None:
            return
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != self.offsets.device:
            raise ValueError(f"{name} is on {tensor.device}, offsets on {self.offsets.device}: use one device")
        if tensor.dtype != dtype or tensor.dim() != 1 or (shape is not None and tuple(tensor.shape) != shape):
            wanted = list(shape) if shape else "[T]"
            raise ValueError(f"{name} must be {dtype} of shape {wanted}, got {tensor.dtype} {list(tensor.shape)}")

    def _check_values(self) -> None:
        total = int(self.offsets[-1])
        for name in ("segments", "is_memory", "timestamps"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel() != total:
                raise ValueError(f"{name} has {tensor.numel()} entries, offsets end at {total}: give one a token")
        if self.num_samples and int(self.lengths.max()) > self.longest:
            raise ValueError(f"max_seqlen is {self.longest}, the longest sequence has {int(self.lengths.max())} tokens")
        taken = torch.zeros_like(self.lengths)
        for name in ("num_context", "num_candidates"):
            count = getattr(self, name)
            if count is not None and bool((count < 0).any()):
                raise ValueError(f"{name} of sample {int((count < 0).nonzero()[0])} is negative")
            taken = taken if count is None else taken + count
        if bool((taken > self.lengths).any()):
            sample = int((taken > self.lengths).nonzero()[0])
            raise ValueError(
                f"sample {sample} has {int(taken[sample])} context and candidate tokens "
                f"but only {int(self.lengths[sample])} tokens"
            )
