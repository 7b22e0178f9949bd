"""Which events train, validate and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

MIN_EVENTS = 3


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of one split.

    Args:
        name: "train", "valid" or "test".
        users: Row of the user in the data set, int64 [S].
        stop: The events before ``stop`` belong to the sample, int64 [S]. Of a valid or test sample the
            event ``stop - 1`` is the held-out target.
    """

    name: Literal["train", "valid", "test"]
    users: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


def leave_one_out(lengths: np.ndarray) -> dict[str, Split]:
    """Train on all but the last two events, validate on the last but one, test on the last.

    Args:
        lengths: Number of events of each user, int64 [U].

    Returns:
        The splits by name; each has one sample per user.

    Raises:
        ValueError: If a user has fewer than 3 events.
    """
    short = np.flatnonzero(lengths < MIN_EVENTS)
    if len(short):
        raise ValueError(
            f"{len(short)} of {len(lengths)} users have fewer than {MIN_EVENTS} events "
            f"(row {short[0]} has {lengths[short[0]]}), too few to train, validate and test on; "
            f"drop them with --min_user_events {MIN_EVENTS} in preprocessing"
        )
    users = np.arange(len(lengths), dtype=np.int64)
    stop = np.asarray(lengths, dtype=np.int64)
    return {
        "train": Split(name="train", users=users, stop=stop - 2),
        "valid": Split(name="valid", users=users, stop=stop - 1),
        "test": Split(name="test", users=users, stop=stop),
    }
