"""The work of a batch in floating-point operations, counted exactly from its lengths: for the log and for planning."""

from __future__ import annotations

from torch import nn

from hstu.config import Config
from hstu.data.batch import Batch
from hstu.models import RankingModel, RetrievalModel
from hstu.models.backbone import attention_mask
from hstu.models.item_encoder import ItemEncoder
from hstu.models.negatives import POOL_SIZE
from hstu.ops import Layout
from hstu.ops.flops import attention_flops, cross_entropy_flops, visible_pairs
from hstu.parallel.tensor import cut_of


def batch_flops(model: RankingModel | RetrievalModel, config: Config, batch: Batch) -> float:
    """Return the operations of a forward and backward pass over ``batch``, from ``training_batch``, in host memory.

    Matrix products alone: of every weight with its tokens, of attention with the pairs that the mask lets see each
    other, of the encoders of declared features, and of the scores. Not counted: attention of a HuggingFace or
    registered backbone, a mixture of logits, lookups, and texts of items that are only negatives. The pool of in-batch
    negatives counts as far as this rank's labels fill it.
    """
    layout, labels = model.token_layout(batch), batch.labels.numel()
    heads = model.head if isinstance(model, RankingModel) else model.similarity
    passes = model.passes if isinstance(model, RetrievalModel) else 1
    weights = passes * matrix_elements(model.backbone) * int(layout.offsets[-1]) + matrix_elements(heads) * labels
    weights += passes * feature_products(model, batch)
    if model.item_encoder is not None and isinstance(model, RetrievalModel):
        weights += encoded_pool(model, batch) * _item_elements(model.item_encoder)
    # One product forward, two backward.
    work = 6.0 * weights + passes * config.network.num_layers * _attention(config, layout)
    text = model.item_encoder.text if model.item_encoder is not None else None
    if text is not None and text.model is not None:
        work += 6.0 * matrix_elements(text.model) * text.num_tokens(batch.ids(batch.item))
    if isinstance(model, RetrievalModel):
        work += 6.0 * matrix_elements(model.to_items) * labels
        work += cross_entropy_flops(labels, _pool_size(model, batch), config.network.item_embedding_dim).total
    return work


def feature_products(model: RankingModel | RetrievalModel, batch: Batch) -> int:
    """Return the products of weights with the declared features of the users, events and items of ``batch``."""
    tokens, users, events = model.feature_tokens, batch.num_candidates.numel(), batch.num_events
    actions = 0 if tokens.action is None else batch.ids(tokens.action).numel()
    merged = {"users": users, "events": events, "outcomes": actions}
    parts: list[tuple[nn.Module, int]] = [(tokens.users, users), (tokens.events, events), (tokens.outcomes, events)]
    parts += [(merge, merged[name]) for name, merge in tokens.merges.items()]
    items = 0 if model.item_encoder is None else events * _item_elements(model.item_encoder)
    return items + sum(matrix_elements(part) * rows for part, rows in parts)


def _item_elements(encoder: ItemEncoder) -> int:
    return matrix_elements(encoder.encoders) + matrix_elements(encoder.merge)


def matrix_elements(module: nn.Module) -> int:
    """Return the elements of the weights that each token is multiplied with, on all tensor ranks together."""
    owners = [part for part in module.modules() if not isinstance(part, nn.Embedding)]
    weights = [w for part in owners for w in part.parameters(recurse=False) if w.dim() == 2]
    return sum(w.numel() * (1 if (cut := cut_of(w)) is None else cut.group.size) for w in weights)


def _attention(config: Config, layout: Layout) -> int:
    network = config.network
    if network.backbone in ("gru", "lstm", "mean") or network.is_hugging_face or network.is_custom:
        return 0
    values = network.value_channels or network.kv_channels
    pairs = int(visible_pairs(layout, attention_mask(network)).sum())
    return attention_flops(pairs, network.num_attention_heads, network.kv_channels, values).total


def encoded_pool(model: RetrievalModel, batch: Batch) -> int:
    """Return the items that negatives are drawn from at once, each encoded; of a large catalogue at most so many."""
    sampler = model.sampler
    if sampler.strategy == "in_batch":
        return batch.labels.unique().numel()
    return sampler.num_items if sampler.strategy == "all" else min(sampler.num_items, POOL_SIZE)


def _pool_size(model: RetrievalModel, batch: Batch) -> int:
    """Return the items that each label token is scored against."""
    sampler = model.sampler
    if model.args.loss == "bce":
        return 1
    if sampler.num_negatives != -1 and sampler.strategy != "all":
        return sampler.num_negatives
    return batch.labels.unique().numel() if sampler.strategy == "in_batch" else sampler.num_items
