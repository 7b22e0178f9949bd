"""Transformer blocks with softmax attention: SASRec (causal) and the bidirectional encoder of BERT4Rec."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.dropout import Dropout
from hstu.layers.tokens import Tokens
from hstu.layers.visibility import Attention, Visibility, softmax_attention_over


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of a transformer.

    Attributes:
        hidden_size: D.
        num_heads: H.
        head_channels: Width of a head.
        ffn_size: Inner width of the feed-forward layers.
        activation: Of the feed-forward layers.
        norm: ``"pre"``: x + f(norm(x)), and a norm at the end. ``"post"``: norm(x + f(x)).
        visibility: Who reads whom.
        dropout: On what a sublayer adds.
        norm_eps: Epsilon of the norms.
    """

    hidden_size: int
    num_heads: int
    head_channels: int
    ffn_size: int
    activation: Literal["relu", "gelu"] = "relu"
    norm: Literal["pre", "post"] = "pre"
    visibility: Visibility = field(default_factory=Visibility)
    dropout: float = 0.0
    norm_eps: float = 1e-5


class TransformerLayer(nn.Module):
    """Attention, then two feed-forward layers: "Self-Attentive Sequential Recommendation" (Kang & McAuley 2018).

    https://arxiv.org/abs/1808.09781, section III, with an output product for more than one head.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.num_heads * config.head_channels
        self.qkv = nn.Linear(config.hidden_size, 3 * inner)
        self.output = nn.Linear(inner, config.hidden_size)
        self.expand = nn.Linear(config.hidden_size, config.ffn_size)
        self.contract = nn.Linear(config.ffn_size, config.hidden_size)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """Map [T, D] to [T, D]."""
        if self.config.norm == "pre":
            x = x + self.dropout(self._attend(self.attention_norm(x), attention))
            return x + self.dropout(self._feed_forward(self.ffn_norm(x)))
        x = self.attention_norm(x + self.dropout(self._attend(x, attention)))
        out: Tensor = self.ffn_norm(x + self.dropout(self._feed_forward(x)))
        return out

    def _attend(self, x: Tensor, attention: Attention) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.config.head_channels)).unbind(1)
        out: Tensor = self.output(attention(q, k, v).flatten(-2))
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)
        out: Tensor = self.contract(F.relu(inner) if self.config.activation == "relu" else F.gelu(inner))
        return out


class TransformerBlock(nn.Module):
    """A stack of transformer layers: the backbone."""

    def __init__(self, config: TransformerConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        #: Makes the attention of a stream; ``parallelize`` may exchange it for one that spans ranks.
        self.attention_over = softmax_attention_over
        self.layers = nn.ModuleList([TransformerLayer(config) for _ in range(num_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, config.norm_eps) if config.norm == "pre" else nn.Identity()

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [T, D] to hidden states [T, D]."""
        x, attention = tokens.values, self.attention_over(self.config.visibility, tokens)
        for layer in self.layers:
            x = layer(x, attention)
        out: Tensor = self.final_norm(x)
        return out
