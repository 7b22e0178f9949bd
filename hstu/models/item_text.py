"""Vectors of items made of their texts: read anew in each step, or once for all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hstu.config import Config, ItemTextArgs
from hstu.data.item_text import item_texts, text_columns
from hstu.data.schema import Feature, Schema
from hstu.layers.text_model import TextModel, Tokenizer

if TYPE_CHECKING:
    from hstu.data.reader import SequenceDataset

KEPT = "text_model.json"
"""In a directory without weights that a run keeps of a language model: which model it is, and where it was."""
_READ_AT_ONCE = 1 << 14  # texts of a catalogue


class ItemText(nn.Module):
    """Items by what a language model makes of their texts (HLLM, https://arxiv.org/abs/2409.12740).

    Texts are numbered: items of one text have one vector. A model that learns reads each text of a training batch once,
    in micro-batches whose activations are computed again in the backward pass. Otherwise it reads all when an item is
    first asked for, and keeps the vectors until training goes on. The vectors of a frozen model are given, or it reads
    in place.

    Args:
        args: The knobs.
        columns: Features of items that are read.
        width: Of the vectors.
        std: Of what frozen vectors begin as.
        dtype: That the model computes in; None: that of its weights.
    """

    def __init__(
        self,
        args: ItemTextArgs,
        columns: tuple[Feature, ...],
        width: int,
        std: float,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.args, self.columns, self.dtype = args, columns, dtype
        #: Of a directory that a run keeps: ``content`` of the model, and ``model``, where it was; else None.
        self.kept: dict[str, str] | None = _kept(args)
        reader = make_text_model(args)
        #: The model that learns.
        self.model: TextModel | None = None
        #: The model that does not: no weight of the run.
        self.frozen: list[TextModel] = []
        self.mean: Tensor
        self.deviation: Tensor
        if args.freeze:
            self.frozen.append(reader.requires_grad_(False).eval())
            # Of the catalogue that training began with.
            self.register_buffer("mean", torch.zeros(reader.width))
            self.register_buffer("deviation", torch.ones(()))
        else:
            self.model = reader
        self.to_items: nn.Module = nn.Identity()
        if args.freeze or reader.width != width:
            self.to_items = nn.Linear(reader.width, width)
            nn.init.normal_(self.to_items.weight, std=std / reader.width**0.5 if args.freeze else reader.width**-0.5)
            nn.init.zeros_(self.to_items.bias)
        #: The text of each item, [items] int64.
        self.numbers: Tensor
        self.register_buffer("numbers", torch.empty(0, dtype=torch.int64), persistent=False)
        #: Of a frozen model, [texts, H] in host memory or on disk.
        self.vectors: Tensor | None = None
        #: Makes the vectors of distinct texts, each on one of the ranks that ask; ``parallelize`` sets it.
        self.spread: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] = lambda texts, make: make(texts)
        #: Called between the parts of long work.
        self.tick: Callable[[], None] = lambda: None
        self._tokens, self._offsets = torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        self._numbers = torch.empty(0, dtype=torch.int64)  # those of ``numbers``, in host memory
        self._catalogue: Tensor | None = None
        self._tokenizer = ""  # what tells it from others

    def train(self, mode: bool = True) -> ItemText:
        """Switch as any module; vectors of weights that may change are forgotten."""
        self._catalogue = None
        super().train(mode)
        return self

    def read(self, dataset: SequenceDataset) -> None:
        """Take the texts of the items of ``dataset``.

        Raises:
            ConfigError: for texts that are not there, and tokens that the model does not know.
        """
        args, reader = self.args, self.model or self.frozen[0]
        assert args.model is not None
        try:
            texts = item_texts(dataset, self.columns, args.prompt)
        except ValueError as error:
            raise args.error("columns", str(error)) from None
        try:
            tokenizer = Tokenizer(args.model)
        except ValueError as error:
            raise args.error("model", str(error)) from None
        if tokenizer.size > reader.vocab_size:
            raise args.error("model", f"its tokenizer has {tokenizer.size} tokens, the model {reader.vocab_size}: "
                             f"they do not belong together; save both in one directory")  # fmt: skip
        self._tokenizer = tokenizer.fingerprint()
        number_of = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        self._numbers = torch.tensor([number_of[text] for text in texts])
        self.numbers = self._numbers.to(self.numbers.device)
        tokens, lengths = tokenizer([*number_of], args.max_tokens)
        self._tokens = torch.from_numpy(tokens)
        self._offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))

    @property
    def num_texts(self) -> int:
        """How many texts differ."""
        return self._offsets.numel() - 1

    def forward(self, items: Tensor) -> Tensor:
        """Return the vectors of ``items`` [n], [n, width] float32."""
        texts = self.numbers[items]
        if self.model is None:
            return self.to_items(self._standard(self._frozen_vectors(texts)))
        if self.training:
            distinct, places = texts.unique(return_inverse=True)
            out: Tensor = self.to_items(self.spread(distinct, self.embed))[places]
            return out
        if self._catalogue is None:
            self._catalogue = self._read_all()
        return self._catalogue[texts]

    def embed(self, texts: Tensor) -> Tensor:
        """Return what the model makes of ``texts`` [n], as many times as they are there: [n, H] float32."""
        reader = self.model or self.frozen[0]
        keep_less = reader.training and torch.is_grad_enabled()
        device = reader.words.weight.device
        parts = []
        for part in self._parts(texts.cpu()):
            given = [x.to(device) for x in self._tokens_of(part)]
            with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                made = checkpoint(reader, *given, use_reentrant=False) if keep_less else reader(*given)
            parts.append(made if made.dtype == torch.float64 else made.float())
        return torch.cat(parts)

    def num_tokens(self, items: Tensor) -> int:
        """Return how many tokens the texts of ``items``, in host memory, have, each counted once, with learned ones."""
        texts = self._numbers[items].unique()
        return int(self._offsets.diff()[texts].sum()) + texts.numel() * (self.args.pooling == "token")

    def content(self, *, of_run: bool) -> str:
        """Return what tells these vectors from others; ``of_run``: whatever the texts, and what the model learns.

        Texts are to be read before.
        """
        content = self._content() if self.kept is None else self.kept["content"]
        if of_run:
            return content
        digest = hashlib.sha256(content.encode())
        for values in (self._tokens, self._offsets):
            digest.update(values.numpy().tobytes())
        return digest.hexdigest()[:16]

    def give(self, vectors: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Take the ``vectors`` [texts, H] of a frozen model, which is needed no more, and what they are like.

        Args:
            vectors: In host memory or on disk.
            mean: Of them, [H].
            deviation: From it, a number.
        """
        self.vectors = vectors
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        self.frozen.clear()

    def _content(self) -> str:
        args, reader = self.args, self.model or self.frozen[0]
        models = reader.fingerprint(weights=self.model is None), self._tokenizer
        own = (*models, args.prompt, args.max_tokens, args.pooling, str(self.dtype))
        return hashlib.sha256(repr(own).encode()).hexdigest()[:16]

    def _frozen_vectors(self, texts: Tensor) -> Tensor:
        with torch.no_grad():
            if self.vectors is not None:
                return self.vectors[texts.to(self.vectors.device)].to(texts.device)
            distinct, places = texts.unique(return_inverse=True)
            return self.embed(distinct).to(texts.device)[places]

    def _standard(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.deviation

    @torch.no_grad()
    def _read_all(self) -> Tensor:
        parts = []
        for texts in torch.arange(self.num_texts, device=self.numbers.device).split(_READ_AT_ONCE):
            parts.append(self.to_items(self.spread(texts, self.embed)))
            self.tick()
        return torch.cat(parts)

    def _tokens_of(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of ``texts`` [n], one after another, int64, and how many each has, [n]."""
        first, lengths = self._offsets[texts], self._offsets.diff()[texts]
        ends = lengths.cumsum(0)
        places = torch.repeat_interleave(first - ends + lengths, lengths) + torch.arange(int(lengths.sum()))
        return self._tokens[places].long(), lengths

    def _parts(self, texts: Tensor) -> Iterator[Tensor]:
        """Split ``texts`` so that each part has at most as many tokens as are read at once; at least one part."""
        ends = (self._offsets.diff()[texts] + 1).cumsum(0)
        start = 0
        while True:
            before = int(ends[start - 1]) if start else 0
            stop = int(torch.searchsorted(ends, before + self.args.micro_batch_tokens, right=True))
            stop = min(max(stop, start + 1), texts.numel())
            yield texts[start:stop]
            start = stop
            if start >= texts.numel():
                return


def make_text_model(args: ItemTextArgs) -> TextModel:
    """Return the language model of ``args``.

    Raises:
        ConfigError: if there is none, or it does not fit.
    """
    assert args.model is not None
    pretrained = args.init == "pretrained" and _kept(args) is None  # whose weights a checkpoint has, or nobody needs
    try:
        if not Path(args.model).exists():
            raise ValueError("there is no such directory; save a model and its tokenizer there, with save_pretrained")
        return TextModel(args.model, pooling=args.pooling, max_tokens=args.max_tokens, pretrained=pretrained)
    except ValueError as error:
        raise args.error("model", str(error)) from None


def _kept(args: ItemTextArgs) -> dict[str, str] | None:
    file = Path(args.model or "") / KEPT
    if not file.is_file():
        return None
    try:
        found: dict[str, str] = json.loads(file.read_bytes())
        found["content"], found["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise args.error("model", f"{file} is damaged ({error!r}); name the directory of the model") from None
    return found


def make_item_text(config: Config, schema: Schema) -> ItemText:
    """Return what makes vectors of the texts of items of ``schema``.

    Raises:
        ConfigError: for a model or columns that are not there.
    """
    args, network = config.item_text, config.network
    try:
        columns = text_columns(schema, args.columns)
    except ValueError as error:
        raise args.error("columns", str(error)) from None
    dtype = torch.bfloat16 if network.dtype_str == "bfloat16" else None
    width, std = network.item_embedding_dim, network.embedding_initializer_std
    return ItemText(args, columns, width, std, dtype)
