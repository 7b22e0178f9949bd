"""Who reads whom in a softmax backbone: the options of the one mask, applied to a token stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hstu.layers.tokens import Tokens
from hstu.ops import Bucket, Mask, attention_buckets


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

    def buckets(self, tokens: Tokens) -> list[Bucket]:
        """Lay out the attention of ``tokens``, once for all layers."""
        mask = Mask(
            causal=self.causal,
            context_full=self.context_attention == "full",
            candidate_group_size=self.candidate_group_size,
            max_attn_len=self.max_attn_len,
            num_context=tokens.num_context,
            num_candidates=tokens.num_candidates,
        )
        return attention_buckets(tokens.offsets, mask)
