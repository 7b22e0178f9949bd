"""Generative retrieval: the next item, told apart from sampled or all items."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from hstu.config import Config, RetrievalArgs
from hstu.data.batch import POOL, Batch
from hstu.data.schema import Schema
from hstu.layers.mlp import initialize
from hstu.layers.similarity import DotProduct, MixtureOfLogits
from hstu.models.encoder import Encoder
from hstu.models.losses import LossSum, SampledCandidates, binary_loss, softmax_loss
from hstu.models.negatives import NegativeSampler, other_item
from hstu.ops import lengths_to_offsets, positions_in_sequence, sequence_ids


class RetrievalModel(Encoder):
    """Embeddings (of the batch and of the pool of negatives), preprocess, backbone, postprocess, similarity, loss."""

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__(config, schema, allocate_tables=allocate_tables)
        assert config.retrieval is not None
        self.args, self.seed = config.retrieval, config.trainer.seed
        self.item = schema.item.name
        self.num_items = schema.item.vocab_size or 0
        hidden, width = config.network.hidden_size, config.network.item_embedding_dim
        #: From hidden rows to the width of items, where that is another one.
        self.to_items = nn.Linear(hidden, width) if width != hidden else nn.Identity()
        self.similarity = make_similarity(self.args, width, self.postprocess.norm, projected=width != hidden)
        for part in (self.to_items, self.similarity):
            initialize(part, "xavier_uniform", 0.0)
        self.item_bias = ItemBias(self.num_items) if self.args.item_bias else None
        if self.item_bias is not None:
            self.row_weights["item_bias.weight"] = self.item
        self.sampler = NegativeSampler(self.args.negatives, self.num_items, self.args.num_negatives, self.seed)

    def forward(self, batch: Batch) -> LossSum:
        """Return the loss of the labelled events."""
        full, targets = self.training_targets(batch)
        batch = self.only_local(full, self.predicting(full, targets))
        keys, live = self.keys(batch), None
        if self.args.loss == "bce":
            drawn, live = self._other_item(batch, keys)
            pool_ids, places = drawn.unique(return_inverse=True)
            columns: Tensor | None = places[:, None]
        else:
            pool_ids = self.sampler.pool(batch.labels, batch.step)
            columns = self.sampler.columns(keys, self.sampler.drawable(pool_ids, batch.step))
        embedded, positive, pool = self._look_up_all(batch, targets, pool_ids)
        sampled = SampledCandidates(
            query=self.query_vectors(self.rows(embedded, full, targets)),
            positive=self.item_vectors(positive, batch.labels),
            positive_ids=batch.labels,
            pool=self.item_vectors(pool, pool_ids),
            pool_ids=pool_ids,
            columns=columns,
        )
        return self._loss(sampled, live)

    def queries(self, batch: Batch) -> Tensor:
        """Return what scores the item after each labelled event, [L, ..] float32."""
        embedded = self.look_up(batch, batch.labels[:0])
        return self.query_vectors(self.rows(embedded, batch, following(batch)))

    def local_labels(self, batch: Batch) -> Batch:
        return self.only_local(batch, self.predicting(batch, following(batch)))

    def training_targets(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Return the batch with what training predicts as labels, and the events that are predicted, [L] int64."""
        return batch, following(batch)

    def predicting(self, batch: Batch, targets: Tensor) -> Tensor:
        """Return the events in whose rows the events ``targets`` [L] are predicted, [E] bool."""
        return batch.label_mask

    def rows(self, embedded: dict[str, Tensor], batch: Batch, targets: Tensor) -> Tensor:
        """Return the local hidden rows that predict the events ``targets``, [L, D] float32."""
        return self.encode(embedded, batch)

    def query_vectors(self, rows: Tensor) -> Tensor:
        """Return hidden rows [L, D] as training and evaluation score them, [L, ..] float32."""
        out: Tensor = self.similarity.queries(self.to_items(rows))
        return out if self.item_bias is None else torch.cat([out, torch.ones_like(out[:, :1])], 1)

    def item_vectors(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """Return items ``ids`` [n] as training and evaluation score them, [n, ..] float32."""
        out: Tensor = self.similarity.items(embedded.float())
        return out if self.item_bias is None else torch.cat([out, self.item_bias(ids)], 1)

    def catalogue_vectors(self, batch: Batch, ids: Tensor) -> Tensor:
        """Return items ``ids`` [n] as they are scored, [n, ..] float32; ``batch`` lends its features."""
        return self.item_vectors(self.embed(batch.with_pool(ids).features, batch.step)[POOL], ids)

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Score ``queries`` [L, ..] against ``items`` [n, ..]: [L, n] float32."""
        return self.similarity.scores(queries, items)

    def _look_up_all(self, batch: Batch, targets: Tensor, pool_ids: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the embeddings of the features, of the labels, and of the pool, from one lookup."""
        if self.stream(batch).local is None:
            # Labels are items of the batch: their embeddings are already at hand.
            embedded = self.look_up(batch, pool_ids)
            return embedded, embedded[self.item][targets], embedded[POOL]
        embedded = self.look_up(batch, torch.cat([batch.labels, pool_ids]))
        positive, pool = embedded[POOL].split([batch.labels.numel(), pool_ids.numel()])
        return embedded, positive, pool

    def _loss(self, sampled: SampledCandidates, live: Tensor | None) -> LossSum:
        if live is not None:
            return binary_loss(sampled, live, self.similarity, temperature=self.args.temperature)
        if self.args.logq_correction:
            log_q = self.sampler.log_q(sampled.positive_ids), self.sampler.log_q(sampled.pool_ids)
            sampled = replace(sampled, log_q=log_q)
        return softmax_loss(
            sampled,
            self.similarity,
            temperature=self.args.temperature,
            label_smoothing=self.args.label_smoothing,
            mutual_information_weight=self.args.mol_mutual_information,
        )

    def keys(self, batch: Batch) -> Tensor:
        """Return an identity of each label token that no layout of ranks changes, [L] int64."""
        offsets = lengths_to_offsets(batch.lengths(self.item))
        total = batch.label_mask.numel()
        sample = batch.sample_ids[sequence_ids(offsets, total)]
        keys = sample * 2**20 + positions_in_sequence(offsets, total)
        return keys[batch.label_mask]

    def _other_item(self, batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one item for each label token that its user has not, or that is not in its sample."""
        owner = sequence_ids(lengths_to_offsets(batch.lengths(self.item)), batch.label_mask.numel())
        samples, whole = owner[batch.label_mask], batch.whole_history
        holder, items = (owner, batch.ids(self.item)) if whole is None else whole
        return other_item(keys, samples, items, holder, self.num_items, self.seed)


class ItemBias(nn.Module):
    """What is added to the scores of each item, learned from zero."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_items))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the biases of items ``ids`` [n], [n, 1]."""
        return self.weight[ids, None]


def following(batch: Batch) -> Tensor:
    """Return the event after each labelled one, whose item is its label: [L] int64."""
    return batch.label_mask.nonzero().squeeze(1) + 1


def make_similarity(
    args: RetrievalArgs, width: int, output_norm: str, *, projected: bool = False
) -> DotProduct | MixtureOfLogits:
    """Return the similarity of ``args`` for vectors of ``width``.

    In a dot product items follow the norm of the hidden rows, and so do rows that were ``projected`` since.
    """
    if args.similarity == "mol":
        return MixtureOfLogits(
            width,
            query_groups=args.mol_query_groups,
            item_groups=args.mol_item_groups,
            channels=args.mol_channels,
            gate_channels=args.mol_gate_channels,
            dropout=args.mol_dropout,
            eps=args.l2_norm_eps,
        )
    cosine = args.similarity == "cosine"
    unit = cosine or output_norm == "l2"
    return DotProduct(normalize_queries=cosine or (unit and projected), normalize_items=unit, eps=args.l2_norm_eps)
