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
    length: int,
    *,
    num_context: int = 0,
    num_candidates: int = 0,
    segments: Tensor | None = None,
    is_memory: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Visibility of one sample: ``[length, length]`` bool, row i may read column j.

    Args:
        mask: the options; its per-batch tensors are not read here.
        length: tokens of the sample.
        num_context: context tokens of the sample.
        num_candidates: candidate tokens of the sample.
        segments: ``[length]`` or None.
        is_memory: ``[length]`` bool or None.
        device: of the result.
    """
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)[None, :]
    history = length - num_candidates
    memory = torch.zeros(length, dtype=torch.bool, device=device) if is_memory is None else is_memory
    reach = memory[None, :] | (j < num_context)

    seen = (j <= i) if mask.causal else torch.ones(length, length, dtype=torch.bool, device=device)
    if mask.context_full:
        seen = seen | (i < num_context)
    if segments is not None:
        seen = seen & ((segments[:, None] == segments[None, :]) | reach)
    group_i, group_j = (i - history) // mask.candidate_group_size, (j - history) // mask.candidate_group_size
    seen = seen & ((j < history) | ((i >= history) & (j <= i) & (group_i == group_j)))
    if mask.max_attn_len is not None:
        position = positions(length, num_candidates, device)
        near = position[:, None] - position[None, :] <= mask.max_attn_len
        seen = seen & (near | reach | memory[:, None])
    return seen
