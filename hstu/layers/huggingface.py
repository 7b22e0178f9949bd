"""HuggingFace encoders and decoders: token vectors in, hidden states out, under the one mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hstu.layers.positions import token_positions
from hstu.layers.tokens import Tokens
from hstu.ops import Layout, Mask
from hstu.ops.attention.softmax import attention_buckets

# What the library's configs call the widths that NetworkArgs gives.
_HIDDEN = ("hidden_size", "embedding_size", "input_embedding_size", "word_embed_proj_dim")
_HEADS = ("num_attention_heads", "num_key_value_heads")
_HEAD_WIDTH = ("head_dim", "d_head", "rotary_dim")
_FFN = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "ffn_hidden_size",
        "n_inner", "d_inner")  # fmt: skip
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
)
_OWN_PARTS = {"attn_config", "ffn_config", "esmfold_config"}  # of one model, unlike a vision or audio config
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

_INSTALL = "pip install 'hstu[hf]'"
_PROBED = 4  # tokens of the check that the mask is obeyed
_NOTICED = 1e-5  # share of the largest output that is a change and not rounding

# How a model takes who attends to whom, ``seen`` [b, n, n] bool; the first form that it obeys is used.
_FORMS: tuple[Callable[[Tensor, Tensor], dict[str, Tensor]], ...] = (
    lambda seen, x: {"attention_mask": seen[:, None]},
    lambda seen, x: {"attention_mask": x.new_zeros(seen[:, None].shape).masked_fill(~seen[:, None], _least(x))},
    lambda seen, x: {"attention_mask": seen},
    lambda seen, x: {"perm_mask": (~seen).to(x.dtype)},
)
_WINDOW = 512  # tokens, half of them on each side, of models with windows of their own; fewer if a sample has fewer
_PADDING_ALONE = "takes a mask of padding alone"


class MaskedModel(nn.Module):
    """Runs a model of the transformers library over vectors of jagged sequences, under a mask that it obeys.

    Args:
        model: From :func:`load_model`.
        width: Of the vectors that it takes.
        mask: Who attends to whom.

    Attributes:
        takes_mask: Whether it can be told who attends to whom; if not, what is padding, and all else attends to all, or
            within windows of its own.

    Raises:
        ValueError: the model takes no vectors, or does not obey the mask.
    """

    def __init__(self, model: Any, width: int, mask: Mask) -> None:
        super().__init__()
        self.model, self.mask = model, mask
        taken = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in taken:
            raise ValueError("takes no inputs_embeds; use another architecture")
        self.takes_positions = "position_ids" in taken
        self.options = {name: False for name in ("use_cache", "use_mems") if name in taken}
        self.takes_mask = True
        #: Sequences are made a multiple of it.
        self.window = max(getattr(model.config, "attention_window", [1]))
        self.form = self._find_form(width)

    def forward(self, x: Tensor, layout: Layout, positions: Tensor) -> Tensor:
        """Map vectors [T, width] to hidden states [T, D].

        Args:
            x: Vectors of all sequences.
            layout: Where they lie.
            positions: Of each, [T] int64; of no use to a model that counts by itself.
        """
        # So that the graph reaches every weight: without tokens, or one that no token is routed to.
        nothing = 0.0 * x.sum() + 0.0 * sum(p.sum() for p in self.parameters())
        out = nothing.expand(x.shape[0], self.model.config.hidden_size)
        for bucket in attention_buckets(layout, self.mask, layout):
            rows = bucket.queries
            hidden = self.run(rows.pad(x), bucket.visible, rows.pad(positions)).flatten(0, 1)
            out = out.index_add(0, rows.tokens, hidden[rows.places].to(out.dtype))
        return out

    def run(self, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """Return the hidden states of padded sequences [b, n, width], where ``seen`` [b, n, n] says who attends."""
        length, more = x.shape[1], -x.shape[1] % self.window
        if more:
            x, positions = nn.functional.pad(x, (0, 0, 0, more)), nn.functional.pad(positions, (0, more))
            seen = nn.functional.pad(seen, (0, more, 0, more))
        arguments = dict(self.form(seen, x), inputs_embeds=x, **self.options)
        if self.takes_positions:
            arguments["position_ids"] = positions
        out: Tensor = self.model(**arguments).last_hidden_state
        return out[:, :length]

    def _find_form(self, width: int) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        """Return the form of mask that the model obeys."""
        if next(self.model.parameters()).is_meta:  # its weights are only counted
            return _FORMS[0]
        failed: Exception | None = None
        ran = False
        for form in _FORMS:
            self.form = form
            try:
                if self._obeys(width):
                    return form
                ran = True
            except Exception as error:  # whatever the code of a model makes of a mask that it does not know
                failed = failed or error
        self._find_padding(width)
        if not self.takes_mask and not self.mask.causal:
            return self.form
        if not self.takes_mask:
            raise ValueError(f"{_PADDING_ALONE}, so that every token sees what follows; train it on masked items: "
                             "NetworkArgs.is_causal = False")  # fmt: skip
        if ran or failed is None:
            raise ValueError("does not obey the attention mask of this model; use another architecture")
        with one_line("cannot be run"):
            raise failed

    def _find_padding(self, width: int) -> None:
        """Find out whether the model obeys a mask of padding, if of nothing else."""
        self.form = _padding
        with suppress(Exception):  # whatever the code of a model makes of a mask that it does not know
            self.takes_mask = not self._obeys(width, padding=True)

    @torch.no_grad()
    def _obeys(self, width: int, *, padding: bool = False) -> bool:
        """Hide token 2 of 4 from all others, and see who attends to it, to the first and to the last.

        With ``padding`` the last one is hidden, as what is behind the end of a sequence, and the others see each other.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, _PROBED, width, generator=generator)
        visible = torch.ones(1, _PROBED, _PROBED, dtype=torch.bool)
        visible = visible.tril() if self.mask.causal and not padding else visible
        real = slice(_PROBED - padding)
        visible[0, real if padding else [0, 1, 3], -1 if padding else 2] = False
        was_training = self.training
        self.eval()
        try:
            positions = torch.arange(_PROBED)[None]
            before, attending = self.run(x, visible, positions), []
            for j in range(_PROBED):
                changed = x.clone()
                changed[0, j] = torch.randn(width, generator=generator)
                change = (self.run(changed, visible, positions) - before)[0].abs().amax(-1)
                attending.append((change > _NOTICED * before.abs().max()).tolist())
        finally:
            self.train(was_training)
        shaped = before.shape == (1, _PROBED, self.model.config.hidden_size)
        found = [list(row) for row in zip(*attending, strict=True)]
        return shaped and found[real] == visible[0, real].tolist()


