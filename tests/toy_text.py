"""Language models of toy size, with tokenizers, and data sets whose items have texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hstu.data import Feature, SequenceDataset
from tests.samples import make_dataset

SIZE = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32)
POSITIONS = dict(max_position_embeddings=40)
KINDS: dict[str, dict[str, Any]] = {
    "bert": SIZE | POSITIONS,
    "roberta": SIZE | POSITIONS,  # whose positions begin behind that of padding
    "albert": SIZE | POSITIONS | dict(embedding_size=8),  # whose words are narrower than its hidden states
    "mpnet": SIZE | POSITIONS,  # with relative positions
    "gpt2": dict(n_embd=16, n_head=2, n_layer=2, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen3": SIZE | dict(num_key_value_heads=1, head_dim=8),
    "modernbert": SIZE | dict(local_attention=8, pad_token_id=0, cls_token_id=2, sep_token_id=3),  # half its layers
}
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def save_model(folder: Path, words: Sequence[str], kind: str = "bert", *, weights: bool = True, **shape: Any) -> Path:
    """Save a random model of ``kind`` with a tokenizer that knows ``words``; ``shape`` wins over its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CONFIG_MAPPING, AutoModel, PreTrainedTokenizerFast

    known = {word: id for id, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *dict.fromkeys(words)])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind != "gpt2":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    fields = KINDS[kind] | (NO_DROPOUT if kind in ("bert", "roberta", "albert", "mpnet") else {})
    config = CONFIG_MAPPING[kind](**{"vocab_size": len(known)} | fields | shape)
    if weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModel.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


TITLES = ["red shoe", "blue shoe, wide", 'a "red" hat', "blue hat\nwith a feather", "feather", "☂ red"]
WORDS = ["title", ":", "red", "blue", "shoe", "hat", "a", "feather", "with", "wide", ",", '"', "brand"]


def text_dataset(folder: Path, lengths: Sequence[int], **options: Any) -> SequenceDataset:
    """Random sequences of items that have one of ``TITLES`` or none, and a brand."""
    declared = (
        Feature(name="title", level="item", kind="text", vocab_size=len(TITLES)),
        Feature(name="brand", level="item", kind="categorical", vocab_size=3),
    )
    originals = {"title": TITLES, "brand": ["acme", "red", "b"]} | options.pop("originals", {})
    return make_dataset(folder, lengths, declared=declared, originals=originals, **options)
