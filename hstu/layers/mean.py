"""The mean of what a token may attend to: a backbone to compare others with."""

from __future__ import annotations

from torch import Tensor, nn

from hstu.layers.tokens import Tokens
from hstu.ops import Mask, softmax_attention

_WIDEST = 256  # head that attention takes


class MeanStack(nn.Module):
    """Softmax attention whose scores are all equal, then a layer norm: the backbone.

    A row is the mean of the tokens that ``mask`` shows it, itself among them: under a causal mask of the sequence so
    far, with ``max_attn_len`` of its end; of a candidate, the mean of the history and itself.

    Args:
        hidden_size: D.
        mask: Who attends to whom.
        norm_eps: Epsilon of the norm.
    """

    def __init__(self, hidden_size: int, mask: Mask, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, norm_eps)
        self.mask = mask
        heads = range(-(-hidden_size // _WIDEST), hidden_size + 1)
        self.num_heads = next(number for number in heads if hidden_size % number == 0)

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [T, D] to hidden states [T, D]."""
        values = tokens.values.unflatten(-1, (self.num_heads, -1))
        equal = values.new_zeros(values.shape[0], self.num_heads, 1)
        out: Tensor = self.norm(softmax_attention(equal, equal, values, tokens.layout, self.mask).flatten(1))
        return out
