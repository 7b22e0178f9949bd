"""Padding changes nothing: losses and gradients of batches in slots are those of the batches, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hstu.data import SequenceDataset
from hstu.models.padding import dense_inputs, in_slots, slot_size, why_not_padded
from tests.models.padding_cases import CASES, differentiated, model_and_batches
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return SequenceDataset.open(write_tiny(tmp_path_factory.mktemp("padding") / "synthetic", num_users=70))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models compute in float64 where they would in float32."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("double")
def test_padding_changes_nothing(name: str, dataset: SequenceDataset) -> None:
    model, batches = model_and_batches(dataset, CASES[name][0], *CASES[name][1])
    assert why_not_padded(model) is None
    for batch in (batches[0], batches[-1]):
        request = model.request(batch)
        found = {key: rows.detach() for key, rows in model.embeddings(request.features).items()}
        wanted, gradients = differentiated(model, found, request)
        inputs = dense_inputs(model, found, request)
        values = {key: slot.padding() for key, slot in inputs.slots.items()}
        for key, slot in inputs.slots.items():
            values[key][: len(slot.tensor)] = slot.tensor
        assert len(values["timestamps"]) > request.stream.timestamps.numel() and len(values["labels"]) > wanted.count
        loss, padded = differentiated(model, *in_slots(values, inputs.facts))
        torch.testing.assert_close(loss.total, wanted.total, rtol=1e-12, atol=0)
        assert loss.live_negatives == wanted.live_negatives
        for key, gradient in gradients.items():
            if gradient is None:
                assert padded[key] is None, key
                continue
            assert gradient.dtype == torch.float64
            own = padded[key]
            assert own is not None and not own[len(gradient) :].any(), "padding has a gradient"
            torch.testing.assert_close(own[: len(gradient)], gradient, rtol=1e-9, atol=1e-12)


def test_slots_are_few_and_never_full() -> None:
    sizes = [slot_size(rows) for rows in range(5000)]
    assert all(rows < size <= max(rows + 16, 1.25 * (rows + 1)) for rows, size in enumerate(sizes))
    assert sizes == sorted(sizes) and len(set(sizes)) < 40
