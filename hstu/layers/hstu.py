"""The HSTU layer and its stack, both published parametrisations in one class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.cache import Cache, run_behind
from hstu.layers.dropout import Dropout
from hstu.layers.recompute import through
from hstu.layers.tensor_plan import Columns, Heads, OfAllHeads, PerToken, Rows, TensorPlan, split_parts
from hstu.layers.tokens import Tokens
from hstu.ops import LayerOptions, LayerWeights, Mask, RelativeBias, hstu_attention, hstu_layer


@dataclass(frozen=True, kw_only=True)
class HSTUConfig:
    """Shape and parametrisation of HSTU.

    Attributes:
        hidden_size: D.
        num_heads: H.
        qk_channels: Width of a query and key head.
        value_channels: Width of a value head.
        max_tokens: N, a bound on the tokens of one sample: sizes the position bias.
        scaling_seqlen: S, the constant that divides attention; part of the model.
        silu_on: SiLU on all of u, v, q, k or on u alone.
        projection_bias: Whether the u, v, q, k product has a bias.
        alpha: Scale of the scores; None: 1 / sqrt(qk_channels).
        affine_norm: Whether the layer norms have weights.
        gate: ``"mul"``: u * norm(o). ``"concat"``: [u, o, u * norm(o)].
        position_bias: Add a learned bias by distance.
        time_bias_buckets: Buckets of the learned bias by time difference; 0: none.
        bias_query_time: Time of the attending row: its own event's or the next event's.
        mask: Who attends to whom.
        dropout: On the gated attention output.
        norm_eps: Epsilon of the layer norms.
        recompute_norm: Normalise the input again in the backward instead of keeping the result.
        recompute_silu: Likewise SiLU of u, v, q, k.
        recompute_gate: Likewise the gated attention output.
        backend: Of the attention, or of the whole layer where it is fused.
    """

    hidden_size: int
    num_heads: int
    qk_channels: int
    value_channels: int
    max_tokens: int
    scaling_seqlen: float
    silu_on: Literal["uvqk", "u"] = "uvqk"
    projection_bias: bool = True
    alpha: float | None = None
    affine_norm: bool = True
    gate: Literal["mul", "concat"] = "mul"
    position_bias: bool = False
    time_bias_buckets: int = 0
    bias_query_time: Literal["own", "next"] = "own"
    mask: Mask = Mask()
    dropout: float = 0.0
    norm_eps: float = 1e-5
    recompute_norm: bool = False
    recompute_silu: bool = False
    recompute_gate: bool = False
    backend: Literal["auto", "reference", "triton"] = "auto"


class HSTULayer(nn.Module):
    """One layer of "Actions Speak Louder than Words" (https://arxiv.org/abs/2402.17152, section 3).

    ``[u | v | q | k] = silu(norm(x) W + b); o = attention(q, k, v); out = gate(u, norm(o)) W_o + b_o + x``, with
    the attention of :func:`hstu.ops.hstu_attention`.
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        #: ``parallelize`` may exchange it for one that spans ranks.
        self.attention: Callable[..., Tensor] = hstu_attention
        #: Whether one operation does the layer on a CPU as it does on a GPU.
        self.fused = False
        qk, v = config.num_heads * config.qk_channels, config.num_heads * config.value_channels
        self.splits = [v, v, qk, qk]
        self.uvqk = nn.Linear(config.hidden_size, sum(self.splits), bias=config.projection_bias)
        self.output = nn.Linear(v if config.gate == "mul" else 3 * v, config.hidden_size)
        self.input_norm = nn.LayerNorm(config.hidden_size, config.norm_eps, config.affine_norm)
        self.attention_norm = nn.LayerNorm(v, config.norm_eps, config.affine_norm)
        self.dropout = Dropout(config.dropout)
        self.position_table: nn.Parameter | None = None
        self.time_table: nn.Parameter | None = None
        if config.position_bias:
            self.position_table = nn.Parameter(torch.randn(2 * config.max_tokens - 1) * 0.02)
        if config.time_bias_buckets:
            self.time_table = nn.Parameter(torch.randn(config.time_bias_buckets + 1) * 0.02)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Map [T, D] to [T, D]; ``tokens`` gives the sequences, not the values."""
        if tokens.past is None and self._is_fused(x):
            return self._fused(x, tokens)
        projected = self.uvqk(self.input_norm(x))
        if self.config.silu_on == "uvqk":
            projected = F.silu(projected)
        u, v, q, k = split_parts(projected, self.splits)
        if self.config.silu_on == "u":
            u = F.silu(u)
        o = self._attention(q, k, v, tokens)
        gated = u * self.attention_norm(o)
        if self.config.gate == "concat":
            gated = torch.cat([u, o, gated], dim=-1)
        out: Tensor = self.output(self.dropout(gated)) + x
        return out

    def tensor_plan(self) -> TensorPlan:
        """Spread the heads."""
        width = self.splits[0]
        gated = (width,) * (self.output.in_features // width)
        return {
            "uvqk": Columns(tuple(self.splits)),
            "output": Rows(gated),
            "attention_norm": Heads((width,)),
            "dropout": Heads(gated),
            "position_table": OfAllHeads(),
            "time_table": OfAllHeads(),
            "input_norm": PerToken(),
        }

    def _is_fused(self, x: Tensor) -> bool:
        """Whether one operation does the layer: on a GPU, and where the backward is to compute again.

        It needs whole weights and sequences on this rank. On a CPU it keeps less but takes a quarter longer.
        """
        config = self.config
        whole = self.attention is hstu_attention and type(self.uvqk) is nn.Linear
        recomputes = config.recompute_norm or config.recompute_silu or config.recompute_gate
        assert whole or not recomputes
        if torch.compiler.is_exporting():  # plain operations alone
            return False
        return whole and (recomputes or ((x.is_cuda or self.fused) and config.backend != "reference"))

    def _fused(self, x: Tensor, tokens: Tokens) -> Tensor:
        config, device = self.config, x.device.type
        # Under autocast the products are narrow, the stream and the norms are not.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

        def narrow(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.to(dtype)

        weights = LayerWeights(
            uvqk=self.uvqk.weight.to(dtype),
            output=self.output.weight.to(dtype),
            uvqk_bias=narrow(self.uvqk.bias),
            output_bias=narrow(self.output.bias),
            norm_weight=self.input_norm.weight,
            norm_bias=self.input_norm.bias,
            gate_norm_weight=self.attention_norm.weight,
            gate_norm_bias=self.attention_norm.bias,
        )
        options = LayerOptions(
            num_heads=config.num_heads,
            qk_width=config.qk_channels,
            v_width=config.value_channels,
            silu_on=config.silu_on,
            gate=config.gate,
            eps=config.norm_eps,
            dropout=config.dropout if self.training else 0.0,
            recompute_norm=config.recompute_norm,
            recompute_silu=config.recompute_silu,
            recompute_gate=config.recompute_gate,
        )
        with torch.autocast(device, enabled=False):
            return hstu_layer(
                x,
                tokens.layout,
                weights,
                options,
                config.mask,
                scaling_seqlen=config.scaling_seqlen,
                alpha=config.alpha,
                bias=self._bias(),
                backend=config.backend,
            )

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        config = self.config
        k, v, keys = tokens.behind(
            k.unflatten(-1, (-1, config.qk_channels)), v.unflatten(-1, (-1, config.value_channels))
        )
        out = self.attention(
            q.unflatten(-1, (-1, config.qk_channels)),
            k,
            v,
            tokens.layout,
            config.mask,
            scaling_seqlen=config.scaling_seqlen,
            alpha=config.alpha,
            bias=self._bias(keys["keys"].longest if keys else 0),
            backend=config.backend,
            **keys,
        )
        return out.flatten(-2)

    def _bias(self, longest: int = 0) -> RelativeBias:
        """Return the tables; behind a cache candidates may be more than N, all of them at one position within it."""
        table = self.position_table
        if table is not None and longest > self.config.max_tokens:
            table = F.pad(table, [longest - self.config.max_tokens] * 2)  # type: ignore[assignment]
        return RelativeBias(position=table, time=self.time_table, query_time=self.config.bias_query_time)


class HSTUStack(nn.Module):
    """A stack of HSTU layers: the backbone.

    Args:
        config: Of each layer.
        num_layers: L.
    """

    def __init__(self, config: HSTUConfig, num_layers: int) -> None:
        super().__init__()
        #: Whether the backward pass computes each layer again; whoever builds the model sets it.
        self.recompute = False
        self.config = config
        self.layers = nn.ModuleList([HSTULayer(config) for _ in range(num_layers)])

    def tensor_plan(self) -> TensorPlan:
        """What is not in the layers: nothing."""
        return {}

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [T, D] to hidden states [T, D]."""
        return through(self.layers, tokens.values, tokens, recompute=self.recompute)

    def extend(self, cache: Cache | None, new_tokens: Tokens) -> tuple[Tensor, Cache]:
        """Map what follows ``cache`` to hidden states; see :func:`hstu.layers.cache.run_behind`."""
        config = self.config
        return run_behind(self, cache, new_tokens, config.mask, by_place=config.position_bias, asks_next=self.asks_next)

    @property
    def asks_next(self) -> bool:
        """Whether a row depends on the time of the token after it."""
        return self.config.time_bias_buckets > 0 and self.config.bias_query_time == "next"


def hstu_preset(name: Literal["research", "production"]) -> dict:
    """Return the fields of ``HSTUConfig`` that a published parametrisation fixes and ``NetworkArgs`` has no field for.

    ``research``: the code behind the paper's public tables. ``production``: the industrial systems.
    """
    if name == "research":
        return dict(silu_on="uvqk", projection_bias=False, alpha=1.0, affine_norm=False)
    assert name == "production", name
    return dict(silu_on="uvqk", projection_bias=True, alpha=None, affine_norm=True)
