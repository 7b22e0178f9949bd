"""Retrieval with the research HSTU on padded tensors, as public trainers compute it: what ours is timed against.

The same model as ``RetrievalModel`` (preset research, one item token per event, uniform negatives), with its weights:
attention as [B, H, N, N] with a bias [B, N, N] that every layer makes anew, a mask that is multiplied, negatives looked
up as [tokens, negatives, D], gradients of whole tables. Matrices between them act on the tokens alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.hstu import HSTULayer
from hstu.models import RetrievalModel
from hstu.models.embedding import EmbeddingTables
from hstu.ops.attention.bias import BUCKET_LOG_WIDTH


class PaddedLayer(nn.Module):
    """One layer on [B, N, D], with the weights of ``layer``."""

    def __init__(self, layer: HSTULayer, length: int) -> None:
        super().__init__()
        assert layer.position_table is not None and layer.time_table is not None, "the research preset"
        config = layer.config
        self.heads, self.splits, self.dropout = config.num_heads, layer.splits, config.dropout
        self.scale, self.eps, self.length = config.scaling_seqlen, config.norm_eps, length
        self.uvqk = nn.Parameter(layer.uvqk.weight.detach().clone())
        self.output = nn.Linear(layer.output.in_features, layer.output.out_features)
        self.output.load_state_dict(layer.output.state_dict())
        middle = config.max_tokens - 1
        table = layer.position_table.detach()[max(0, middle - length + 1) : middle + length]
        lacking = 2 * length - 1 - table.numel()  # distances that no sample has
        self.position = nn.Parameter(F.pad(table, (lacking // 2, lacking // 2)))
        self.time = nn.Parameter(layer.time_table.detach().clone())

    def forward(self, x: Tensor, times: Tensor, valid: Tensor) -> Tensor:
        """Map the tokens x [T, D] of the places ``valid`` [B, N] to [T, D]; ``times`` is [B, N] seconds."""
        n = self.length
        projected = F.silu(F.layer_norm(x, x.shape[-1:], eps=self.eps) @ self.uvqk.T)
        u, v, q, k = projected.split(self.splits, -1)
        q, k, v = (pad(part, valid).unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) + self.bias(times)[:, None]
        mask = torch.ones(n, n).tril()
        o = torch.einsum("bhij,bjhd->bihd", F.silu(scores) / self.scale * mask, v).flatten(2)[valid]
        gated = u * F.layer_norm(o, o.shape[-1:], eps=self.eps)
        out: Tensor = self.output(F.dropout(gated, self.dropout, self.training)) + x
        return out

    def bias(self, times: Tensor) -> Tensor:
        """Return r_ij = position[j - i] + time[bucket(t_(i+1) - t_j)], [B, N, N]."""
        place = torch.arange(self.length)
        by_place = self.position[place[None, :] - place[:, None] + self.length - 1]
        following = torch.cat([times[:, 1:], times[:, -1:]], 1)
        seconds = (following[:, :, None] - times[:, None, :]).abs().clamp(min=1)
        buckets = (seconds.float().log() / BUCKET_LOG_WIDTH).long().clamp(max=self.time.numel() - 1)
        return by_place + self.time[buckets.view(-1)].view(buckets.shape)


class PaddedRetrieval(nn.Module):
    """The whole model, with the weights of ``model``, for samples of up to ``length`` events."""

    def __init__(self, model: RetrievalModel, length: int) -> None:
        super().__init__()
        position = model.preprocess.positions.position
        assert isinstance(model.embeddings, EmbeddingTables) and position is not None
        self.length, self.temperature = length, model.args.temperature
        self.eps, self.dropout = model.args.l2_norm_eps, model.preprocess.positions.dropout.p
        self.items = nn.Embedding.from_pretrained(model.embeddings.weights[model.item].detach().clone(), freeze=False)
        rows = position.detach()[:length]
        self.position = nn.Parameter(F.pad(rows, (0, 0, 0, length - rows.shape[0])))
        self.layers = nn.ModuleList([PaddedLayer(layer, length) for layer in model.backbone.layers])

    def forward(self, ids: Tensor, times: Tensor, lengths: Tensor, negatives: Tensor) -> Tensor:
        """Return the sum of the sampled softmax losses.

        Args:
            ids: [B, N] int64, zeros after the end of a sample.
            times: [B, N] int64 seconds, likewise.
            lengths: [B] int64.
            negatives: [L, K] int64 for each event but the last of its sample.
        """
        place = torch.arange(self.length)
        valid = place < lengths[:, None]
        embedded = self.items(ids)
        x = embedded * math.sqrt(embedded.shape[-1]) + self.position
        x = F.dropout(x, self.dropout, self.training)[valid]
        for layer in self.layers:
            x = layer(x, times, valid)
        labelled = (place < lengths[:, None] - 1)[valid]
        query = F.normalize(x[labelled], dim=-1, eps=self.eps)
        labels = ids[:, 1:][valid[:, 1:]]
        positive = F.normalize(self.items(labels), dim=-1, eps=self.eps)
        others = F.normalize(self.items(negatives), dim=-1, eps=self.eps)  # [L, K, D]
        right = (query * positive).sum(-1, keepdim=True)
        wrong = torch.bmm(others, query[:, :, None]).squeeze(2)
        wrong = torch.where(negatives == labels[:, None], -5e4, wrong)
        scores = torch.cat([right, wrong], 1) / self.temperature
        return -F.log_softmax(scores, 1)[:, 0].sum()


def pad(values: Tensor, valid: Tensor) -> Tensor:
    """Spread [T, ..] over the places ``valid`` [B, N], zeros elsewhere: [B, N, ..]."""
    return values.new_zeros(*valid.shape, *values.shape[1:]).masked_scatter(
        valid.view(*valid.shape, *[1] * (values.dim() - 1)), values
    )
