"""The one mask of every model: which token may read which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Mask:
    """What decides visibility besides the place in the sequence.

    Token j of a sample is context when ``j < num_context``, a candidate when
    ``j >= length - num_candidates``, a memory token when flagged so, else history.

    Attributes:
        causal: a token reads only tokens at or before it.
        context_full: context tokens also read what comes after them (candidates excepted).
        candidate_group_size: a candidate also reads earlier candidates of its group of this size.
        max_attn_len: the largest distance, in positions, to a history token; None for no limit.
        num_context: ``[B]`` int64 or None.
        num_candidates: ``[B]`` int64 or None.
        segments: ``[T]`` int32 or None; a token reads its own segment, context and memory only.
        is_memory: ``[T]`` bool or None.
    """

    causal: bool = True
    context_full: bool = False
    candidate_group_size: int = 1
    max_attn_len: int | None = None
    num_context: Tensor | None = None
    num_candidates: Tensor | None = None
    segments: Tensor | None = None
    is_memory: Tensor | None = None

    def counts(self, num_samples: int) -> tuple[list[int], list[int]]:
        """Context and candidate tokens of each sample, on the host."""
        zeros = [0] * num_samples
        context = zeros if self.num_context is None else self.num_context.tolist()
        candidates = zeros if self.num_candidates is None else self.num_candidates.tolist()
        return context, candidates


def positions(length: int, num_candidates: int, device: torch.device | None = None) -> Tensor:
    """Position ``p_i = min(i, length - num_candidates)``: all candidates stand at one position."""
    return torch.arange(length, device=device).clamp(max=length - num_candidates)


def visible(
    mask: Mask,
    i: Tensor,
    j: Tensor,
    *,
    context: int | Tensor,
    history: int | Tensor,
    segments: tuple[Tensor, Tensor] | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Whether row i may read column j, a bool tensor; all arguments broadcast against each other.

    Args:
        mask: the options; its per-batch tensors are not read here.
        i: places of the rows in their sample, ``[.., R, 1]``.
        j: places of the columns, ``[.., 1, C]``.
        context: context tokens of the sample.
        history: place of the first candidate: length minus number of candidates.
        segments: segment numbers of the rows and of the columns, or None.
        memory: memory flags of the rows and of the columns, or None.
    """
    seen = (j <= i) if mask.causal else torch.ones_like(j <= i)
    if mask.context_full:
        seen = seen | (i < context)
    reach = (j < context) if memory is None else (j < context) | memory[1]
    if segments is not None:
        seen = seen & ((segments[0] == segments[1]) | reach)
    size = mask.candidate_group_size
    same_group = (i >= history) & (j <= i) & ((i - history) // size == (j - history) // size)
    seen = seen & ((j < history) | same_group)
    if mask.max_attn_len is not None:
        position_i, position_j = _at_most(i, history), _at_most(j, history)
        near = (position_i - position_j <= mask.max_attn_len) | reach
        seen = seen & (near if memory is None else near | memory[0])
    return seen


def _at_most(place: Tensor, history: int | Tensor) -> Tensor:
    return torch.minimum(place, torch.as_tensor(history, device=place.device))
