"""HuggingFace models as backbones: a decoder and an encoder of toy size, causal and masked."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config import Config, ConfigError
from hstu.data import SequenceDataset
from hstu.data.batch import Batch
from hstu.layers.huggingface import HuggingFaceStack
from hstu.models import build_model
from hstu.ops import Mask
from tests.layers.streams import make_tokens
from tests.models.test_backbones import FULL, learnt, planted_chain
from tests.models.test_masked import assert_evaluation_is_prediction
from tests.models.test_models import (
    LENGTHS,
    RANKING,
    assert_rows_see_only_what_is_before_them,
    batch_of,
    build,
    changed,
)
from tests.samples import make_config, make_dataset, scores_of
from tests.toy_text import WORDS, save_model

ROOT = Path(__file__).resolve().parents[2]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is an extra: pip install 'hstu[hf]'"
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


SHAPE = ("NetworkArgs.hidden_size=16", "NetworkArgs.num_attention_heads=2", "NetworkArgs.ffn_hidden_size=64")


def config_of(name: str, task: str = "retrieval", *lines: str) -> Config:
    smooth = ("RankingArgs.prediction_head_act_type='gelu'",) if task == "ranking" else ()
    return make_config(task, f"NetworkArgs.backbone='hf:{name}'", *smooth, *lines)


@needs_transformers
@pytest.mark.parametrize("task", ["ranking", "retrieval"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_rows_see_only_what_is_before_them(dataset: SequenceDataset, name: str, task: str) -> None:
    lines = RANKING["candidates"] if task == "ranking" else ()
    config = config_of(name, task, *lines)
    model: Any = build(dataset, config, spread=False)
    model.embeddings.weights["item"].data.normal_()
    for split in ("train", "test"):
        assert_rows_see_only_what_is_before_them(model, batch_of(dataset, config, split, [0, 2, 3]))


# Of each family one: what its configs call their widths, and how it takes a mask.
KINDS = ["albert", "electra", "roberta", "gemma2", "qwen3", "xlnet"]


@needs_transformers
@pytest.mark.parametrize("name", KINDS)
def test_a_type_takes_its_shape_from_the_config_and_obeys_the_mask(dataset: SequenceDataset, name: str) -> None:
    config = config_of(name, "retrieval", *SHAPE)
    model: Any = build(dataset, config, spread=False)
    weights = sum(p.numel() for p in model.backbone.parameters())
    assert 2 * 4 * 16 * 16 * (0.5 if name == "albert" else 1) < weights < 20_000  # albert has one layer's weights
    model.embeddings.weights["item"].data.normal_()
    batch = batch_of(dataset, config, "train", [0, 2, 3])
    assert_rows_see_only_what_is_before_them(model, batch)
    model(batch).total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@needs_transformers
def test_a_model_that_tells_positions_by_their_order_takes_no_candidates(dataset: SequenceDataset) -> None:
    with pytest.raises(ConfigError, match="takes no position_ids, so that candidates cannot stand at one position"):
        build_model(config_of("xlnet", "ranking", *SHAPE, *RANKING["candidates"]), dataset.schema)


@needs_transformers
@pytest.mark.parametrize(
    ("name", "objective"),
    [("electra", "replaced"), ("xlnet", "replaced"), ("albert", "permuted"), ("bert", "permuted")],
)
@torch.no_grad()
def test_hidden_items_in_every_way(dataset: SequenceDataset, name: str, objective: str) -> None:
    lines = (*SHAPE, "NetworkArgs.is_causal=False", f"RetrievalArgs.objective='{objective}'")
    config = config_of(name, "retrieval", *lines, "RetrievalArgs.mask_probability=0.4")
    model: Any = build(dataset, config, spread=False)
    model.embeddings.weights["item"].data.normal_()
    assert_evaluation_is_prediction(model.eval(), batch_of(dataset, config, "test", [0, 2, 3]))
    batch = model.training_batch(batch_of(dataset, config))
    request, asked = model.request(batch), batch.label_events
    rows = model.encode(model.embeddings(batch.features), request)
    owner, read = torch.repeat_interleave(batch.lengths("item")), 0
    for event in range(batch.num_events):
        moved = model.encode(model.embeddings(changed(batch, "item", event, 30).features), request) != rows
        in_order = event not in asked.tolist() and (asked > event)
        may = (owner[asked] == owner[event]) & (in_order if is_behind(batch, event) else event not in asked.tolist())
        assert torch.equal(moved.any(1), may), event
        read += int(may.sum())
    assert read > 10


def is_behind(batch: Batch, event: int) -> bool:
    """Whether an event is in the place of a candidate."""
    ends = batch.lengths("item").cumsum(0)
    owner = int(torch.searchsorted(ends, torch.tensor(event), right=True))
    return event >= int(ends[owner] - batch.num_candidates[owner])


@needs_transformers
def test_a_model_without_position_ids_permutes_nothing(dataset: SequenceDataset) -> None:
    lines = (*SHAPE, "NetworkArgs.is_causal=False", "RetrievalArgs.objective='permuted'")
    with pytest.raises(ConfigError, match="takes no position_ids; RetrievalArgs.objective = 'permuted' needs"):
        build_model(config_of("xlnet", "retrieval", *lines), dataset.schema)


@needs_transformers
@pytest.mark.slow
def test_every_causal_and_masked_type_works_or_is_refused_in_one_line() -> None:
    """The types that work are those that docs/backbones.md names."""
    import transformers
    from transformers.models.auto import modeling_auto

    names = {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES}
    shape = dict(hidden_size=16, num_layers=2, num_heads=2, ffn_size=64, max_tokens=33, dropout=0.0)
    works: dict[bool, set[str]] = {True: set(), False: set()}
    tokens, page = make_tokens((7, 0, 1, 12), width=16), (ROOT / "docs" / "backbones.md").read_text()
    for name, causal in itertools.product(sorted(names), works):
        try:
            block = HuggingFaceStack(name, **shape, mask=Mask(causal=causal), with_candidates=False)  # type: ignore[arg-type]
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300, name
            continue
        out = block(tokens)
        out.sum().backward()
        assert out.shape == (20, 16) and bool(out.isfinite().all()), name
        assert all(p.grad is not None for p in block.parameters() if p.requires_grad), name
        works[causal].add(name)
    assert works[True] <= works[False]
    for mark, found in (("types", works[True]), ("masked types", works[False] - works[True])):
        documented = {name.strip("`,") for name in page.split(f"<!-- {mark} -->")[1].split()}
        assert documented == found or transformers.__version__ != "5.23.0", documented ^ found
    assert {"gpt2", "bert", "xlnet", "mistral", "qwen2", "qwen3", "gemma", "albert", "electra"} <= works[True]
    assert "longformer" in works[False]


REFUSED = [
    ("bart", "is an encoder and a decoder"),
    ("mamba", "keeps a state from token to token"),
    ("gemma3", "hf:gemma3_text"),
    ("ctrl", "does not obey the attention mask"),
    ("reformer", "axial_pos_embds"),
    ("longformer", "takes a mask of padding alone, so that every token sees what follows; train it on masked items"),
    ("transfo-xl", "the library has no model type 'transfo-xl'"),
]


@needs_transformers
@pytest.mark.parametrize(("name", "reason"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(dataset: SequenceDataset, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(config_of(name, "retrieval", *SHAPE), dataset.schema)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"NetworkArgs.backbone = 'hf:{name}': ")


@needs_transformers
def test_an_encoder_trained_on_masked_items_sees_in_evaluation_what_a_causal_model_sees(
    dataset: SequenceDataset,
) -> None:
    config = config_of("bert", "retrieval", "NetworkArgs.is_causal=False")
    model: Any = build(dataset, config, spread=False)
    model.embeddings.weights["item"].data.normal_()
    assert_evaluation_is_prediction(model, batch_of(dataset, config, "test"))


@needs_transformers
@torch.no_grad()
def test_a_model_that_knows_padding_alone_predicts_hidden_items_within_its_windows(
    dataset: SequenceDataset, tmp_path: Path
) -> None:
    lines = (*SHAPE, "NetworkArgs.is_causal=False")
    config = config_of("longformer", "retrieval", *lines)
    model: Any = build(dataset, config, spread=False)
    model.embeddings.weights["item"].data.normal_()
    assert not model.backbone.takes_mask
    assert_evaluation_is_prediction(model.eval(), batch_of(dataset, config, "test", [0, 2, 3]))
    build_model(config_of("longformer", "retrieval", *lines, "RetrievalArgs.objective='replaced'"), dataset.schema)
    with pytest.raises(ConfigError, match="takes no mask but of padding; .*'permuted' needs"):
        build_model(config_of("longformer", "retrieval", *lines, "RetrievalArgs.objective='permuted'"), dataset.schema)
    # One layer with a window of 4 sees two tokens on each side.
    from transformers import LongformerConfig

    shape = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=1, pad_token_id=0
    )
    LongformerConfig(**shape, attention_window=4, max_position_embeddings=40).save_pretrained(tmp_path)
    options = dict(hidden_size=16, num_layers=1, num_heads=2, ffn_size=32, max_tokens=33, dropout=0.0)
    block = HuggingFaceStack(str(tmp_path), mask=Mask(causal=False), with_candidates=False, **options).eval()  # type: ignore[arg-type]
    tokens = make_tokens((7, 0, 1, 12), width=16)
    before = block(tokens)
    for token, (low, high) in {0: (0, 3), 3: (1, 6), 6: (4, 7), 7: (7, 8), 14: (12, 17)}.items():
        moved = tokens.values.clone()
        moved[token] += torch.randn(16)
        after = block(replace(tokens, values=moved))
        assert (after != before).any(1).nonzero().flatten().tolist() == [*range(low, high)], token


@needs_transformers
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_gradients_reach_every_parameter_and_nothing_moves_none(dataset: SequenceDataset, name: str) -> None:
    config = config_of(name)
    for rows in (None, []):
        model: Any = build(dataset, config, spread=False)
        model(batch_of(dataset, config, rows=rows)).total.backward()
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), parameter_name
            assert rows is None or not parameter.grad.any(), parameter_name


@needs_transformers
@torch.no_grad()
def test_other_samples_change_nothing(dataset: SequenceDataset) -> None:
    config = config_of("gpt2")
    model: Any = build(dataset, config, spread=False)
    whole = scores_of(model, batch_of(dataset, config))
    single = torch.cat([scores_of(model, batch_of(dataset, config, rows=[row])) for row in range(len(LENGTHS))])
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-5)


@needs_transformers
def test_a_decoder_learns_what_follows_what(tmp_path: Path) -> None:
    dataset = planted_chain(tmp_path / "chain")
    config = config_of("gpt2", "retrieval", *FULL, "NetworkArgs.hidden_size=16", "RetrievalArgs.temperature=0.1")
    assert learnt(dataset, config, steps=0) < 0.3
    assert learnt(dataset, config) > 0.6  # 1.0 with three seeds and with ATEN_CPU_CAPABILITY=default


@needs_transformers
def test_a_directory_names_the_shape(dataset: SequenceDataset, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16, vocab_size=1).save_pretrained(tmp_path)
    model: Any = build_model(config_of(str(tmp_path)), dataset.schema)
    assert len(model.backbone.model.h) == 1  # NetworkArgs.num_layers is 2
    with pytest.raises(ConfigError, match="has hidden_size 8"):
        build_model(config_of(str(tmp_path), "retrieval", "NetworkArgs.hidden_size=10"), dataset.schema)
    with pytest.raises(ConfigError, match="has 16 positions; a sample can have 33"):
        build_model(config_of(str(tmp_path), "retrieval", "DatasetArgs.max_history_seqlen=30"), dataset.schema)


@needs_transformers
@pytest.mark.parametrize(
    ("name", "lines", "reason"),
    [
        ("no-such-model", (), "cannot be built"),
        ("gpt2", ("NetworkArgs.gate='mul'",), "which hf does not have"),
        ("bert", ("NetworkArgs.is_causal=False", "NetworkArgs.max_attn_len=3"), "belongs to causal attention"),
    ],
)
def test_what_does_not_fit_is_refused(dataset: SequenceDataset, name: str, lines: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(config_of(name, "retrieval", *lines), dataset.schema)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@needs_transformers
@pytest.mark.parametrize("wrong", [torch.ones_like, lambda seen: torch.ones_like(seen).tril()], ids=["none", "own"])
def test_a_model_with_a_mask_of_its_own_is_refused(
    dataset: SequenceDataset, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = HuggingFaceStack.run
    monkeypatch.setattr(HuggingFaceStack, "run", lambda self, x, seen, p: honest(self, x, wrong(seen), p))
    with pytest.raises(ConfigError, match="does not obey the attention mask"):
        build_model(config_of("bert"), dataset.schema)


def test_without_transformers_the_remedy_is_named(dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'hstu\[hf\]'"):
        build_model(config_of("gpt2"), dataset.schema)


@needs_transformers
def test_a_backbone_may_start_from_the_weights_in_its_directory(dataset: SequenceDataset, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = save_model(tmp_path / "gpt2", WORDS, "gpt2")
    config = config_of(str(folder), "retrieval", "NetworkArgs.hidden_size=16", "NetworkArgs.pretrained_backbone=True")
    model: Any = build(dataset, config, spread=False)
    own, saved = model.backbone.model.state_dict(), load_file(folder / "model.safetensors")
    assert len(own) > 20 and all(torch.equal(value, saved[name]) for name, value in own.items())
    with pytest.raises(ConfigError, match="pretrained_backbone = True: is for models of the transformers library"):
        make_config("retrieval", "NetworkArgs.pretrained_backbone=True")
    with pytest.raises(ConfigError, match="no weights"):
        (folder / "model.safetensors").unlink()
        build(dataset, config, spread=False)