class HuggingFaceStack(MaskedModel):
    """A model of the transformers library, with its own weights and positions but without its word embeddings.

    Args:
        name: A model type ("gpt2", "bert"), whose shape is then that of the other arguments, or the directory of a
            ``config.json``.
        hidden_size: D.
        num_layers: Of a model type.
        num_heads: Of a model type.
        ffn_size: Of a model type.
        max_tokens: Tokens of the longest sample.
        dropout: Of a model type.
        mask: Who attends to whom.
        with_candidates: Whether samples may have candidates, which stand at one position.
        pretrained: Start with the weights in the directory.

    Raises:
        ValueError: transformers is missing, the model does not fit, or it does not obey the mask.
    """

    def __init__(
        self,
        name: str,
        *,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        ffn_size: int,
        max_tokens: int,
        dropout: float,
        mask: Mask,
        with_candidates: bool = True,
        pretrained: bool = False,
    ) -> None:
        shape = dict.fromkeys(_HIDDEN, hidden_size) | dict.fromkeys(_HEADS, num_heads) | dict.fromkeys(_FFN, ffn_size)
        shape |= dict.fromkeys(_HEAD_WIDTH, hidden_size // num_heads)
        shape |= dict(num_hidden_layers=num_layers, max_position_embeddings=max(max_tokens, _PROBED))
        shape |= dict(attention_window=min(2 * max_tokens, _WINDOW))
        with one_line("cannot be built"):
            model = load_model(name, shape, dropout, pretrained=pretrained)
            model.set_input_embeddings(nn.Identity())  # never called: tokens come as vectors
        if model.config.hidden_size != hidden_size:
            raise ValueError(f"has hidden_size {model.config.hidden_size}; set NetworkArgs.hidden_size to that")
        super().__init__(model, hidden_size, mask)
        if with_candidates and not self.takes_positions:
            raise ValueError("takes no position_ids, so that candidates cannot stand at one position; use another "
                             "architecture, or DatasetArgs.max_num_candidates = 0")  # fmt: skip
        if with_candidates and not self.takes_mask:
            raise ValueError(f"{_PADDING_ALONE}, so that candidates would see each other; use another architecture, or "
                             "DatasetArgs.max_num_candidates = 0")  # fmt: skip
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and 0 < positions < max_tokens:
            raise ValueError(f"has {positions} positions; a sample can have {max_tokens}")

    def forward(self, tokens: Tokens) -> Tensor:  # type: ignore[override]
        """Map the stream's values [T, D] to hidden states [T, D]."""
        return super().forward(tokens.values, tokens.layout, token_positions(tokens))


def _least(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def _padding(seen: Tensor, x: Tensor) -> dict[str, Tensor]:
    there = seen[:, 0]  # a sequence has a first token, which sees all of it
    if bool(((seen != there[:, None]) & there[:, :, None]).any()):
        raise ValueError(f"{_PADDING_ALONE}, and here some tokens of a sequence may not see others; use another "
                         "architecture")  # fmt: skip
    return {"attention_mask": there.long()}


class one_line:  # noqa: N801 (a context manager)
    """Turns whatever a model's code raises inside into a ``ValueError`` of one line."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            reason = " ".join(str(error).split()) or kind.__name__  # type: ignore[union-attr]
            reason = reason if len(reason) < 200 else f"{reason[:200]}..."
            raise ValueError(f"{self.what}: {reason}") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a bar, and without the table of weights that do not fit, of which an error tells."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def load_model(name: str, shape: dict[str, int], dropout: float, *, pretrained: bool = False) -> Any:
    """Return an encoder or a decoder of the transformers library, in float32 and without a pooler.

    Args:
        name: A model type, whose shape is then ``shape``, a ``config.json``, or a directory with one.
        shape: What the library's configs call widths and depths -> how much.
        dropout: Of a model type.
        pretrained: Take the weights in the directory ``name`` instead of random ones.

    Raises:
        ValueError: transformers is missing, there is no such model, or it attends in ways that no mask governs.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModel
    except ImportError:
        raise ValueError(f"it needs the transformers library: {_INSTALL}") from None
    if Path(name).exists():
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    elif name in CONFIG_MAPPING and shape:
        config = _shaped(CONFIG_MAPPING[name], shape, dropout)
    else:
        kinds = f"the library has no model type {name!r}, and " if shape else ""
        raise ValueError(f"{kinds}there is no such directory")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("it is an encoder and a decoder; use a model that is one of them")
    if set(config.sub_configs) - _OWN_PARTS:
        text = config.get_text_config().model_type
        raise ValueError(f"it has parts of other kinds; use its text model{f', hf:{text}' if text != name else ''}")
    if getattr(config, "attention_type", None) == "block_sparse":  # which has a mask of its own for long sequences
        config.attention_type = "original_full"
    if getattr(AutoModel._model_mapping[type(config)], "_is_stateful", False):
        raise ValueError("it keeps a state from token to token, which no mask cuts")
    if pretrained and torch.get_default_device().type != "meta":  # which only counts
        if not any(Path(name).glob("*.safetensors*")):
            raise ValueError("there are no weights (*.safetensors) in that directory; save them there, or start with "
                             "random ones")  # fmt: skip
        options = dict(local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True)
        with _quietly():
            model, found = AutoModel.from_pretrained(name, config=config, dtype=torch.float32, **options)
        lacking = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        if random := sorted(key for key in lacking if not key.startswith("pooler.")):
            raise ValueError(f"its weights are not those of its config.json: {random[0]} and {len(random) - 1} more "
                             "are missing or have another shape; save model and config together")  # fmt: skip
    else:
        model = AutoModel.from_config(config, dtype=torch.float32)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _shaped(kind: Any, shape: dict[str, int], dropout: float) -> Any:
    """Return a config of class ``kind`` with those of ``shape`` that it has, and no vocabulary."""
    known = set(kind().to_dict()) | set(kind.attribute_map)
    if "qk_rope_head_dim" in known:  # of which head_dim is another name
        shape = {name: size for name, size in shape.items() if name != "head_dim"}
    chosen: dict[str, Any] = {name: size for name, size in shape.items() if name in known}
    chosen |= {name: dropout for name in _DROPOUTS if name in known}
    none = dict.fromkeys(_SPECIAL)
    try:
        return kind(**chosen, **none, vocab_size=1)
    except Exception:  # some want a number
        return kind(**chosen, **dict.fromkeys(none, 0), vocab_size=1)
