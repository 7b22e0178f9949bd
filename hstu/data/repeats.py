"""Events of items that their user met before: how many there are, and when they matter."""

from __future__ import annotations

import numpy as np

MANY_REPEATS = 0.01
"""Share of events of items that their user has met before above which one has to think of them."""
REPEATS_MATTER = (
    "retrieval keeps seen items in its rankings if more than 1% of the validation targets are such repeats; "
    "RetrievalArgs.filter_seen = True would make each a miss"
)


def count_repeats(lengths: np.ndarray, items: np.ndarray) -> int:
    """Return how many events are of an item that their user met before.

    Args:
        lengths: Events of each user, int64 [U].
        items: Item ids, user after user, int64 [T].
    """
    if not items.size:
        return 0
    pairs = np.sort(np.repeat(np.arange(len(lengths)), lengths) * (int(items.max()) + 1) + items)
    return int((pairs[1:] == pairs[:-1]).sum())
