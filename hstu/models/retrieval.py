"""Generative retrieval: the next item, by softmax over sampled or all items."""

from __future__ import annotations

from torch import Tensor

from hstu.config import Config
from hstu.data.batch import POOL, Batch
from hstu.data.schema import Schema
from hstu.layers.postprocess import l2_normalize
from hstu.models.encoder import Encoder
from hstu.models.losses import LossSum, softmax_loss
from hstu.models.negatives import NegativeSampler
from hstu.ops import lengths_to_offsets, positions_in_sequence, sequence_ids


class RetrievalModel(Encoder):
    """Embeddings (of the batch and of the pool of negatives), preprocess, backbone, postprocess, softmax loss."""

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__(config, schema, allocate_tables=allocate_tables)
        assert config.retrieval is not None
        args = config.retrieval
        self.item = schema.item.name
        self.num_items = schema.item.vocab_size or 0
        self.temperature, self.eps = args.temperature, args.l2_norm_eps
        self.normalize_items = self.postprocess.norm == "l2"
        self.sampler = NegativeSampler(args.negatives, self.num_items, args.num_negatives, config.trainer.seed)
        width = self.embeddings.widths[self.item]
        if width != config.network.hidden_size:
            raise config.network.error("item_embedding_dim", "retrieval scores hidden states against items: use -1")

    def forward(self, batch: Batch) -> LossSum:
        """Return the loss of the labelled events."""
        pool_ids = self.sampler.pool(batch.labels, batch.step)
        embedded = self.embeddings(batch.with_pool(pool_ids).features)
        query = self.encode(embedded, batch)
        # The item after a labelled event is its label, and its embedding is already at hand.
        following = batch.label_mask.nonzero().squeeze(1) + 1
        return softmax_loss(
            query,
            self.item_vectors(embedded[self.item][following]),
            batch.labels,
            self.item_vectors(embedded[POOL]),
            pool_ids,
            temperature=self.temperature,
            columns=self.sampler.columns(self._keys(batch), pool_ids.numel()),
        )

    def queries(self, batch: Batch) -> Tensor:
        """Return the vector that scores the item after each labelled event, [L, D] float32."""
        embedded = self.embeddings(batch.with_pool(batch.labels[:0]).features)
        return self.encode(embedded, batch)

    def item_vectors(self, embedded: Tensor) -> Tensor:
        """Return items as training and evaluation score them, [n, D] float32."""
        embedded = embedded.float()
        return l2_normalize(embedded, self.eps) if self.normalize_items else embedded

    def catalogue_vectors(self, batch: Batch, ids: Tensor) -> Tensor:
        """Return the vectors of items ``ids`` [n], [n, D] float32; ``batch`` lends its features."""
        return self.item_vectors(self.embeddings(batch.with_pool(ids).features)[POOL])

    def _keys(self, batch: Batch) -> Tensor:
        """Return an identity of each label token that no layout of ranks changes, [L] int64."""
        offsets = lengths_to_offsets(batch.lengths(self.item))
        total = batch.label_mask.numel()
        sample = batch.sample_ids[sequence_ids(offsets, total)]
        keys = sample * 2**20 + positions_in_sequence(offsets, total)
        return keys[batch.label_mask]
