"""Any HuggingFace encoder or decoder as a backbone: token vectors in, hidden states out, under the one mask."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hstu.layers.positions import token_positions
from hstu.layers.tokens import Tokens
from hstu.layers.visibility import Visibility

_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
)
_PROBED = 4  # tokens of the check that the mask is obeyed


class HuggingFaceBlock(nn.Module):
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
        visibility: Who reads whom.

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
        visibility: Visibility,
    ) -> None:
        super().__init__()
        shape = dict(hidden_size=hidden_size, num_hidden_layers=num_layers, num_attention_heads=num_heads)
        self.model = _build(name, shape, ffn_size, max_tokens, dropout)
        self.visibility = visibility
        config = self.model.config
        if config.hidden_size != hidden_size:
            raise ValueError(f"has hidden_size {config.hidden_size}; set NetworkArgs.hidden_size to that")
        if getattr(config, "max_position_embeddings", max_tokens) < max_tokens:
            raise ValueError(f"has {config.max_position_embeddings} positions; a sample can have {max_tokens}")
        self._check_mask(hidden_size)

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [T, D] to hidden states [T, D]."""
        x, positions = tokens.values, token_positions(tokens)
        buckets = self.visibility.buckets(tokens)
        if not buckets:  # no tokens, but the graph reaches every weight
            return x + 0.0 * sum(p.sum() for p in self.parameters())
        parts = [
            self._run(bucket.pad(x), bucket.seen, bucket.pad(positions)).flatten(0, 1)[bucket.places]
            for bucket in buckets
        ]
        order = torch.cat([bucket.tokens for bucket in buckets])
        out = torch.cat(parts)
        return torch.empty_like(out).index_copy(0, order, out)

    def _run(self, x: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = self.model(
            inputs_embeds=x, attention_mask=seen[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state
        return out

    @torch.no_grad()
    def _check_mask(self, hidden_size: int) -> None:
        """Hide token 2 of 4 from all others, and see who reads it, and who reads the first and the last."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, _PROBED, hidden_size, generator=generator)
        seen = torch.ones(1, _PROBED, _PROBED, dtype=torch.bool)
        seen = seen.tril() if self.visibility.causal else seen
        seen[0, [0, 1, 3], 2] = False
        was_training = self.training
        self.eval()
        positions = torch.arange(_PROBED)[None]
        before, readers = self._run(x, seen, positions), []
        for j in range(_PROBED):
            changed = x.clone()
            changed[0, j] = torch.randn(hidden_size, generator=generator)
            readers.append((self._run(changed, seen, positions) != before)[0].any(-1).tolist())
        self.train(was_training)
        if [list(row) for row in zip(*readers, strict=True)] != seen[0].tolist():
            raise ValueError("does not obey the attention mask of this model; use another architecture")


def _build(name: str, shape: dict[str, int], ffn_size: int, max_tokens: int, dropout: float) -> Any:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ValueError("needs the transformers library: pip install 'hstu[hf]'") from None
    try:
        if Path(name).is_dir():
            config = AutoConfig.from_pretrained(name, local_files_only=True)
        else:
            none = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
            config = AutoConfig.for_model(name, **shape, **none, vocab_size=1)
            for field, value in (
                ("intermediate_size", ffn_size),
                ("max_position_embeddings", max(max_tokens, _PROBED)),
            ):
                if hasattr(config, field):
                    setattr(config, field, value)
            for field in _DROPOUTS:
                if hasattr(config, field):
                    setattr(config, field, dropout)
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"cannot be built: {str(error).splitlines()[0]}") from None
    missing = {"inputs_embeds", "position_ids"} - set(inspect.signature(model.forward).parameters)
    if missing:
        raise ValueError(f"takes no {' and no '.join(sorted(missing))}; use another architecture")
    model.set_input_embeddings(nn.Identity())  # never called: tokens come as vectors
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
