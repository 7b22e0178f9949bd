"""The fused layer's kernels against the plain layer in float64: output and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import hstu.ops.attention.triton.launch as attention
import hstu.ops.layer.triton as layer
from hstu.ops.attention.triton.config import TileConfig
from tests.ops.layer_cases import KEEP, LAYERS, LayerCase, build, check, results


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "tile_config", lambda *_, **__: TileConfig(16, 16, 4, 1))
    monkeypatch.setattr(layer, "PROGRAMS", 7)


def short(case: LayerCase, longest: int) -> LayerCase:
    return replace(case, lengths=tuple(min(n, longest) for n in case.lengths))


@pytest.mark.parametrize("name", ["production", pytest.param("kept_concat_u", marks=pytest.mark.slow), "empty"])
def test_output_and_gradients(name: str) -> None:
    check(short(LAYERS[name], 9), torch.float32)


@pytest.mark.parametrize(
    "stream", [pytest.param((), id="float32 stream", marks=pytest.mark.slow), pytest.param(("x",), id="float16 stream")]
)
def test_low_precision_products_beside_float32_norms(stream: tuple[str, ...]) -> None:
    tensors, options, arguments = build(short(LAYERS["production"], 9), torch.float32)
    products = ("uvqk", "uvqk_bias", "output", "output_bias", *stream)
    narrow = {name: x.half() if name in products else x for name, x in tensors.items()}
    exact = results({name: x.float() for name, x in narrow.items()}, options, arguments, "reference", torch.float64)
    plain, ours = (results(narrow, options, arguments, backend, None) for backend in ("reference", "triton"))
    for key, truth in exact.items():
        error, allowed = ((x[key].double() - truth).abs().max() for x in (ours, plain))
        unit = 2**-11 * truth.abs().max() if stream else 0.0  # one rounding of the output's gradient
        assert ours[key].dtype == plain[key].dtype and error <= 3 * allowed + unit, key


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_all_layers(name: str, dtype: torch.dtype) -> None:
    check(short(LAYERS[name], 18), dtype)


@pytest.mark.parametrize("name", [pytest.param("production", marks=pytest.mark.slow), "concat"])
def test_dropout_is_drawn_again_in_the_backward(name: str) -> None:
    """Keeping or computing again gives one result; the gradient is that of the output."""
    tensors, options, arguments = build(short(replace(LAYERS[name], relative_bias=False), 5), torch.float32)
    options = replace(options, dropout=0.4)

    def run(changes: dict[str, Any], step: float = 0.0) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        moved = tensors | {"output": tensors["output"] * (1.0 + step)}
        return results(moved, replace(options, **changes), arguments, "triton", torch.float32)

    again, kept = run({}), run(KEEP)
    for key in again:
        torch.testing.assert_close(again[key], kept[key], rtol=1e-5, atol=1e-5)
    # The output is linear in W_o, so that its directional derivative along W_o is the product with d_output.
    weights = torch.randn(again["out"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    change = ((run({}, 1.0)["out"] - again["out"]).double() * weights).sum()
    torch.testing.assert_close((again["d_output"] * tensors["output"]).sum().double(), change, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_gate_drops_the_share_asked_for() -> None:
    options = replace(build(LAYERS["concat"], torch.float32)[1], dropout=0.25)
    rows = torch.ones(60, 14)
    spread = torch.arange(14.0).repeat(60, 1)
    gated, _ = layer.TritonKernels().gate(rows, spread + 1, (None, None), options, seed=torch.tensor([3]))
    dropped = gated == 0
    assert abs(dropped.float().mean().item() - 0.25) < 0.04
    assert torch.allclose(gated[:, :14][~dropped[:, :14]], torch.tensor(4 / 3))
    assert not torch.equal(dropped[:, :14], dropped[:, 14:28]) and not torch.equal(dropped[0], dropped[1])
