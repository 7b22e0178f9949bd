"""Softmax attention over a token stream, and who reads whom in it: the options of the one mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hstu.layers.tokens import Tokens
from hstu.ops import Bucket, Mask, attention_buckets, softmax_attention


@dataclass(frozen=True, kw_only=True)
class Visibility:
    """Options of the mask.

    Attributes:
        causal: Whether a token reads only what is before it.
        context_attention: Whether context tokens also read the history.
        max_attn_len: Window of attention, in positions.
        candidate_group_size: Candidates that see each other.
    """

    causal: bool = True
    context_attention: Literal["causal", "full"] = "causal"
    max_attn_len: int | None = None
    candidate_group_size: int = 1

    def mask(self, tokens: Tokens) -> Mask:
        """Return the mask of ``tokens``."""
        return Mask(
            causal=self.causal,
            context_full=self.context_attention == "full",
            candidate_group_size=self.candidate_group_size,
            max_attn_len=self.max_attn_len,
            num_context=tokens.num_context,
            num_candidates=tokens.num_candidates,
        )

    def buckets(self, tokens: Tokens) -> list[Bucket]:
        """Lay out the attention of ``tokens``, once for all layers."""
        return attention_buckets(tokens.offsets, self.mask(tokens))


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From q [t, H, d], k [t, G, d] and v [t, G, d_v] to [t, H, d_v]."""


def softmax_attention_over(visibility: Visibility, tokens: Tokens) -> Attention:
    """Return the softmax attention of ``tokens``, laid out once for all layers."""
    buckets = visibility.buckets(tokens)
    return lambda q, k, v: softmax_attention(q, k, v, buckets)
