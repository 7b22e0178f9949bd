"""Items by their texts: the language model's own vectors, packed; each item once; gradients; where they join."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import ConfigError
from hstu.data import SequenceDataset
from hstu.data.item_text import item_texts, text_columns
from hstu.layers.text_model import TextModel, Tokenizer
from hstu.models.item_text import ItemText
from tests.models.test_models import batch_of, build
from tests.samples import make_config
from tests.toy_text import KINDS, TITLES, WORDS, save_model, text_dataset

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is an extra: pip install 'hstu[text]'"
)
LENGTHS = [5, 3, 9, 4]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return text_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"), WORDS)


def lines(model: Path, *more: str) -> list[str]:
    return [f"ItemTextArgs.model={str(model)!r}", "ItemTextArgs.max_tokens=16", "FeatureArgs.unknown_rate=0.1", *more]


def text_of(dataset: SequenceDataset, model: Path, *more: str) -> ItemText:
    built = build(dataset, make_config("retrieval", *lines(model, *more)), spread=False)
    assert built.item_encoder is not None and built.item_encoder.text is not None
    return built.item_encoder.text


def test_a_text_is_the_prompt_and_the_columns_that_have_a_value(dataset: SequenceDataset) -> None:
    texts = item_texts(dataset, text_columns(dataset.schema, ("title", "brand")), "Read this: ")
    titles, brands = (dataset.item_features(name) for name in ("title", "brand"))
    for text, title, brand in zip(texts, np.asarray(titles), np.asarray(brands), strict=True):
        own = [f"title: {TITLES[title]}"] if title < len(TITLES) else []
        own += [f"brand: {('acme', 'red', 'b')[brand]}"] if brand < 3 else []
        assert text == "Read this: " + "\n".join(own)
    assert text_columns(dataset.schema, None)[0].name == "title"


QUICK = ("bert", "roberta", "gpt2")
OTHERS = [kind for kind in KINDS if kind not in (*QUICK, "modernbert")]


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_a_packed_text_has_the_vector_that_the_model_gives_it_alone(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel

    folder = save_model(tmp_path, [f"w{n}" for n in range(40)], kind)
    alone = AutoModel.from_pretrained(folder).eval()
    model = TextModel(str(folder), pooling="mean", max_tokens=20, pretrained=True).eval()
    lengths = [3, 7, 0, 1, 5, 20]
    tokens = torch.randint(4, 44, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(tokens, torch.tensor(lengths))
        expected = [
            alone(input_ids=own[None]).last_hidden_state[0].mean(0) for own in tokens.split(lengths) if len(own)
        ]
    assert not found[2].any()
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert model.reader.mask.causal == (kind in ("gpt2", "qwen3"))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_learned_token_stands_behind_each_text(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModel

    folder = save_model(tmp_path, WORDS, kind)
    alone = AutoModel.from_pretrained(folder).eval()
    model = TextModel(str(folder), pooling="token", max_tokens=8, pretrained=True).eval()
    tokens, lengths = torch.tensor([5, 6, 7, 8, 4]), torch.tensor([2, 0, 3])
    with torch.no_grad():
        found = model(tokens, lengths)
        for row, own in zip(found, tokens.split(lengths.tolist()), strict=True):
            x = torch.cat([alone.get_input_embeddings()(own), model.token[None]])
            expected = alone(inputs_embeds=x[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_long_texts_are_cut_and_keep_the_tokens_of_the_model(bert: Path) -> None:
    tokens, lengths = Tokenizer(str(bert))(["red shoe red shoe red shoe", "", "blue"], 5)
    assert lengths.tolist() == [5, 2, 3]
    assert tokens[:5].tolist() == [2, 6, 8, 6, 3] and tokens[5:7].tolist() == [2, 3]


def test_distinct_items_are_read_once_and_gradients_are_the_plain_ones(dataset: SequenceDataset, bert: Path) -> None:
    """In float64; micro-batches of a few texts, whose activations are computed again."""
    text = text_of(dataset, bert, "ItemTextArgs.freeze=False", "ItemTextArgs.micro_batch_tokens=20")
    text.read(dataset)
    text.double().train()
    assert text.model is not None
    plain = copy.deepcopy(text)
    items = torch.tensor([4, 7, 4, 4, 0, 29, 7, 11, 3])
    read: list[int] = []
    text.model.register_forward_hook(lambda module, given, out: read.append(given[1].numel()))
    weights = torch.randn(len(items), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    out = text(items)
    assert sum(read) == len({int(text.numbers[item]) for item in items}) < 6 and len(read) > 1
    (out * weights).sum().backward()
    rows = [plain.to_items(plain.model(*plain._tokens_of(plain.numbers[item][None]))) for item in items]
    torch.testing.assert_close(out, torch.cat(rows), atol=1e-12, rtol=1e-12)
    (torch.cat(rows) * weights).sum().backward()
    for (name, one), other in zip(text.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=1e-10)


def test_the_catalogue_is_read_once_until_training_goes_on(dataset: SequenceDataset, bert: Path) -> None:
    text = text_of(dataset, bert, "ItemTextArgs.freeze=False")
    text.read(dataset)
    text.eval()
    read: list[int] = []
    assert text.model is not None
    text.model.register_forward_hook(lambda module, given, out: read.append(given[1].numel()))
    with torch.no_grad():
        first = text(torch.tensor([3, 5]))
        text(torch.tensor([5, 8, 9]))
        assert sum(read) == text.num_texts == len(TITLES) + 1
        for weight in text.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
        text.train()
        text.eval()
        assert (text(torch.tensor([3, 5])) - first).abs().max() > 1e-3
    assert sum(read) == 2 * text.num_texts


@pytest.mark.parametrize("embedding", ["both", "categorical"])
@pytest.mark.parametrize("freeze", [True, False])
def test_text_decides_what_an_item_is_wherever_it_stands(
    dataset: SequenceDataset, bert: Path, embedding: str, freeze: bool
) -> None:
    config = make_config("retrieval", *lines(bert, f"NetworkArgs.item_embedding='{embedding}'",
                         f"ItemTextArgs.freeze={freeze}"))  # fmt: skip
    model: Any = build(dataset, config, spread=False)
    model.item_encoder.read(dataset)
    batch = batch_of(dataset, config, "train", [0, 2, 3])
    model(batch).total.backward()
    weights = dict(model.named_parameters())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in weights.values())
    assert any(name.startswith("item_encoder.text.model") for name in weights) == (not freeze)
    model.eval()
    titles, brands = (torch.from_numpy(dataset.item_features(name)) for name in ("title", "brand"))
    alike = [(i, j) for i in range(30) for j in range(i) if titles[i] == titles[j] and brands[i] == brands[j]]
    with torch.no_grad():
        vectors = model.catalogue_vectors(batch, torch.arange(30))
    assert alike
    for i, j in alike:
        assert torch.equal(vectors[i], vectors[j]) == (embedding == "categorical")


BAD = {
    "no model": (["ItemTextArgs.model='/no/such'"], "ItemTextArgs.model = '/no/such': there is no such directory"),
    "pooling": (["ItemTextArgs.pooling='max'"], "ItemTextArgs.pooling = 'max': must be one of 'token', 'mean'"),
    "column": (["ItemTextArgs.columns=('name',)"], r"ItemTextArgs.columns = \('name',\): no column 'name' of words"),
    "frozen token": (
        ["ItemTextArgs.pooling='token'"],
        "ItemTextArgs.pooling = 'token': a frozen model learns no token",
    ),
    "long": (
        ["ItemTextArgs.max_tokens=50"],
        "ItemTextArgs.model = .*: has positions for 40 tokens; texts have up to 50",
    ),
    "local": (["NetworkArgs.item_embedding='local'"], "NetworkArgs.item_embedding = 'local': gives items rows alone"),
    "options alone": (
        ["ItemTextArgs.model=None", "ItemTextArgs.prompt='x'"],
        "ItemTextArgs.prompt = 'x': needs ItemText",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_refused_in_one_line(dataset: SequenceDataset, bert: Path, name: str) -> None:
    bindings, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        build(dataset, make_config("retrieval", *lines(bert, *bindings)), spread=False)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_its_files_is_refused(
    dataset: SequenceDataset, bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "small", WORDS, vocab_size=6)
    with pytest.raises(ConfigError, match="its tokenizer has 17 tokens, the model 6: they do not belong together"):
        text_of(dataset, tmp_path / "small").read(dataset)
    save_model(tmp_path / "bare", WORDS, weights=False)
    with pytest.raises(ConfigError, match="there are no weights .* in that directory"):
        text_of(dataset, tmp_path / "bare")
    shutil.copy(save_model(tmp_path / "wide", WORDS) / "model.safetensors", tmp_path / "bare")
    for shape in (dict(hidden_size=8), dict(num_hidden_layers=3)):
        save_model(tmp_path / "bare", WORDS, weights=False, **shape)
        with pytest.raises(ConfigError, match=r"its weights are not those of its config.json: \S+ and \d+ more"):
            text_of(dataset, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    assert "MISMATCH" not in "".join(capfd.readouterr())
    file = tmp_path / "bare" / "config.json"
    by_file, by_folder = (text_of(dataset, path, "ItemTextArgs.init='random'") for path in (file, file.parent))
    for text in (by_file, by_folder):
        text.read(dataset)
    assert by_file.frozen and by_file.content(of_run=False) == by_folder.content(of_run=False)
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match="there is no tokenizer .tokenizer.json, "):
        text_of(dataset, tmp_path / "bare", "ItemTextArgs.init='random'").read(dataset)
    with pytest.raises(ValueError, match="hides tokens or counts positions in ways of its own"):
        TextModel(str(save_model(tmp_path / "m", WORDS, "modernbert")), pooling="mean", max_tokens=20, pretrained=True)
    empty = text_dataset(tmp_path / "empty", LENGTHS, originals={"title": [" "] * len(TITLES)})
    with pytest.raises(ConfigError, match="no item has a value of title; name other columns"):
        text_of(empty, bert).read(empty)
