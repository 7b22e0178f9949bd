"""What ranking and retrieval share: tables, token stream, backbone, rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hstu.config import Config
from hstu.data.batch import Batch
from hstu.data.schema import Schema
from hstu.layers.cache import Cache, alone
from hstu.layers.memory import Part
from hstu.layers.mlp import initialize
from hstu.layers.positions import PositionEncoder, token_positions
from hstu.layers.postprocess import Postprocess
from hstu.layers.preprocess import Preprocess
from hstu.layers.tokens import Stream, Tokens
from hstu.models.backbone import make_backbone
from hstu.models.binding import fit_to_data, memory_blocks, model_inputs
from hstu.models.caching import extend
from hstu.models.embedding import Embeddings, EmbeddingTables
from hstu.models.feature_tokens import FeatureTokens
from hstu.models.item_encoder import make_item_encoder
from hstu.models.lookup import Lookup
from hstu.models.losses import LossSum
from hstu.models.tables import make_tables
from hstu.ops import Layout


class Encoder(nn.Module):
    """Base of the models: batch to the hidden rows that carry labels.

    Args:
        config: The run.
        schema: The data set.
        allocate_tables: False leaves the tables to ``parallelize``.
    """

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__()
        config = fit_to_data(config, schema)
        network, inputs = config.network, model_inputs(config, schema)
        self.embeddings: Embeddings = EmbeddingTables(make_tables(config, schema), allocate=allocate_tables)
        #: What stands for items beside, or in place of, rows of their own; whoever has the data sets its values.
        self.item_encoder = make_item_encoder(config, schema, inputs, self.embeddings.widths)
        #: What the tokens of events and users are made of.
        self.feature_tokens = FeatureTokens(config, schema, inputs, self.embeddings.widths)
        #: Dense weights with one row for each id of a feature, and the feature.
        self.row_weights: dict[str, str] = {}
        #: Vocabularies whose ids number some outputs of a weight.
        self.class_features: tuple[str, ...] = ()
        self.features = self.feature_tokens.names
        self.preprocess = Preprocess(
            network.hidden_size,
            self.feature_tokens.widths,
            item=inputs.item,
            action=inputs.action,
            contexts=inputs.contexts,
            layout=network.token_layout,
            positions=PositionEncoder(
                network.hidden_size,
                network.num_position_buckets or 0,
                scale_inputs=network.scale_inputs,
                std=network.embedding_initializer_std,
                positions_from_end=network.is_masked,
                num_time_buckets=network.num_time_buckets,
                time_bucket_fn=network.time_bucket_fn,
                time_bucket_of=network.time_bucket_of,
                dropout=network.input_dropout,
            ),
            max_tokens=inputs.max_tokens,
            memory=memory_blocks(config),
        )
        #: Chooses the rows of a stream that are local; ``parallelize`` sets it.
        self.shard: Callable[[Stream], Stream] = lambda stream: stream
        self.backbone = make_backbone(network, inputs.max_tokens, with_candidates=config.dataset.max_num_candidates > 0)
        norm = network.output_norm
        eps = config.retrieval.l2_norm_eps if config.retrieval and norm == "l2" else network.norm_epsilon
        self.postprocess = Postprocess(network.hidden_size, norm, eps, last_token=config.task == "retrieval")
        self.autocast_dtype = torch.bfloat16 if network.dtype_str == "bfloat16" else None
        self.residual_dtype = torch.bfloat16 if network.residual_dtype_str == "bfloat16" else None
        own = (self.preprocess,) if network.is_hugging_face or network.is_custom else (self.preprocess, self.backbone)
        for part in own:
            initialize(part, network.dense_initializer_type, network.dense_initializer_normal_std)

    def forward(self, batch: Batch) -> LossSum:
        """Return the loss of ``batch`` as the loader gives it; its parts are for whoever does something in between."""
        request = self.request(self.training_batch(batch))
        return self.loss(self.embeddings(request.features), request)

    def training_batch(self, batch: Batch) -> Batch:
        """Return ``batch``, which is in host memory, with the labels that training predicts."""
        return batch

    def request(self, batch: Batch) -> Lookup:
        """Return what the loss of ``batch``, from ``training_batch``, asks of the tables."""
        raise NotImplementedError

    def scoring_request(self, batch: Batch) -> Lookup:
        """Return what the scores of the labelled events of ``batch``, as the loader gives it, ask of the tables."""
        raise NotImplementedError

    def loss(self, found: dict[str, Tensor], request: Any) -> LossSum:
        """Return the loss, from the rows that the tables ``found`` for what is in ``request.features``."""
        raise NotImplementedError

    def lay_out(self, batch: Batch) -> Stream:
        """Lay out the tokens of ``batch``, and say which of them are local."""
        return self.shard(self.whole_stream(batch))

    def whole_stream(self, batch: Batch, part: Part | None = None) -> Stream:
        """Lay out the tokens of ``batch``, whoever has which; ``part`` of its samples, None for all of them."""
        lengths, sizes = self.feature_tokens.lengths(batch, has_context=part is None or part.context is None)
        return self.preprocess.stream(lengths, sizes, batch.num_candidates, batch.timestamps, part, batch.recent)

    def token_layout(self, batch: Batch) -> Layout:
        """Return where the tokens of ``batch``, in host memory, lie; a whole stream is laid out for memory alone."""
        if self.preprocess.blocks is not None:
            return self.whole_stream(batch).layout
        return self.preprocess.layout_of(self.feature_tokens.lengths(batch)[0], batch.num_candidates)

    def local_labels(self, batch: Batch, stream: Stream, predicting: Tensor) -> tuple[Batch, Tensor]:
        """Return ``batch`` with the labels that are predicted in local rows, and these rows.

        Args:
            batch: The batch.
            stream: Of the batch.
            predicting: [L] int64. The event in whose row each label is predicted.
        """
        rows = self.postprocess.rows(stream, predicting)
        if stream.local is None:
            return batch, rows
        own = rows >= 0
        return batch.with_labels(batch.label_events[own], batch.labels[own]), rows[own]

    def values(self, batch: Batch, stream: Stream, pool: Tensor | None = None) -> Batch:
        """Return what the local tokens and the item ids ``pool`` are made of: ids to look up, and numbers."""
        values = self.feature_tokens.values(batch, stream)
        values = values if pool is None else values.with_pool(pool)
        if self.item_encoder is None:
            return values
        return replace(values, features=self.item_encoder.beside(values.features, batch.step))

    def join(self, found: dict[str, Tensor], values: Batch) -> dict[str, Tensor]:
        """Return the rows ``found`` of each key of ``values``, [n, width], items as the one vector of each."""
        return found if self.item_encoder is None else self.item_encoder.merged(found, values.features)

    def token_vectors(self, embedded: dict[str, Tensor], request: Lookup) -> dict[str, Tensor]:
        """Return the vectors of the local tokens of each token feature, [n, width]."""
        vectors: dict[str, Tensor] = self.feature_tokens(embedded, request.values, request.stream)
        return vectors

    def encode(self, embedded: dict[str, Tensor], request: Lookup) -> Tensor:
        """Return the local rows that carry labels, [L, D] float32."""
        return self._encode(embedded, request, self.backbone)

    def encode_behind(self, cache: Cache | None, embedded: dict[str, Tensor], request: Lookup) -> tuple[Tensor, Cache]:
        """Return what ``encode`` does, where the local rows are the new ones behind ``cache``; and the longer cache."""
        after: list[Cache] = []

        def run(tokens: Tokens) -> Tensor:
            hidden, longer = self.backbone.extend(cache, alone(tokens, token_positions(tokens)))  # type: ignore[operator]
            after.append(longer)
            out: Tensor = hidden
            return out

        return self._encode(embedded, request, run), after[0]

    def _encode(self, embedded: dict[str, Tensor], request: Lookup, backbone: Callable[[Tokens], Tensor]) -> Tensor:
        return self.run(self.token_vectors(embedded, request), request.stream, request.rows, backbone)

    def run(
        self, vectors: dict[str, Tensor], stream: Stream, rows: Tensor, backbone: Callable[[Tokens], Tensor]
    ) -> Tensor:
        """Return ``rows`` [n] of the hidden states over the local tokens' ``vectors``, [n, D] float32."""
        with torch.autocast(rows.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            tokens = self.preprocess(vectors, stream)
            if self.residual_dtype is not None:
                tokens = tokens.with_values(tokens.values.to(self.residual_dtype))
            hidden = backbone(tokens)
        out: Tensor = self.postprocess(hidden, rows)
        return out

    def extend(self, cache: Cache | None, batch: Batch, *, history_alone: bool = False) -> tuple[Tensor, Cache]:
        """Run over what ``batch`` has beyond ``cache``; see :func:`hstu.models.caching.extend`."""
        return extend(self, cache, batch, history_alone=history_alone)

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens that ``batch`` makes, without asking the device."""
        _, sizes = self.feature_tokens.lengths(batch)
        action = self.preprocess.action
        if action is not None and self.preprocess.layout in ("add", "concat"):
            sizes.pop(action)
        blocks = self.preprocess.blocks
        memory = 0 if blocks is None else blocks.num_tokens * batch.num_samples
        return memory + sum(sizes.values())
