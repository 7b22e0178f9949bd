"""Random layers for the tests of every backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hstu.ops import Layout, RelativeBias, lengths_to_offsets
from hstu.ops.layer import LayerOptions, LayerWeights, hstu_layer
from tests.ops.moved import moved


@dataclass(frozen=True)
class LayerCase:
    lengths: tuple[int, ...] = (5, 0, 1, 33)
    hidden: int = 12
    affine: bool = True
    biased: bool = True
    relative_bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    candidates: tuple[int, ...] | None = None


KEEP = dict(recompute_norm=False, recompute_silu=False, recompute_gate=False)
LAYERS = {
    "production": LayerCase(),
    "research": LayerCase(affine=False, biased=False, options=dict(eps=1e-6), attention=dict(alpha=1.0)),
    "concat": LayerCase(options=dict(gate="concat")),
    "silu_on_u": LayerCase(options=dict(silu_on="u"), relative_bias=False),
    "kept": LayerCase(options=KEEP),
    "kept_concat_u": LayerCase(options=KEEP | dict(gate="concat", silu_on="u")),
    "candidates": LayerCase(candidates=(2, 0, 1, 9)),
    "empty": LayerCase(lengths=(0, 0)),
}


def build(case: LayerCase, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], LayerOptions, dict[str, Any]]:
    """Differentiable tensors by name, options and the attention's arguments."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=rng, dtype=torch.float64) * scale + mean).to(dtype)

    options = LayerOptions(**(dict(num_heads=2, qk_width=5, v_width=7) | case.options))
    total, longest, v = sum(case.lengths), max(case.lengths), options.splits[0]
    tensors = {
        "x": normal(total, case.hidden),
        "uvqk": normal(sum(options.splits), case.hidden, scale=0.3),
        "output": normal(case.hidden, options.gated_width, scale=0.3),
    }
    if case.biased:
        tensors |= {"uvqk_bias": normal(sum(options.splits)), "output_bias": normal(case.hidden)}
    if case.affine:
        tensors |= {
            "norm_weight": normal(case.hidden, mean=1.0, scale=0.1),
            "norm_bias": normal(case.hidden),
            "gate_norm_weight": normal(v, mean=1.0, scale=0.1),
            "gate_norm_bias": normal(v),
        }
    if case.relative_bias:
        tensors |= {"position": normal(2 * longest + 1), "time": normal(20)}
    arguments = dict(
        layout=Layout(
            lengths_to_offsets(torch.tensor(case.lengths)),
            num_candidates=None if case.candidates is None else torch.tensor(case.candidates),
            timestamps=torch.randint(0, 10_000, (total,), generator=rng).cumsum(0),
        ),
        scaling_seqlen=8.0,
    )
    return tensors, options, arguments | case.attention


def results(
    tensors: dict[str, torch.Tensor],
    options: LayerOptions,
    arguments: dict[str, Any],
    backend: str,
    dtype: torch.dtype | None,
) -> dict[str, torch.Tensor]:
    """Output and every gradient, computed in ``dtype``, or in those of the tensors."""
    inputs = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    arguments = dict(arguments)
    own = dict(inputs)
    x = own.pop("x")
    if "time" in own:
        arguments["bias"] = RelativeBias(position=own.pop("position"), time=own.pop("time"))
    out = hstu_layer(x, weights=LayerWeights(**own), options=options, backend=backend, **arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(out)).sum().backward()
    grads = {f"d_{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in inputs.items()}
    return {"out": out.detach()} | grads


def check(case: LayerCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """The error of the kernels is at most three times that of the plain computation, and one rounding.

    In half precision are the stream and the products; the norms and the tables of the bias stay in float32.
    """
    tensors, options, arguments = moved(build(case, torch.float32), device)
    products = ("x", "uvqk", "uvqk_bias", "output", "output_bias")
    narrow = {name: x.to(dtype) if name in products else x for name, x in tensors.items()}
    exact = results({name: x.double() for name, x in narrow.items()}, options, arguments, "reference", None)
    plain, ours = (results(narrow, options, arguments, backend, None) for backend in ("reference", "triton"))
    for key, truth in exact.items():
        assert ours[key].shape == truth.shape and ours[key].dtype == plain[key].dtype
        if truth.numel():
            rounding = max(torch.finfo(dtype).eps / 2, 3e-6)
            allowed = 3 * (plain[key].double() - truth).abs().max() + rounding * truth.abs().max()
            assert (ours[key].double() - truth).abs().max() <= allowed, key
