"""Generative retrieval: the next item, told apart from sampled or all items."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.config import Config, RetrievalArgs
from hstu.config.retrieval import LOSSES
from hstu.data.batch import POOL, Batch
from hstu.data.schema import Schema
from hstu.layers.mlp import initialize
from hstu.layers.similarity import DotProduct, MixtureOfLogits
from hstu.models.custom import custom_loss
from hstu.models.encoder import Encoder
from hstu.models.lookup import RetrievalLookup
from hstu.models.losses import PAIRWISE, LossSum, SampledCandidates, binary_loss, scored_loss, softmax_loss
from hstu.models.negatives import NegativeSampler, other_item
from hstu.ops import lengths_to_offsets, sequence_ids, sequences_and_positions


class RetrievalModel(Encoder):
    """Embeddings (of the batch and of the pool of negatives), preprocess, backbone, postprocess, similarity, loss."""

    #: Times that a training step runs the backbone.
    passes = 1

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
        self.temperature = Temperature(self.args.temperature) if self.args.learned_temperature else None
        self.item_bias = ItemBias(self.num_items) if self.args.item_bias else None
        if self.item_bias is not None:
            self.row_weights["item_bias.weight"] = self.item
        self.sampler = NegativeSampler(self.args.negatives, self.num_items, self.args.num_negatives, self.seed)

    def training_batch(self, batch: Batch) -> Batch:
        return self.with_shared_pool(batch)

    def with_shared_pool(self, batch: Batch) -> Batch:
        """Return ``batch`` with the labels of all ranks as pool, where that is so: a device would be waited for."""
        if self.args.loss == "bce" or self.sampler.strategy != "in_batch":
            return batch
        return replace(batch, pool=self.sampler.pool(batch.labels, batch.step))

    def request(self, batch: Batch) -> RetrievalLookup:
        stream = self.lay_out(batch)
        labelled, rows = self.local_labels(batch, stream, self.predicting(batch))
        keys, live = self.keys(labelled), None
        if self.args.loss == "bce":
            pool_ids, live = self._other_item(labelled, keys)
            columns: Tensor | None = torch.arange(len(pool_ids), device=pool_ids.device)[:, None]
        else:
            pool_ids = self.sampler.pool(labelled.labels, batch.step) if batch.pool is None else batch.pool
            columns = self.sampler.columns(keys, self.sampler.drawable(pool_ids, batch.step))
        # A label is an item of the batch, whose embedding is at hand, unless it is in the row of another rank.
        looked_up = pool_ids if stream.local is None else torch.cat([labelled.labels, pool_ids])
        return RetrievalLookup(
            batch=labelled,
            stream=stream,
            rows=rows,
            values=self.values(batch, stream, looked_up),
            targets=self.targets(labelled),
            pool_ids=pool_ids,
            columns=columns,
            live=live,
        )

    def scoring_request(self, batch: Batch) -> RetrievalLookup:
        stream = self.lay_out(batch)
        labelled, rows = self.local_labels(batch, stream, self.predicting(batch))
        none = batch.labels[:0]
        values, targets = self.values(batch, stream, none), self.targets(labelled)
        return RetrievalLookup(batch=labelled, stream=stream, rows=rows, values=values, targets=targets, pool_ids=none)

    def loss(self, found: dict[str, Tensor], request: RetrievalLookup) -> LossSum:
        return self._loss(self.sampled(self.join(found, request.values), request), request.live)

    def sampled(self, embedded: dict[str, Tensor], request: RetrievalLookup) -> SampledCandidates:
        """Return the local labels, and what they are to be told apart from."""
        positive, pool = self.looked_up(embedded, request)
        labels, closest, units = request.batch.labels, self.args.closest_negative, None
        if closest is not None:
            units = F.normalize(positive.detach().float(), dim=1), F.normalize(pool.detach().float(), dim=1)
        return SampledCandidates(
            query=self.query_vectors(self.encode(embedded, request)),
            positive=self.item_vectors(positive, labels),
            positive_ids=labels,
            pool=self.item_vectors(pool, request.pool_ids),
            pool_ids=request.pool_ids,
            columns=request.columns,
            units=units,
            closest=1.0 if closest is None else closest,
            counted=request.counted,
            stocked=request.stocked,
        )

    def looked_up(self, embedded: dict[str, Tensor], request: RetrievalLookup) -> tuple[Tensor, Tensor]:
        """Return the embeddings of the labels' items [L, width] and of the pool [P, width]."""
        pool = embedded[POOL]
        if request.stream.local is None:
            return embedded[self.item][request.targets], pool
        positive, pool = pool.split([request.batch.labels.numel(), request.pool_ids.numel()])
        return positive, pool

    def queries(self, request: RetrievalLookup) -> Tensor:
        """Return what scores the item of each label, [L, ..] float32."""
        embedded = self.join(self.embeddings(request.features), request.values)
        return self.query_vectors(self.encode(embedded, request))

    def predicting(self, batch: Batch) -> Tensor:
        """Return the event in whose row each label is predicted, [L] int64."""
        return batch.label_events

    def targets(self, batch: Batch) -> Tensor:
        """Return the event that each label is the item of, [L] int64."""
        return batch.label_events + 1

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
        values = self.values(batch, self.lay_out(batch), ids)
        return self.item_vectors(self.join(self.embeddings(values.features), values)[POOL], ids)

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Score ``queries`` [L, ..] against ``items`` [n, ..]: [L, n] float32."""
        return self.similarity.scores(queries, items)

    def tempered(self, sampled: SampledCandidates) -> tuple[SampledCandidates, float | Tensor]:
        """Return ``sampled``, and what divides its scores: a learned temperature is in the queries of dot products."""
        if self.temperature is None:
            return sampled, self.args.temperature
        learned: Tensor = self.temperature()
        if isinstance(self.similarity, DotProduct):
            return replace(sampled, query=sampled.query / learned), 1.0
        return sampled, learned

    def _loss(self, sampled: SampledCandidates, live: Tensor | None) -> LossSum:
        sampled, temperature = self.tempered(sampled)
        loss = self._loss_at(temperature, sampled, live)
        if isinstance(temperature, Tensor):  # so that the graph reaches it without labels too
            loss = replace(loss, total=loss.total + 0.0 * temperature.sum())
        return loss

    def _loss_at(self, temperature: float | Tensor, sampled: SampledCandidates, live: Tensor | None) -> LossSum:
        if live is not None:
            return binary_loss(sampled, live, self.similarity, temperature=temperature)
        if self.args.loss in PAIRWISE:
            losses = partial(PAIRWISE[self.args.loss], **self.args.loss_options)
            return scored_loss(sampled, self.similarity, losses, temperature=temperature)
        if self.args.loss not in LOSSES:
            return custom_loss(self.args, sampled, self.similarity, temperature=temperature)
        if self.args.logq_correction:
            log_q = self.sampler.log_q(sampled.positive_ids), self.sampler.log_q(sampled.pool_ids)
            sampled = replace(sampled, log_q=log_q)
        return softmax_loss(
            sampled,
            self.similarity,
            temperature=temperature,
            label_smoothing=self.args.label_smoothing,
            mutual_information_weight=self.args.mol_mutual_information,
        )

    def keys(self, batch: Batch) -> Tensor:
        """Return an identity of each label token that no layout of ranks changes, [L] int64."""
        offsets = lengths_to_offsets(batch.lengths(self.item))
        owner, place = sequences_and_positions(offsets, batch.num_events)
        keys = batch.sample_ids[owner] * 2**20 + place
        return keys[batch.label_events]

    def _other_item(self, batch: Batch, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one item for each label token that its user has not, or that is not in its sample."""
        owner = sequence_ids(lengths_to_offsets(batch.lengths(self.item)), batch.num_events)
        samples, whole = owner[batch.label_events], batch.whole_history
        holder, items = (owner, batch.ids(self.item)) if whole is None else whole
        return other_item(keys, samples, items, holder, self.num_items, self.seed)


class Temperature(nn.Module):
    """A learned temperature, within [0.01, 1] (CLIP, https://arxiv.org/abs/2103.00020).

    Args:
        start: Where it begins.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(start)))

    def forward(self) -> Tensor:
        """Return the temperature, [1]."""
        return (-self.log_scale.clamp(0.0, math.log(100))).exp()


class ItemBias(nn.Module):
    """What is added to the scores of each item, learned from zero."""

    def __init__(self, num_items: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_items))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the biases of items ``ids`` [n], [n, 1]."""
        return self.weight[ids, None]


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
