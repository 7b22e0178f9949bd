"""Transformers with softmax attention: SASRec (causal) and the bidirectional encoder of BERT4Rec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.cache import Cache, run_behind
from hstu.layers.dropout import Dropout
from hstu.layers.recompute import through
from hstu.layers.tensor_plan import Columns, PerToken, Rows, TensorPlan
from hstu.layers.tokens import Tokens
from hstu.ops import Mask, softmax_attention


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
        mask: Who attends to whom.
        dropout: On what a sublayer adds.
        norm_eps: Epsilon of the norms.
    """

    hidden_size: int
    num_heads: int
    head_channels: int
    ffn_size: int
    activation: Literal["relu", "gelu"] = "relu"
    norm: Literal["pre", "post"] = "pre"
    mask: Mask = Mask()
    dropout: float = 0.0
    norm_eps: float = 1e-5


class TransformerLayer(nn.Module):
    """Attention, then two feed-forward layers: "Self-Attentive Sequential Recommendation" (Kang & McAuley 2018).

    https://arxiv.org/abs/1808.09781, section III, with an output product for more than one head.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        #: ``parallelize`` may exchange it for one that spans ranks.
        self.attention: Callable[..., Tensor] = softmax_attention
        inner = config.num_heads * config.head_channels
        self.qkv = nn.Linear(config.hidden_size, 3 * inner)
        self.output = nn.Linear(inner, config.hidden_size)
        self.expand = nn.Linear(config.hidden_size, config.ffn_size)
        self.contract = nn.Linear(config.ffn_size, config.hidden_size)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Map [T, D] to [T, D]; ``tokens`` gives the sequences, not the values."""
        if self.config.norm == "pre":
            x = x + self.dropout(self._attend(self.attention_norm(x), tokens))
            return x + self.dropout(self._feed_forward(self.ffn_norm(x)))
        x = self.attention_norm(x + self.dropout(self._attend(x, tokens)))
        out: Tensor = self.ffn_norm(x + self.dropout(self._feed_forward(x)))
        return out

    def tensor_plan(self) -> TensorPlan:
        """Spread the heads and the feed-forward channels."""
        inner, ffn = self.output.in_features, self.config.ffn_size
        return {
            "qkv": Columns((inner,) * 3),
            "output": Rows((inner,)),
            "expand": Columns((ffn,)),
            "contract": Rows((ffn,)),
            "dropout": PerToken(),
            "attention_norm": PerToken(),
            "ffn_norm": PerToken(),
        }

    def _attend(self, x: Tensor, tokens: Tokens) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.config.head_channels)).unbind(1)
        k, v, keys = tokens.behind(k, v)
        out: Tensor = self.output(self.attention(q, k, v, tokens.layout, self.config.mask, **keys).flatten(-2))
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)
        out: Tensor = self.contract(F.relu(inner) if self.config.activation == "relu" else F.gelu(inner))
        return out


class TransformerStack(nn.Module):
    """A stack of transformer layers: the backbone.

    Args:
        config: Of each layer.
        num_layers: L.
    """

    def __init__(self, config: TransformerConfig, num_layers: int) -> None:
        super().__init__()
        #: Whether the backward pass computes each layer again; whoever builds the model sets it.
        self.recompute = False
        self.config = config
        self.layers = nn.ModuleList([TransformerLayer(config) for _ in range(num_layers)])
        self.final_norm = nn.LayerNorm(config.hidden_size, config.norm_eps) if config.norm == "pre" else nn.Identity()

    def tensor_plan(self) -> TensorPlan:
        """What is not in the layers."""
        return {"final_norm": PerToken()}

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [T, D] to hidden states [T, D]."""
        out: Tensor = self.final_norm(through(self.layers, tokens.values, tokens, recompute=self.recompute))
        return out

    def extend(self, cache: Cache | None, new_tokens: Tokens) -> tuple[Tensor, Cache]:
        """Map what follows ``cache`` to hidden states; see :func:`hstu.layers.cache.run_behind`."""
        return run_behind(self, cache, new_tokens, self.config.mask)
