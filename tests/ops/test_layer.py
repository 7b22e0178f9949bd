"""The fused layer on the CPU against the plain layer in float64: output and every gradient."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from hstu.ops import Layout
from hstu.ops.layer import LayerOptions, LayerWeights, hstu_layer
from tests.ops.layer_cases import KEEP, LAYERS, build, results


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients(name: str) -> None:
    tensors, options, arguments = build(LAYERS[name], torch.float64)
    expected = results(tensors, options, arguments, "reference", torch.float64)
    ours = results(tensors, options, arguments, "cpu", torch.float64)
    for key in expected:
        torch.testing.assert_close(ours[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")


def as_bfloat16(tensors: dict[str, torch.Tensor], narrow: bool, *more: str) -> dict[str, torch.Tensor]:
    """Products, and ``more``, with values that bfloat16 holds: in it, or exactly."""
    products = {"uvqk", "uvqk_bias", "output", "output_bias", *more}
    rounded = {name: x.bfloat16() if name in products else x for name, x in tensors.items()}
    return rounded if narrow else {name: x.float() for name, x in rounded.items()}


@pytest.mark.parametrize("stream", [(), ("x",)], ids=["float32 stream", "bfloat16 stream"])
@pytest.mark.parametrize("name", ["production", "research", "kept_concat_u"])
def test_low_precision_products_beside_float32_norms(name: str, stream: tuple[str, ...]) -> None:
    """The norms and the tables stay in float32; the error is that of rounding in the plain layer."""
    tensors, options, arguments = build(LAYERS[name], torch.float32)
    exact = results(as_bfloat16(tensors, False, *stream), options, arguments, "reference", torch.float64)
    narrow = as_bfloat16(tensors, True, *stream)
    plain, ours = (results(narrow, options, arguments, backend, None) for backend in ("reference", "cpu"))
    for key, truth in exact.items():
        error, allowed = ((x[key].double() - truth).abs().max() for x in (ours, plain))
        unit = 2**-8 * truth.abs().max() if stream else 0.0  # one rounding of the output's gradient
        assert ours[key].dtype == plain[key].dtype and error <= 2 * allowed + unit, key


@pytest.mark.parametrize("gate", ["mul", "concat"])
def test_dropout_is_drawn_again_in_the_backward(gate: str) -> None:
    """Keeping or computing again gives one result bit for bit, and about the right share is dropped."""
    tensors, options, arguments = build(LAYERS["production" if gate == "mul" else "concat"], torch.float64)
    options = replace(options, dropout=0.4)
    outputs = []
    for changes in ({}, KEEP):
        torch.manual_seed(7)
        outputs.append(results(tensors, replace(options, **changes), arguments, "cpu", torch.float64))
    for key in outputs[0]:
        assert torch.equal(outputs[0][key], outputs[1][key]), key
    plain = results(tensors, replace(options, dropout=0.0), arguments, "cpu", torch.float64)
    assert not torch.equal(plain["out"], outputs[0]["out"])


def test_gradients_with_dropout_are_those_of_the_output() -> None:
    """A directional derivative, the seed held fixed."""
    tensors, options, arguments = build(LAYERS["production"], torch.float64)
    options = replace(options, dropout=0.3)
    direction = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def out(step: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        moved = tensors | {"x": tensors["x"] + step * direction}
        return results(moved, options, arguments, "cpu", torch.float64)

    weights = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numeric = ((out(1e-6)["out"] - out(-1e-6)["out"]) * weights).sum() / 2e-6
    torch.testing.assert_close((out(0.0)["d_x"] * direction).sum(), numeric, rtol=1e-6, atol=1e-8)


def test_recomputing_keeps_less() -> None:
    tensors, options, arguments = build(LAYERS["silu_on_u"], torch.float32)
    sizes = []
    for changes in (KEEP, {}):
        saved: list[int] = []

        def count(x: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            results(tensors, replace(options, **changes), arguments, "cpu", torch.float32)
        sizes.append(sum(saved))
    tokens = tensors["x"].shape[0]
    assert sizes[0] - sizes[1] == tokens * (12 + sum(options.splits) + options.gated_width)


def test_wrong_weights_and_options() -> None:
    tensors, options, arguments = build(LAYERS["production"], torch.float32)
    x, layout = tensors["x"], arguments["layout"]
    right = dict(uvqk=tensors["uvqk"], output=tensors["output"])
    with pytest.raises(ValueError, match="weights.output must be"):
        hstu_layer(x, layout, LayerWeights(**right | {"output": x}), options, scaling_seqlen=1.0)
    with pytest.raises(ValueError, match="choose one of"):
        hstu_layer(x, layout, LayerWeights(**right), options, scaling_seqlen=1.0, backend="fast")
    with pytest.raises(ValueError, match="scaling_seqlen is 0"):
        hstu_layer(x, layout, LayerWeights(**right), options, scaling_seqlen=0)
    with pytest.raises(ValueError, match="q has 39 tokens, offsets of its layout end at 38"):
        hstu_layer(x, Layout(torch.tensor([0, 38])), LayerWeights(**right), options, scaling_seqlen=1.0)
    with pytest.raises(ValueError, match="choose 'mul' or 'concat'"):
        LayerOptions(num_heads=1, qk_width=1, v_width=1, gate="add")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="below 1"):
        LayerOptions(num_heads=1, qk_width=1, v_width=1, dropout=1.0)


@pytest.mark.parametrize(
    ("dtype", "names"), [(torch.float32, {"cpu runs", "cpu buckets"}), (torch.float64, {"cpu", "cpu times"})]
)
def test_layers_of_a_batch_plan_once(dtype: torch.dtype, names: set[str]) -> None:
    """What follows from the batch alone is kept on the layout, which nothing kept refers to: no cycle."""
    tensors, options, arguments = build(LAYERS["candidates"], dtype)
    layout = arguments["layout"]
    results(tensors, options, arguments, "cpu", dtype)
    kept = {key: value for key, value in layout._kept.items() if isinstance(key, tuple) and "cpu" in key[0]}
    assert {key[0] for key in kept} == names
    results(tensors, options, arguments, "cpu", dtype)
    for key, value in layout._kept.items():
        assert key not in kept or kept[key] is value
    gone = weakref.ref(layout)
    gc.disable()
    try:
        del layout, arguments, kept, key, value
        assert gone() is None
    finally:
        gc.enable()
