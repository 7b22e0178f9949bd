"""A language model that reads texts and gives one vector of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hstu.layers.huggingface import MaskedModel, load_model, one_line
from hstu.ops import Layout, Mask, lengths_to_offsets, positions_in_sequence, sequence_ids

Pooling = Literal["token", "mean"]

_SAME = 3e-5  # share of the largest output that is rounding, over all layers of a model
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
"""Files of which a tokenizer has one."""
_PROBE = "The naïve café: 100% Größe, 東京 ☂ (no. 7)"  # letters of both cases, accents, signs and spaces
_TEXTS_AT_ONCE = 10_000


class TextModel(nn.Module):
    """An encoder or a decoder of the transformers library over packed texts (HLLM, https://arxiv.org/abs/2409.12740).

    Each text attends to itself as the model attends when it runs alone: a decoder to what is before, an encoder to all
    of it.

    Args:
        path: Directory of a ``config.json``, or that file.
        pooling: ``"token"``: one learned token stands behind each text, and its hidden state is the vector. ``"mean"``:
            of the hidden states; zero of a text without tokens.
        max_tokens: Tokens of the longest text, a learned one not among them.
        pretrained: Start with the weights in the directory.

    Raises:
        ValueError: transformers is missing, or the model does not fit.
    """

    def __init__(self, path: str, *, pooling: Pooling, max_tokens: int, pretrained: bool) -> None:
        super().__init__()
        with one_line("cannot be built"):
            model = load_model(path, {}, 0.0, pretrained=pretrained)
            words = model.get_input_embeddings()
            model.set_input_embeddings(nn.Identity())  # never called: what it takes are vectors
        #: Rows of the vocabulary, of width w.
        self.words: nn.Embedding = words
        self.token: nn.Parameter | None = None
        if pooling == "token":
            spread = words.weight.detach().float().std().clamp(min=0.02)
            self.token = nn.Parameter(torch.randn(words.embedding_dim) * spread)
        longest = max_tokens + (pooling == "token")
        self.first_position = _first_position(model)
        places = getattr(model.config, "max_position_embeddings", None)
        if isinstance(places, int) and 0 < places < longest + self.first_position:
            raise ValueError(f"has positions for {places - self.first_position} tokens; texts have up to {longest}")
        self.reader = MaskedModel(model, words.embedding_dim, Mask(causal=_is_causal(model, words.embedding_dim)))
        self._require_same(longest)

    @property
    def width(self) -> int:
        """Of a text's vector, H."""
        width: int = self.reader.model.config.hidden_size
        return width

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows."""
        return int(self.words.num_embeddings)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the vectors of texts, [n, H].

        Args:
            tokens: Of all texts, one after another, [T] int64.
            lengths: Tokens of each text, [n] int64.
        """
        x, offsets = self.words(tokens), lengths_to_offsets(lengths)
        if self.token is not None:
            # A row further for each text before it, so that a place is left behind each.
            places = torch.arange(tokens.numel(), device=tokens.device) + sequence_ids(offsets, tokens.numel())
            offsets = offsets + torch.arange(offsets.numel(), device=tokens.device)
            rows = self.token.to(x.dtype).repeat(tokens.numel() + lengths.numel(), 1)
            x = rows.index_copy(0, places, x)
        positions = positions_in_sequence(offsets, x.shape[0]) + self.first_position
        longest = int(offsets.diff().max()) if lengths.numel() else 0
        hidden = self.reader(x, Layout(offsets, max_seqlen=longest), positions)
        if self.token is not None:
            return hidden[offsets[1:] - 1]
        owner = sequence_ids(offsets, hidden.shape[0])
        total = hidden.new_zeros(lengths.numel(), hidden.shape[1]).index_add(0, owner, hidden)
        return total / lengths.clamp(min=1)[:, None].to(total.dtype)

    def fingerprint(self, *, weights: bool) -> str:
        """Return what tells this model from others: its shape, and its weights if it is not to learn others."""
        digest = hashlib.sha256(repr(sorted(_shape_of(self.reader.model.config).items())).encode())
        for name, value in sorted(self.state_dict().items()) if weights else ():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def _require_same(self, longest: int) -> None:
        """Raise ``ValueError`` unless packing and masks leave the model what it is when it runs alone."""
        weight = self.words.weight
        if weight.is_meta:
            return
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(longest, weight.shape[1], generator=generator) * weight.float().std()
        training = self.training
        self.eval()
        with one_line("cannot be run"):
            alone = self.reader.model(inputs_embeds=x[None], **self.reader.options).last_hidden_state[0]
        layout = Layout(torch.tensor([0, longest]))
        packed = self.reader(x, layout, torch.arange(longest) + self.first_position)
        self.train(training)
        if not torch.allclose(packed, alone, rtol=0, atol=_SAME * float(alone.abs().max())):
            raise ValueError("hides tokens or counts positions in ways of its own, which no packing keeps; use another "
                             "architecture, or fewer tokens")  # fmt: skip


def _shape_of(config: Any) -> dict[str, Any]:
    notes = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"}
    return {name: value for name, value in config.to_dict().items() if name not in notes}


def _first_position(model: Any) -> int:
    """Return the position of a first token: those of RoBERTa's kin stand behind that of padding."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding) and part.padding_idx is not None:
            return part.padding_idx + 1
    return 0


@torch.no_grad()
def _is_causal(model: Any, width: int) -> bool:
    """Return whether the last of three tokens leaves the first as it is, when the model runs alone."""
    if next(model.parameters()).is_meta:
        return True
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    x[1, :2] = x[0, :2]
    training = model.training
    model.eval()
    with one_line("cannot be run"):
        first = model(inputs_embeds=x).last_hidden_state[:, 0]
    model.train(training)
    return bool(torch.allclose(first[0], first[1], rtol=0, atol=1e-5 * float(first.abs().max())))


class Tokenizer:
    """The tokenizer of a model.

    Args:
        path: Directory that holds it, or a file in there.

    Raises:
        ValueError: transformers is missing, or there is no tokenizer.
    """

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError("it needs the transformers library: pip install 'hstu[hf]'") from None
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        if not any((folder / name).is_file() for name in TOKENIZERS):  # the library makes up one then
            raise ValueError(f"there is no tokenizer ({', '.join(TOKENIZERS)}) in {folder}; save it there")
        with one_line("has no tokenizer that can be read"):
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    @property
    def size(self) -> int:
        """Tokens that it gives."""
        return len(self._tokenizer)

    def fingerprint(self) -> str:
        """Return what tells this tokenizer from others."""
        known = sorted(self._tokenizer.get_vocab().items()), self._tokenizer(_PROBE)["input_ids"]
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def __call__(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of texts, one after another, int32 [T], and how many each has, int64 [n].

        Tokens that begin and end a text for this model are there, and longer texts are cut.
        """
        tokens, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = list(texts[start : start + _TEXTS_AT_ONCE])
            found = self._tokenizer(part, truncation=True, max_length=max_tokens, return_attention_mask=False,
                                    return_token_type_ids=False)["input_ids"]  # fmt: skip
            lengths.append(np.fromiter(map(len, found), np.int64, len(found)))
            tokens.append(np.fromiter((token for text in found for token in text), np.int32))
        return np.concatenate(tokens), np.concatenate(lengths)
