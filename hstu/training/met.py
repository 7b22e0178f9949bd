"""Which ids the training of some weights has met: kept in their checkpoint, for whoever goes on from these weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hstu.training.saved_tensors import SavedTensors
from hstu.training.vocabularies import Record

Met = Mapping[str, np.ndarray]
"""Feature, or the item -> which of its ids were met, [ids] bool, and perhaps more behind them."""

_PREFIX = "met/"


def met_state(met: Met) -> dict[str, Tensor]:
    """Return ``met`` as tensors of a checkpoint, eight ids a byte."""
    return {_PREFIX + name: torch.from_numpy(np.packbits(row)) for name, row in met.items()}


def read_met(checkpoint: Path) -> dict[str, np.ndarray]:
    """Return what :func:`met_state` kept in a checkpoint; nothing where it is of before such records."""
    saved = SavedTensors(checkpoint)
    names = [name for name in saved.shapes if name.startswith(_PREFIX)]
    return {name.removeprefix(_PREFIX): np.unpackbits(saved.whole(name).numpy()).astype(bool) for name in names}


def met_there(
    checkpoint: Path, ids: Mapping[str, Tensor], tables: Mapping[str, str], there: Record, here: Record
) -> dict[str, np.ndarray]:
    """Return which ids here the training of another run's checkpoint has met, by feature, [ids here] bool.

    Args:
        checkpoint: What another run starts from.
        ids: Vocabulary -> the id there of each id here, int64; -1 where there is none.
        tables: Feature -> vocabulary of its ids.
        there: What vocabularies are there, see ``describe_vocabularies``.
        here: What they are here: those that are the same are matched without ``ids`` too.
    """
    found = {}
    for name, before in read_met(checkpoint).items():
        table = tables.get(name, name)
        own = ids.get(table)
        if own is None and table in here and there.get(table) == here[table]:
            own = torch.arange(here[table]["size"])  # of what has no rows
        if own is not None:
            found[name] = (own.numpy() >= 0) & before[own.numpy()]
    return found
