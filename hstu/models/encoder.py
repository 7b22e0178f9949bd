"""What ranking and retrieval share: tables, token stream, backbone, rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hstu.config import Config
from hstu.data.batch import Batch, KeyedJaggedTensor
from hstu.data.schema import Schema, unknown_id
from hstu.layers.mlp import initialize
from hstu.layers.positions import PositionEncoder
from hstu.layers.postprocess import Postprocess
from hstu.layers.preprocess import Preprocess
from hstu.layers.tokens import Stream
from hstu.models.backbone import make_backbone
from hstu.models.binding import fit_to_data, item_categories, make_tables, memory_blocks, model_inputs
from hstu.models.embedding import Embeddings, EmbeddingTables, ItemCategories


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
        categories = item_categories(config, schema)
        #: What stands for items beside, or in place of, rows of their own; whoever has the data sets its ids.
        self.categories = None
        if categories:
            unknown = {name: unknown_id(schema, name) for name in categories}
            rate, seed = config.feature.unknown_rate, config.trainer.seed
            self.categories = ItemCategories(inputs.item, unknown, schema.item.vocab_size or 0, rate, seed)
        #: Dense weights with one row for each id of a feature, and the feature.
        self.row_weights: dict[str, str] = {}
        #: Vocabularies whose ids number some outputs of a weight.
        self.class_features: tuple[str, ...] = ()
        self.features = (*inputs.contexts, inputs.item, *([inputs.action] if inputs.action else []))
        widths = {inputs.item: network.item_embedding_dim} | self.embeddings.widths
        self.preprocess = Preprocess(
            network.hidden_size,
            {name: width for name, width in widths.items() if name in self.features},
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
        own = (self.preprocess,) if network.is_hugging_face else (self.preprocess, self.backbone)
        for part in own:
            initialize(part, network.dense_initializer_type, network.dense_initializer_normal_std)

    def embed(self, features: KeyedJaggedTensor, step: int) -> dict[str, Tensor]:
        """Look up every feature, items as ``NetworkArgs.item_embedding`` says: name -> [ids of the feature, width]."""
        if self.categories is None:
            found: dict[str, Tensor] = self.embeddings(features)
            return found
        return self.categories.merged(self.embeddings(self.categories.beside(features, step)))

    def stream(self, batch: Batch) -> Stream:
        """Lay out the tokens of ``batch``, and which of them are local; the batch keeps the answer."""
        return batch.keep(self, lambda: self.shard(self.whole_stream(batch)))

    def whole_stream(self, batch: Batch) -> Stream:
        """Lay out the tokens of ``batch``, whoever has which."""
        lengths = {name: batch.lengths(name) for name in self.features}
        sizes = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
        return self.preprocess.stream(lengths, sizes, batch.num_candidates, batch.timestamps)

    def local_labels(self, batch: Batch) -> Batch:
        """Return ``batch`` with only the labels whose rows are local: those that its scores are for."""
        return self.only_local(batch, batch.label_mask)

    def only_local(self, batch: Batch, predicting: Tensor) -> Batch:
        """Return ``batch`` with only the labels whose event in ``predicting`` [E] bool, one a label, is local."""
        stream = self.stream(batch)
        if stream.local is None:
            return batch
        own = stream.places(self.postprocess.rows(stream, predicting)) >= 0
        mask = torch.zeros_like(batch.label_mask).index_fill(0, batch.label_mask.nonzero().squeeze(1)[own], True)
        return batch.with_labels(mask, batch.labels[own])

    def look_up(self, batch: Batch, pool: Tensor | None = None) -> dict[str, Tensor]:
        """Return the embeddings of the local values, [n, width] of each feature, and of the item ids ``pool``."""
        stream = self.stream(batch)
        if stream.local is not None:
            batch = batch.only({name: stream.is_local(name) for name in self.features})
        return self.embed((batch if pool is None else batch.with_pool(pool)).features, batch.step)

    def encode(self, embedded: dict[str, Tensor], batch: Batch) -> Tensor:
        """Return the local rows that carry labels, [L, D] float32."""
        embedded = {name: embedded[name] for name in self.features}
        with torch.autocast(batch.labels.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            tokens = self.preprocess(embedded, self.stream(batch))
            hidden = self.backbone(tokens)
        rows: Tensor = self.postprocess(hidden, tokens, batch.label_mask)
        return rows

    def num_labels(self, batch: Batch) -> int:
        """Return the label tokens of the loss of ``batch``, before it is computed."""
        return batch.labels.numel()

    def num_tokens(self, batch: Batch) -> int:
        """Return the tokens that ``batch`` makes, without asking the device."""
        sizes = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
        action = self.preprocess.action
        if action is not None and self.preprocess.layout in ("add", "concat"):
            sizes.pop(action)
        blocks = self.preprocess.blocks
        memory = 0 if blocks is None else blocks.num_tokens * batch.num_samples
        return memory + sum(sizes[name] for name in self.features if name in sizes)
