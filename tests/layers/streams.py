"""Random token streams and HSTU stacks for the tests of the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from hstu.layers.hstu import HSTUConfig, HSTUStack, hstu_preset
from hstu.layers.tokens import Tokens
from hstu.ops import Layout, lengths_to_offsets


def make_config(preset: str, **fields: Any) -> HSTUConfig:
    chosen = hstu_preset(preset)  # type: ignore[arg-type]
    if preset == "research":
        chosen |= dict(position_bias=True, time_bias_buckets=20, norm_eps=1e-6)
    shape = dict(hidden_size=10, num_heads=2, qk_channels=3, value_channels=5, max_tokens=40, scaling_seqlen=17.0)
    return HSTUConfig(**{**shape, **chosen, **fields})


def make_block(config: HSTUConfig, num_layers: int = 1, dtype: torch.dtype = torch.float32) -> HSTUStack:
    """A block whose every parameter is random, norms and biases included."""
    torch.manual_seed(3)
    block = HSTUStack(config, num_layers)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return block.to(dtype)


def make_tokens(
    lengths: Sequence[int],
    context: Sequence[int] | None = None,
    candidates: Sequence[int] | None = None,
    *,
    width: int = 10,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    gaps = torch.randint(0, 5000, (total,), generator=generator)
    return Tokens(
        values=torch.randn(total, width, generator=generator, dtype=dtype),
        layout=Layout(
            lengths_to_offsets(torch.tensor(lengths, dtype=torch.int64)),
            num_context=torch.tensor(context or [0] * len(lengths), dtype=torch.int64),
            num_candidates=torch.tensor(candidates or [0] * len(lengths), dtype=torch.int64),
            timestamps=10**9 + gaps.cumsum(0),
        ),
        event_rows=torch.arange(total),
        tokens_per_event=1,
    )


def subset(tokens: Tokens, samples: Sequence[int]) -> tuple[Tokens, torch.Tensor]:
    """The stream of some samples only, and the rows they had."""
    layout = tokens.layout
    bounds = layout.offsets.tolist()
    rows = torch.tensor([r for b in samples for r in range(bounds[b], bounds[b + 1])], dtype=torch.int64)
    chosen = torch.tensor(list(samples))
    part = Tokens(
        values=tokens.values[rows],
        layout=Layout(
            lengths_to_offsets(layout.lengths[chosen]),
            num_context=layout.context[chosen],
            num_candidates=(layout.lengths - layout.history)[chosen],
            timestamps=tokens.timestamps[rows],
        ),
        event_rows=torch.arange(rows.numel()),
        tokens_per_event=1,
    )
    return part, rows


def at_times(tokens: Tokens, timestamps: torch.Tensor) -> Tokens:
    """The same stream at other times."""
    return replace(tokens, layout=replace(tokens.layout, timestamps=timestamps))
