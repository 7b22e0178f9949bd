"""The one mask of every model: which token may attend to which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Context = Literal["causal", "full"]
Span = tuple[int | Tensor, int | Tensor]  # first and last of some consecutive places, or segment numbers


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The rules; what the tokens are says :class:`hstu.ops.Layout`. A rule is written here and in the GPU's tiles.

    Token i attends to token j of its sequence when

    * ``j <= i`` (always, if not ``causal``; context tokens too, if ``context = "full"``), and
    * j is memory or context, or in i's segment, and
    * j is no candidate, or i is the same candidate or a later one of its group, and
    * ``p_i - p_j <= max_attn_len``, or j is context or memory, or i is memory; ``p_i`` is the place in the
      sequence, for all candidates the one after the last token before them.

    Attributes:
        causal: a token attends only to tokens at or before it.
        context: ``"full"``: context tokens also attend to what comes after them (candidates excepted).
        max_attn_len: the largest distance, in positions, to a history token; None for no limit.
        candidate_group_size: a candidate also attends to earlier candidates of its group of this size.

    Raises:
        ValueError: a value out of its range.
    """

    causal: bool = True
    context: Context = "causal"
    max_attn_len: int | None = None
    candidate_group_size: int = 1

    def __post_init__(self) -> None:
        if self.context not in get_args(Context):
            raise ValueError(f"context is {self.context!r}: choose 'causal' or 'full'")
        if self.candidate_group_size < 1:
            raise ValueError(f"candidate_group_size is {self.candidate_group_size}: it must be at least 1")
        if self.max_attn_len is not None and self.max_attn_len < 0:
            raise ValueError(f"max_attn_len is {self.max_attn_len}: give a distance >= 0, or None for no limit")

    def visible(
        self,
        i: Tensor,
        j: Tensor,
        *,
        context: int | Tensor,
        history: int | Tensor,
        segments: tuple[Tensor, Tensor] | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Whether row i attends to column j, a bool tensor; all arguments broadcast against each other.

        Args:
            i: places of the rows in their sample, ``[.., R, 1]``.
            j: places of the columns, ``[.., 1, C]``.
            context: context tokens of the sample.
            history: place of the first candidate: length minus number of candidates.
            segments: segment numbers of the rows and of the columns, or None.
            memory: memory flags of the rows and of the columns, or None.
        """
        seen = (j <= i) if self.causal else torch.ones_like(j <= i)
        if self.context == "full":
            seen = seen | (i < context)
        always = (j < context) if memory is None else (j < context) | memory[1]
        if segments is not None:
            seen = seen & ((segments[0] == segments[1]) | always)
        size = self.candidate_group_size
        same_group = (i >= history) & (j <= i) & ((i - history) // size == (j - history) // size)
        seen = seen & ((j < history) | same_group)
        if self.max_attn_len is not None:
            near = (positions(i, history) - positions(j, history) <= self.max_attn_len) | always
            seen = seen & (near if memory is None else near | memory[0])
        return seen

    def reachable(
        self,
        rows: Span,
        columns: Span,
        *,
        context: int | Tensor,
        history: int | Tensor,
        segments: tuple[Span, Span] | None = None,
        has_memory: bool | Tensor = False,
    ) -> Tensor:
        """Whether any row of a span may attend to any column of another: False only where none does.

        All arguments broadcast against each other.

        Args:
            rows: first and last place of the rows.
            columns: of the columns.
            context: context tokens of the sample.
            history: place of the first candidate.
            segments: least and greatest segment number of the rows and of the columns, or None where not known.
            has_memory: whether any of these tokens may be memory.
        """
        (r0, r1), (c0, c1) = (tuple(torch.as_tensor(x) for x in span) for span in (rows, columns))
        context, history = torch.as_tensor(context), torch.as_tensor(history)
        reach = (c0 <= r1) if self.causal else torch.ones_like(c0 <= r1)
        if self.context == "full":
            reach = reach | (r0 < context)
        always = (c0 < context) | has_memory
        if segments is not None:
            (low, high), (c_low, c_high) = segments
            reach = reach & ((torch.as_tensor(low <= c_high) & (c_low <= high)) | always)
        size = self.candidate_group_size
        group = history + (torch.maximum(r0, history) - history) // size * size
        reach = reach & ((c0 < history) | ((r1 >= history) & (c0 <= r1) & (c1 >= group)))
        if self.max_attn_len is not None:
            reach = reach & ((positions(r0, history) - positions(c1, history) <= self.max_attn_len) | always)
        return reach

    def count(self, i: Tensor, *, context: Tensor, history: Tensor) -> Tensor:
        """Number of columns that rows i attend to, where there are no segments and no memory, int64."""
        before = torch.zeros_like(i)
        if self.max_attn_len is not None:
            # Of the columns before the window only the context is seen.
            before = (positions(i, history) - self.max_attn_len).clamp(min=0)
            before = before - torch.minimum(before, context)
        ahead = torch.full_like(i, not self.causal, dtype=torch.bool)
        if self.context == "full":
            ahead |= i < context
        of_history = torch.where(ahead, history, i + 1) - before
        of_candidate = history - before + (i - history) % self.candidate_group_size + 1
        return torch.where(i < history, of_history, of_candidate)


def positions(place: Tensor, history: int | Tensor) -> Tensor:
    """Position ``p_i = min(i, history)``: all candidates of a sample stand at one, that of the first."""
    return torch.minimum(place, torch.as_tensor(history, device=place.device))
