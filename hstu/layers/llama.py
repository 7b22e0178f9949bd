"""LLaMA as a user model: RMSNorm, rotary positions, SwiGLU, grouped queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.cache import Cache, run_behind
from hstu.layers.dropout import Dropout
from hstu.layers.positions import token_positions
from hstu.layers.recompute import through
from hstu.layers.tensor_plan import Columns, PerToken, Rows, TensorPlan, split_parts
from hstu.layers.tokens import Tokens
from hstu.ops import Mask, softmax_attention

ROPE_THETA = 1e4


@dataclass(frozen=True, kw_only=True)
class LLaMAConfig:
    """Shape of a LLaMA.

    Attributes:
        hidden_size: D.
        num_heads: H, of queries.
        num_groups: Of keys and values; divides H.
        head_channels: Width of a head, even.
        ffn_size: Inner width of the feed-forward layers.
        mask: Who attends to whom.
        dropout: On what a sublayer adds.
        norm_eps: Epsilon of the norms.
    """

    hidden_size: int
    num_heads: int
    num_groups: int
    head_channels: int
    ffn_size: int
    mask: Mask = Mask()
    dropout: float = 0.0
    norm_eps: float = 1e-5


def rotation(positions: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of ``p * theta^(-2i / d)``, each [T, 1, d / 2] float32 (https://arxiv.org/abs/2104.09864)."""
    frequency = ROPE_THETA ** (-torch.arange(0, channels, 2, device=positions.device, dtype=torch.float64) / channels)
    angle = positions[:, None, None].double() * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair of neighbouring channels of ``x`` [T, H, d] by its angle."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (https://arxiv.org/abs/1910.07467), its weight in the precision of the stream."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [.., D]."""
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LLaMALayer(nn.Module):
    """One layer of LLaMA (https://arxiv.org/abs/2302.13971).

    Its paper says nothing of initialisation: ``wo`` and ``w2``, which write to the residual stream, start
    1 / sqrt(2 L) smaller, as in GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
    section 2.3).
    """

    def __init__(self, config: LLaMAConfig, num_layers: int) -> None:
        super().__init__()
        self.config = config
        #: ``parallelize`` may exchange it for one that spans ranks.
        self.attention: Callable[..., Tensor] = softmax_attention
        hidden, channels = config.hidden_size, config.head_channels
        self.splits = [config.num_heads * channels, config.num_groups * channels, config.num_groups * channels]
        self.qkv = nn.Linear(hidden, sum(self.splits), bias=False)
        self.wo = nn.Linear(self.splits[0], hidden, bias=False)
        self.w1 = nn.Linear(hidden, config.ffn_size, bias=False)
        self.w2 = nn.Linear(config.ffn_size, hidden, bias=False)
        self.w3 = nn.Linear(hidden, config.ffn_size, bias=False)
        self.wo.init_scale = self.w2.init_scale = 1 / math.sqrt(2 * num_layers)  # type: ignore[assignment]
        self.attention_norm = RMSNorm(hidden, config.norm_eps)
        self.ffn_norm = RMSNorm(hidden, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, tokens: Tokens, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Map [T, D] to [T, D]; ``rotary`` is the rotation of each token's position."""
        projected = split_parts(self.qkv(self.attention_norm(x)), self.splits)
        q, k, v = (part.unflatten(-1, (-1, self.config.head_channels)) for part in projected)
        k, v, keys = tokens.behind(rotate(k, rotary), v)
        attended = self.attention(rotate(q, rotary), k, v, tokens.layout, self.config.mask, **keys)
        x = x + self.dropout(self.wo(attended.flatten(-2)))
        normed = self.ffn_norm(x)
        return x + self.dropout(self.w2(F.silu(self.w1(normed)) * self.w3(normed)))

    def tensor_plan(self) -> TensorPlan:
        """Spread the heads and the feed-forward channels."""
        ffn = (self.config.ffn_size,)
        return {
            "qkv": Columns(tuple(self.splits)),
            "wo": Rows((self.splits[0],)),
            "w1": Columns(ffn),
            "w3": Columns(ffn),
            "w2": Rows(ffn),
            "dropout": PerToken(),
            "attention_norm": PerToken(),
            "ffn_norm": PerToken(),
        }


class LLaMAStack(nn.Module):
    """A stack of LLaMA layers and a norm: the backbone. All candidates of a sample stand at one position.

    Args:
        config: Of each layer.
        num_layers: L.
    """

    def __init__(self, config: LLaMAConfig, num_layers: int) -> None:
        super().__init__()
        #: Whether the backward pass computes each layer again; whoever builds the model sets it.
        self.recompute = False
        self.config = config
        self.layers = nn.ModuleList([LLaMALayer(config, num_layers) for _ in range(num_layers)])
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def tensor_plan(self) -> TensorPlan:
        """What is not in the layers."""
        return {"final_norm": PerToken()}

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [T, D] to hidden states [T, D]."""
        rotary = rotation(token_positions(tokens), self.config.head_channels)
        out: Tensor = self.final_norm(through(self.layers, tokens.values, tokens, rotary, recompute=self.recompute))
        return out

    def extend(self, cache: Cache | None, new_tokens: Tokens) -> tuple[Tensor, Cache]:
        """Map what follows ``cache`` to hidden states; see :func:`hstu.layers.cache.run_behind`."""
        return run_behind(self, cache, new_tokens, self.config.mask)
