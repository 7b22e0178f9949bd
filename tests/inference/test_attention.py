"""Attention weights on request: those of a plain computation from queries and keys, and what outputs are made of."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.data import SequenceDataset
from hstu.inference import attention
from hstu.inference.attention import attention_of
from tests.layers.naive import may_attend, silu
from tests.models.test_models import LENGTHS, batch_of, build
from tests.samples import make_config, make_dataset, scores_of

WIDE = "NetworkArgs.kv_channels=4"
MODELS = {
    "production": ("ranking", "DatasetArgs.max_num_candidates=3"),
    "research": ("retrieval", "NetworkArgs.preset='research'"),
    "sasrec": ("retrieval", "NetworkArgs.backbone='sasrec'", "NetworkArgs.max_attn_len=2"),
    "llama": ("ranking", "NetworkArgs.backbone='llama'", "NetworkArgs.num_query_groups=1", WIDE),
    "bert": ("retrieval", "NetworkArgs.backbone='bert'"),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


@pytest.mark.parametrize("widest", [256, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_weights_are_those_that_the_model_used(
    dataset: SequenceDataset, name: str, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_WIDEST", widest)
    task, *lines = MODELS[name]
    config = make_config(task, *lines)
    model, batch = build(dataset, config).eval(), batch_of(dataset, config, "test")
    before = scores_of(model, batch)
    seen: list[Any] = []
    kept = [layer.attention for layer in model.backbone.layers]
    for layer, attend in zip(model.backbone.layers, kept, strict=True):

        def spy(
            q: Tensor, k: Tensor, v: Tensor, layout: Any, mask: Any, *, attend: Any = attend, **options: Any
        ) -> Any:
            out = attend(q, k, v, layout, mask, **options)
            seen.append((q, k, v, layout, mask, options, out))
            return out

        layer.attention = spy
    spies = [layer.attention for layer in model.backbone.layers]
    request, layers = attention_of(model, batch)
    assert [layer.attention for layer in model.backbone.layers] == spies, "what was exchanged is put back"
    assert len(layers) == 2 and torch.equal(scores_of(model, batch), before)
    offsets = request.stream.layout.offsets.tolist()
    # The model's own values come after the one-hot ones of its layer, and have the width of a head.
    calls = (len(seen) - 2) // 2
    assert calls == 1 + -(-request.stream.layout.longest // widest)
    own_calls = seen[calls - 1], seen[2 * calls - 1]
    for weights, (q, k, v, layout, mask, options, out) in zip(layers, own_calls, strict=True):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        for b, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
            n, context, m = stop - start, int(layout.context[b]), int(layout.lengths[b] - layout.history[b])
            own = weights[start:stop]
            assert not own[:, :, n:].any()
            summed = torch.einsum("ihj,jhd->ihd", own[:, :, :n], v[start:stop])
            torch.testing.assert_close(summed, out[start:stop], rtol=1e-4, atol=1e-5)
            if name == "research":  # whose relative bias is another matter: the outputs above have it
                continue
            pairs = [[not mask.causal or may_attend(i, j, n, context, m, mask) for j in range(n)] for i in range(n)]
            visible = torch.tensor(pairs)
            scores = torch.einsum("ihd,jhd->ihj", q[start:stop].double(), k[start:stop].double())
            scores = scores / math.sqrt(q.shape[2])
            if name == "production":
                expected = silu(scores) * visible[:, None] / options["scaling_seqlen"]
            else:
                expected = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
            torch.testing.assert_close(own[:, :, :n].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("line", ["NetworkArgs.recompute='selective'", "NetworkArgs.recompute_gate=True"])
def test_layers_in_one_operation_are_opened_whole(dataset: SequenceDataset, line: str) -> None:
    def require(*lines: str) -> None:
        config = make_config("retrieval", *lines)
        attention.require_weights(SimpleNamespace(config=config, model=build(dataset, config)))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="show no weights; open the run with NetworkArgs.recompute = 'none'"):
        require(line)
    require(line, *attention.WHOLE_LAYERS)
