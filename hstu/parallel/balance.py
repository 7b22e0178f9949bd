"""Samples of a global batch to ranks by predicted work rather than by count."""

from __future__ import annotations

import heapq

import numpy as np

from hstu.config import NetworkArgs
from hstu.ops.flops import layer_flops


def sample_costs(tokens: np.ndarray, network: NetworkArgs) -> np.ndarray:
    """Return the work of each sample in one layer, forward and backward, in floating-point operations.

    Args:
        tokens: [n] int64, tokens of each sample; attention is causal.
        network: Widths of the layer, counted as an HSTU layer whatever the backbone.
    """
    value_width = network.value_channels or network.kv_channels
    shape = (network.hidden_size, network.num_attention_heads, network.kv_channels, value_width)
    per_token, per_pair = layer_flops(1, 0, *shape).total, layer_flops(0, 1, *shape).total
    lengths = tokens.astype(np.float64)
    return lengths * per_token + lengths * (lengths + 1) / 2 * per_pair


def balance(costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Return the places [of each rank, ascending] in ``costs`` [n], such that the ranks' sums are nearly equal.

    The longest first, each to the least loaded rank (Graham 1969): the most loaded one exceeds the mean by no
    more than the last sample it got. The same on every rank, for it looks at nothing but the costs.
    """
    owned: list[list[int]] = [[] for _ in range(ranks)]
    # Ties go to the rank with fewer samples, so that samples without work are spread as well.
    loads = [(0.0, 0, rank) for rank in range(ranks)]
    for place in np.argsort(-costs, kind="stable"):
        load, count, rank = heapq.heappop(loads)
        owned[rank].append(int(place))
        heapq.heappush(loads, (load + float(costs[place]), count + 1, rank))
    return [np.sort(np.array(places, dtype=np.int64)) for places in owned]
