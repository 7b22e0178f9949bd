"""What a fused HSTU layer is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Weights of a layer, in the layout of ``torch.nn.Linear`` and ``torch.nn.LayerNorm``.

    Attributes:
        uvqk: ``[2 H (d_v + d_qk), D]``, rows in the order u, v, q, k.
        output: ``[D, G]``, G = H d_v, or three times that with the concatenated gate.
        uvqk_bias: ``[2 H (d_v + d_qk)]`` or None.
        output_bias: ``[D]`` or None.
        norm_weight: ``[D]`` or None; so are ``norm_bias``.
        norm_bias: see ``norm_weight``.
        gate_norm_weight: ``[H d_v]`` or None; so are ``gate_norm_bias``.
        gate_norm_bias: see ``gate_norm_weight``.
    """

    uvqk: Tensor
    output: Tensor
    uvqk_bias: Tensor | None = None
    output_bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    gate_norm_weight: Tensor | None = None
    gate_norm_bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them, in a fixed order."""
        return (
            self.norm_weight,
            self.norm_bias,
            self.uvqk,
            self.uvqk_bias,
            self.gate_norm_weight,
            self.gate_norm_bias,
            self.output,
            self.output_bias,
        )


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Shape, form and memory of a layer.

    Attributes:
        num_heads: H.
        qk_width: d_qk.
        v_width: d_v.
        silu_on: SiLU on u, v, q and k, or on u alone.
        gate: ``"mul"``: u * norm(o); ``"concat"``: [u, o, u * norm(o)].
        eps: of both norms.
        dropout: probability, on the gated output; 0 when not training.
        recompute_norm: keep x instead of norm(x) for the backward.
        recompute_silu: keep only what the SiLU read.
        recompute_gate: keep u and o instead of the gated output.
    """

    num_heads: int
    qk_width: int
    v_width: int
    silu_on: Literal["uvqk", "u"] = "uvqk"
    gate: Literal["mul", "concat"] = "mul"
    eps: float = 1e-5
    dropout: float = 0.0
    recompute_norm: bool = True
    recompute_silu: bool = True
    recompute_gate: bool = True

    def __post_init__(self) -> None:
        if self.silu_on not in ("uvqk", "u"):
            raise ValueError(f"silu_on is {self.silu_on!r}: choose 'uvqk' or 'u'")
        if self.gate not in ("mul", "concat"):
            raise ValueError(f"gate is {self.gate!r}: choose 'mul' or 'concat'")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}: give a probability of at least 0 and below 1")

    @property
    def splits(self) -> tuple[int, int, int, int]:
        """Widths of u, v, q and k."""
        v, qk = self.num_heads * self.v_width, self.num_heads * self.qk_width
        return v, v, qk, qk

    @property
    def silu_columns(self) -> int:
        """How many leading columns of [u | v | q | k] go through SiLU."""
        return sum(self.splits) if self.silu_on == "uvqk" else self.splits[0]

    @property
    def gated_width(self) -> int:
        """G."""
        return self.splits[0] * (3 if self.gate == "concat" else 1)
