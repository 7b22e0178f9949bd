"""How a user's vector is scored against items; training, evaluation and predictions use the same module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.mlp import MLP
from hstu.layers.postprocess import l2_normalize

_CHUNK_ELEMENTS = 1 << 22  # gate logits held at once while scoring a catalogue


class DotProduct(nn.Module):
    """``<q, x>`` of vectors that may be scaled to length one; both scaled is the cosine.

    Args:
        normalize_queries: Scale queries.
        normalize_items: Scale items.
        eps: Least length.
    """

    def __init__(self, *, normalize_queries: bool, normalize_items: bool, eps: float) -> None:
        super().__init__()
        self.normalize_queries, self.normalize_items, self.eps = normalize_queries, normalize_items, eps

    def queries(self, rows: Tensor) -> Tensor:
        """Turn hidden rows [L, D] into what ``scores`` takes, [L, D]."""
        return l2_normalize(rows, self.eps) if self.normalize_queries else rows

    def items(self, embedded: Tensor) -> Tensor:
        """Turn item embeddings [n, D] into what ``scores`` takes, [n, D]."""
        return l2_normalize(embedded, self.eps) if self.normalize_items else embedded

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Score every query against every item, [L, n]."""
        return queries @ items.T


class MixtureOfLogits(nn.Module):
    """Gated mixture of the dot products of P_q query vectors and P_i item vectors (https://arxiv.org/abs/2306.04039).

    ``phi(q, x) = sum_k pi_k(q, x) <q_k, x_k>`` over the K = P_q P_i pairs of vectors, all of length one, with
    pi = dropout(softmax(a(q) * b(x) + c(dot products))); a, b and c are two-layer networks.

    Args:
        hidden_size: D, of hidden rows and item embeddings.
        query_groups: P_q.
        item_groups: P_i.
        channels: Width of each vector.
        gate_channels: Inner width of the gating networks.
        dropout: On the gates.
        eps: Least length of a vector.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        query_groups: int,
        item_groups: int,
        channels: int,
        gate_channels: int,
        dropout: float,
        eps: float,
    ) -> None:
        super().__init__()
        pairs = query_groups * item_groups
        self.query_groups, self.item_groups, self.channels = query_groups, item_groups, channels
        self.dropout, self.eps = dropout, eps
        self.query_vectors = nn.Linear(hidden_size, query_groups * channels)
        self.item_vectors = nn.Linear(hidden_size, item_groups * channels)
        self.query_gate = MLP(hidden_size, (gate_channels, pairs), activation="silu")
        self.item_gate = MLP(hidden_size, (gate_channels, pairs), activation="silu")
        self.pair_gate = MLP(pairs, (gate_channels, pairs), activation="silu")

    def queries(self, rows: Tensor) -> Tensor:
        """Turn hidden rows [L, D] into vectors and gate, side by side: [L, P_q d + K]."""
        return self._represent(rows, self.query_vectors, self.query_gate)

    def items(self, embedded: Tensor) -> Tensor:
        """Turn item embeddings [n, D] into vectors and gate, side by side: [n, P_i d + K]."""
        return self._represent(embedded, self.item_vectors, self.item_gate)

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Score every query against every item, [L, n], some items at a time."""
        pairs = self.query_groups * self.item_groups
        chunk = max(1, _CHUNK_ELEMENTS // (pairs * max(1, queries.shape[0])))
        return torch.cat([self.mix(queries, part[None])[0] for part in items.split(chunk)], 1)

    def coarse_queries(self, queries: Tensor) -> Tensor:
        """Return vectors [L, d] whose products with :meth:`coarse_items` are the sums of all K dot products."""
        return self._split(queries, self.query_groups)[0].sum(-2)

    def coarse_items(self, items: Tensor) -> Tensor:
        """Return vectors [n, d] for :meth:`coarse_queries`."""
        return self._split(items, self.item_groups)[0].sum(-2)

    def own_scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Score queries [L, ..] against items of their own [L, n, ..]: [L, n]."""
        return self.mix(queries, items)[0]

    def mix(self, queries: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Score each query against items of its own, or against items that all share.

        Args:
            queries: [L, ..], from :meth:`queries`.
            items: [L, n, ..] or [1, n, ..], from :meth:`items`.

        Returns:
            Scores [L, n] and gates [L, n, K] before dropout.
        """
        q, q_gate = self._split(queries[:, None], self.query_groups)
        x, x_gate = self._split(items, self.item_groups)
        if items.shape[0] == 1:
            dots = torch.einsum("lpd,nid->lnpi", q[:, 0], x[0]).flatten(2)
        else:
            dots = torch.einsum("lpd,lnid->lnpi", q[:, 0], x).flatten(2)
        gates = (q_gate * x_gate + self.pair_gate(dots)).softmax(-1)
        return (F.dropout(gates, self.dropout, self.training) * dots).sum(-1), gates

    def _represent(self, rows: Tensor, vectors: nn.Linear, gate: MLP) -> Tensor:
        units = l2_normalize(vectors(rows).unflatten(-1, (-1, self.channels)), self.eps)
        return torch.cat([units.flatten(-2), gate(rows)], -1)

    def _split(self, represented: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        vectors, gate = represented.split([groups * self.channels, represented.shape[-1] - groups * self.channels], -1)
        return vectors.unflatten(-1, (groups, -1)), gate


def mutual_information(gates: Tensor) -> Tensor:
    """Return I(k; item) of each query in nats, [L]: H(mean of the gates) - mean H(gates) over its items.

    Args:
        gates: [L, n, K], summing to one over K.
    """

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p.clamp(min=torch.finfo(p.dtype).tiny)).sum(-1)

    return entropy(gates.mean(1)) - entropy(gates).mean(1)
