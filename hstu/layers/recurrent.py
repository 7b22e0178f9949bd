"""Recurrent user models: one state a sample, from which every candidate takes one step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hstu.layers.tokens import Tokens
from hstu.ops import positions_in_sequence, sequence_ids


class RecurrentStack(nn.Module):
    """Stacked gated recurrent units (https://arxiv.org/abs/1511.06939), or LSTMs: the backbone.

    Context and history take their steps in order; each candidate takes one step from the state after the history, so
    that candidates do not see each other.

    Args:
        kind: ``"gru"`` or ``"lstm"`` (https://doi.org/10.1162/neco.1997.9.8.1735), which keeps a cell beside its state.
        hidden_size: D, of inputs and states.
        num_layers: Units on top of each other.
        dropout: Between them.
    """

    def __init__(self, kind: Literal["gru", "lstm"], hidden_size: int, num_layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        make = {"gru": nn.GRU, "lstm": nn.LSTM}[kind]
        self.add_module(kind, make(hidden_size, hidden_size, num_layers, dropout=dropout if num_layers > 1 else 0.0))

    @property
    def unit(self) -> nn.RNNBase:
        """The recurrence."""
        unit = self.get_submodule(self.kind)
        assert isinstance(unit, nn.RNNBase)
        return unit

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the stream's values [T, D] to hidden states [T, D] float32."""
        with torch.autocast(tokens.values.device.type, enabled=False):
            wide = torch.promote_types(tokens.values.dtype, torch.float32)
            return self._run(tokens.values.to(wide), tokens)

    def _run(self, x: Tensor, tokens: Tokens) -> Tensor:
        layout, total, history = tokens.layout, x.shape[0], tokens.layout.history
        sequence = sequence_ids(layout.offsets, total)
        place = positions_in_sequence(layout.offsets, total)
        is_history = place < history[sequence]
        # Longest first, as packed sequences want: step after step, without padding.
        rank = history.argsort(descending=True, stable=True).argsort()
        key = (place * history.numel() + rank[sequence]).masked_fill(~is_history, torch.iinfo(torch.int64).max)
        lengths = history.sort(descending=True).values.cpu()
        steps = torch.arange(int(lengths[0]) if lengths.numel() else 0)
        sizes = (lengths[:, None] > steps).sum(0)
        order = key.argsort(stable=True)
        past, candidates = order.split([int(sizes.sum()), total - int(sizes.sum())])
        # Also where there is nothing, so that the graph always reaches every weight.
        out = x + 0.0 * sum(p.sum() for p in self.parameters())
        state = [x.new_zeros(self.unit.num_layers, history.numel(), x.shape[1])] * (2 if self.kind == "lstm" else 1)
        if past.numel():
            packed, last = self.unit(PackedSequence(x[past], sizes))
            out = out.index_copy(0, past, packed.data)
            last = last if self.kind == "lstm" else (last,)
            state = [torch.cat([own, zeros[:, own.shape[1] :]], 1) for own, zeros in zip(last, state, strict=True)]
        if candidates.numel():
            of_candidate = [part[:, rank[sequence[candidates]]].contiguous() for part in state]
            stepped, _ = self.unit(x[candidates][None], tuple(of_candidate) if self.kind == "lstm" else of_candidate[0])
            out = out.index_copy(0, candidates, stepped[0])
        return out
