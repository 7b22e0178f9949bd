"""Retrieval by masked items: BERT4Rec, trained on items hidden anywhere, asked for the one after the history."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hstu.config import Config
from hstu.data.batch import Batch
from hstu.data.schema import Schema
from hstu.models.lookup import Lookup, RetrievalLookup
from hstu.models.negatives import random_uniform
from hstu.models.retrieval import RetrievalModel
from hstu.ops import lengths_to_offsets, positions_in_sequence, sequence_ids


class MaskedRetrievalModel(RetrievalModel):
    """Predicts items that a learned vector stands for, from what is on both sides (https://arxiv.org/abs/1904.06690).

    Evaluation hides the one event after the history, so that rows see what those of a causal model see. Training
    hides only events that a causal model would be trained to predict.
    """

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__(config, schema, allocate_tables=allocate_tables)
        #: The vector that stands for an item to be predicted.
        self.mask_token = nn.Embedding(1, config.network.item_embedding_dim)
        nn.init.normal_(self.mask_token.weight, std=config.network.embedding_initializer_std)

    def training_batch(self, batch: Batch) -> Batch:
        """Hide each event with ``mask_probability``, or the last one of its sample alone."""
        hidden = self._hidden(batch).nonzero().squeeze(1)
        return self.with_shared_pool(batch.with_labels(hidden, batch.ids(self.item)[hidden]))

    def scoring_request(self, batch: Batch) -> RetrievalLookup:
        """Hide the event after the one labelled one of each sample."""
        assert batch.labels.numel() <= batch.num_samples, "of several events at once each would miss the others"
        return super().scoring_request(batch.with_labels(batch.label_events + 1, batch.labels))

    def targets(self, batch: Batch) -> Tensor:
        """Return the labelled events themselves: each is predicted where it is hidden."""
        return batch.label_events

    def token_vectors(self, embedded: dict[str, Tensor], request: Lookup) -> dict[str, Tensor]:
        """Return the vectors of the local tokens; of the targets nobody sees the item and the features."""
        assert isinstance(request, RetrievalLookup)
        vectors = super().token_vectors(embedded, request)
        items = vectors[self.item]
        hidden = torch.zeros(request.batch.num_events, dtype=torch.bool, device=items.device)
        hidden = hidden.index_fill(0, request.targets, True)
        here = hidden if request.stream.local is None else hidden[request.stream.is_local(self.item)]
        seen = torch.where(here[:, None], self.mask_token.weight.to(items.dtype), items)
        return vectors | {self.item: seen}

    def _hidden(self, batch: Batch) -> Tensor:
        """Return which events are hidden, [E] bool: a function of the seed and the samples, not of the rank."""
        total = batch.num_events
        offsets = lengths_to_offsets(batch.lengths(self.item))
        owner, index = sequence_ids(offsets, total), torch.arange(total, device=offsets.device)
        allowed = torch.zeros(total, dtype=torch.bool).index_fill(0, batch.label_events + 1, True)
        drawn = allowed & self._drawn(batch, offsets, owner)
        some = torch.zeros_like(batch.sample_ids).index_add(0, owner, drawn.long()) > 0
        none = torch.full_like(batch.sample_ids, -1)
        last = none.scatter_reduce(0, owner, torch.where(allowed, index, -1), "amax")
        last_alone = ~some | (self._uniform(batch.sample_ids, 2) < self.args.mask_last_probability)
        return torch.where(last_alone[owner], index == last[owner], drawn)

    def _drawn(self, batch: Batch, offsets: Tensor, owner: Tensor) -> Tensor:
        """Return which events a sample would hide, were they all allowed, [E] bool."""
        keys = batch.sample_ids[owner] * 2**20 + positions_in_sequence(offsets, batch.num_events)
        return self._uniform(keys, 1) < self.args.mask_probability

    def _uniform(self, keys: Tensor, purpose: int) -> Tensor:
        """Draw a number in [0, 1) for each key; another ``purpose`` draws others, none those of the negatives."""
        return random_uniform(keys, 1, self.seed + purpose * 2**40).squeeze(1)
