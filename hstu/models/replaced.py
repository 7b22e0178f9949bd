"""Retrieval by masked items that also learns to tell which ones a guess has replaced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config import Config
from hstu.data.batch import Batch
from hstu.data.schema import Schema
from hstu.layers.mlp import initialize
from hstu.models.lookup import RetrievalLookup
from hstu.models.losses import LossSum, SampledCandidates, candidate_scores
from hstu.models.masked import MaskedRetrievalModel
from hstu.models.negatives import random_uniform
from hstu.models.retrieval import RetrievalModel
from hstu.ops import lengths_to_offsets, sequence_ids

_CHUNK_ELEMENTS = 1 << 22  # scores that are drawn from at once


@dataclass(frozen=True, kw_only=True)
class ReplacedLookup(RetrievalLookup):
    """A lookup of hidden events, and what each event of a sample weighs.

    Attributes:
        weights: [B] float32, hidden events of a sample over its events.
    """

    weights: Tensor


class ReplacedRetrievalModel(MaskedRetrievalModel):
    """Replaced-token detection (https://arxiv.org/abs/2003.10555) with one encoder for both parts.

    The generator is the masked model. In place of each hidden event stands an item drawn from its softmax over the pool
    and the hidden item itself; the encoder runs once more, and a linear layer tells of every event whether its item was
    replaced. No gradient passes through the draw. The binary cross-entropy of a sample is the mean over its events, and
    counts once for each hidden one: the mean over labels is that of the generator plus ``replaced_weight`` times it.
    """

    passes = 2

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__(config, schema, allocate_tables=allocate_tables)
        self.discriminator = nn.Linear(config.network.hidden_size, 1)
        initialize(self.discriminator, "xavier_uniform", 0.0)

    def request(self, batch: Batch) -> ReplacedLookup:
        lengths = batch.lengths(self.item)
        owner = sequence_ids(lengths_to_offsets(lengths), batch.num_events)[batch.label_events]
        hidden = torch.zeros_like(lengths).index_add(0, owner, torch.ones_like(owner))
        return ReplacedLookup(**vars(super().request(batch)), weights=hidden.float() / lengths.clamp(min=1))

    def loss(self, found: dict[str, Tensor], request: RetrievalLookup) -> LossSum:
        assert isinstance(request, ReplacedLookup)
        embedded = self.join(found, request.values)
        sampled = self.sampled(embedded, request)
        generator = self._loss(sampled, request.live)
        drawn, is_replaced = self.replacements(sampled, embedded, request)
        logits, events = self.judge(embedded | {self.item: drawn}, request)
        truth = torch.zeros(request.batch.num_events, dtype=torch.bool, device=logits.device)
        truth = truth.index_copy(0, request.targets, is_replaced)
        owner = sequence_ids(lengths_to_offsets(request.batch.lengths(self.item)), request.batch.num_events)
        losses = F.binary_cross_entropy_with_logits(logits, truth[events].to(logits.dtype), reduction="none")
        total = generator.total + self.args.replaced_weight * (request.weights[owner[events]] * losses).sum()
        return LossSum(total=total, count=generator.count, live_negatives=generator.live_negatives)

    def judge(self, embedded: dict[str, Tensor], request: RetrievalLookup) -> tuple[Tensor, Tensor]:
        """Return the logits that the items of events are not the true ones, and which local events these are, [e]."""
        events = torch.arange(request.batch.num_events, device=request.rows.device)
        rows = self.postprocess.rows(request.stream, events)
        if request.stream.local is not None:
            events, rows = events[rows >= 0], rows[rows >= 0]
        vectors = RetrievalModel.token_vectors(self, embedded, request)  # nothing is hidden
        hidden = self.run(vectors, request.stream, rows, self.backbone)
        return self.discriminator(hidden).squeeze(1), events

    def replacements(
        self, sampled: SampledCandidates, embedded: dict[str, Tensor], request: RetrievalLookup
    ) -> tuple[Tensor, Tensor]:
        """Return the items of the local events with a drawn one for each hidden one, and which of these differ, [L]."""
        positive, pool = self.looked_up(embedded, request)
        place, is_replaced = self.draw(sampled, self.keys(request.batch))
        drawn = torch.where(is_replaced[:, None], pool[place], positive)
        items, at = embedded[self.item], request.targets
        if request.stream.local is not None:
            at = request.stream.is_local(self.item).long().cumsum(0)[at] - 1
        return items.index_copy(0, at, drawn.to(items.dtype)), is_replaced

    @torch.no_grad()
    def draw(self, sampled: SampledCandidates, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a place in the pool for each label from the softmax of its scores, and whether it is another item.

        Args:
            sampled: Labels and pool.
            keys: [L] int64, an identity of each label that no layout of ranks changes.
        """
        sampled, temperature = self.tempered(sampled)
        columns = sampled.columns
        per_row = sampled.pool.shape[0] if columns is None else columns.shape[1]
        places, replaced = [keys[:0]], [keys[:0] > 0]
        for start in range(0, keys.numel(), step := max(1, _CHUNK_ELEMENTS // max(1, per_row))):
            rows = slice(start, start + step)
            part = sampled.rows(start, start + step)
            right, wrong, live = candidate_scores(part, self.similarity, temperature)
            scores = torch.cat([right[:, None], wrong.masked_fill(~live, -torch.inf)], 1).double()
            uniform = random_uniform(keys[rows], scores.shape[1], self.seed + 3 * 2**40)
            # Of the Gumbel distribution: the largest sum is a draw from the softmax.
            place = (scores - (-uniform.clamp(min=2**-53).log()).log()).argmax(1) - 1
            replaced.append(place >= 0)
            place = place.clamp(min=0)
            places.append(place if columns is None else columns[rows].gather(1, place[:, None]).squeeze(1))
        return torch.cat(places), torch.cat(replaced)
