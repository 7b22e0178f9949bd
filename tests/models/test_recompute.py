"""Layers computed again in the backward pass: the same loss and gradients, and less that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.config import ConfigError
from hstu.data import SequenceDataset
from hstu.layers.hstu import HSTULayer
from hstu.training.plan import activation_bytes
from tests.models.test_models import batch_of, build
from tests.samples import make_config, make_dataset

BACKBONES: dict[str, tuple[str, ...]] = {
    "hstu": ("NetworkArgs.preset='research'",),
    "sasrec": ("NetworkArgs.backbone='sasrec'",),
    "bert": ("NetworkArgs.backbone='bert'",),
    "llama": ("NetworkArgs.backbone='llama'", "NetworkArgs.kv_channels=4"),
}
CHOICES = [*((name, "full") for name in BACKBONES), ("hstu", "selective")]
LAYERS = 3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", [6 + i % 5 for i in range(8)])


def results(dataset: SequenceDataset, recompute: str, *lines: str) -> tuple[dict[str, Tensor], int, list[int]]:
    """Return loss and gradients, the bytes kept, and how often each layer ran."""
    config = make_config("retrieval", f"NetworkArgs.num_layers={LAYERS}", "NetworkArgs.hidden_dropout=0.4", *lines,
                         f"NetworkArgs.recompute='{recompute}'")  # fmt: skip
    torch.manual_seed(0)
    model: Any = build(dataset, config).train()
    batch, runs = batch_of(dataset, config), [0] * LAYERS
    for number, layer in enumerate(model.backbone.layers):
        layer.register_forward_pre_hook(lambda *_, at=number: runs.__setitem__(at, runs[at] + 1))
    torch.manual_seed(5)
    loss = model(batch)
    loss.total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    counted = runs[:]
    return {"loss": loss.total.detach()} | found, activation_bytes(model, batch), counted


@pytest.mark.parametrize("backbone, recompute", CHOICES)
def test_the_same_with_dropout(dataset: SequenceDataset, backbone: str, recompute: str) -> None:
    wanted, kept, runs = results(dataset, "none", *BACKBONES[backbone])
    found, less, again = results(dataset, recompute, *BACKBONES[backbone])
    assert runs == [1] * LAYERS and again == [2 if recompute == "full" else 1] * LAYERS
    assert less < kept and len(wanted) > 10 and wanted.keys() == found.keys()
    if recompute == "full":
        assert all(torch.equal(found[name], x) for name, x in wanted.items())
    else:  # the fused layer draws other dropout
        assert torch.isfinite(found["loss"])


def test_one_operation_as_on_a_gpu_can_be_computed_again(
    dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HSTULayer, "_is_fused", lambda *_: True)
    (wanted, kept, _), (found, less, _) = results(dataset, "none"), results(dataset, "full")
    assert less < kept and all(torch.equal(found[name], x) for name, x in wanted.items())


def test_selective_is_the_fused_layer_of_the_three_switches(dataset: SequenceDataset) -> None:
    switches = [f"NetworkArgs.recompute_{name}=True" for name in ("input_layernorm", "input_silu", "gate")]
    (one, *_), (two, *_) = results(dataset, "selective"), results(dataset, "none", *switches)
    assert all(torch.equal(one[name], two[name]) for name in one)
    without = ("NetworkArgs.hidden_dropout=0.0",)
    (fused, *_), (plain, *_) = results(dataset, "selective", *without), results(dataset, "none", *without)
    assert all(torch.allclose(fused[name], plain[name], rtol=1e-4, atol=1e-6) for name in plain)


@pytest.mark.parametrize("bindings, said", [
    (("NetworkArgs.backbone='gru'", "NetworkArgs.recompute='full'"), "belongs to layers of attention"),
    (("NetworkArgs.backbone='llama'", "NetworkArgs.kv_channels=4", "NetworkArgs.recompute='selective'"), "use 'full'"),
    (("NetworkArgs.kernel_backend='pytorch'", "NetworkArgs.recompute='selective'"), "needs the fused layer"),
])  # fmt: skip
def test_what_has_no_use_for_it_is_refused(bindings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"NetworkArgs.recompute = '\w+': {said}|NetworkArgs.recompute.*{said}"):
        make_config("retrieval", *bindings)


def test_what_is_kept_does_not_grow_with_layers(dataset: SequenceDataset, tmp_path: Path) -> None:
    """But for the input of each, [tokens, 8] float32."""
    sizes = {}
    for layers in (2, 6):
        config = make_config("retrieval", f"NetworkArgs.num_layers={layers}", "NetworkArgs.recompute='full'")
        model, batch = build(dataset, config), batch_of(dataset, config)
        sizes[layers] = activation_bytes(model, batch)
        tokens = model.num_tokens(batch)
    assert sizes[6] - sizes[2] == pytest.approx(4 * tokens * 8 * 4, abs=64)
