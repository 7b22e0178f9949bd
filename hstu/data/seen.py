"""What was met before: by a user before a target, by training before anybody asks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hstu.data.collate import Collator
from hstu.data.reader import Histories, SequenceDataset
from hstu.data.schema import unknown_id
from hstu.data.splits import Split, sample_blocks
from hstu.data.values import Sets, Values, take


def seen_before(dataset: Histories, split: Split, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return everything before the target of samples ``rows`` [Q]: (place in ``rows``, item id), both [S] int64."""
    samples = rows.cpu().numpy()
    events = dataset.gather(split.users[samples], np.zeros_like(samples), split.stop[samples] - 1)
    owner = np.repeat(np.arange(samples.size), events.lengths)
    return torch.from_numpy(owner).to(rows.device), torch.from_numpy(events.items).to(rows.device)


def is_among(targets: Tensor, seen: tuple[Tensor, Tensor]) -> Tensor:
    """Return whether each of ``targets`` [Q] is among what ``seen_before`` found for its row, [Q] bool."""
    owner, items = seen
    return torch.zeros_like(targets, dtype=torch.bool).index_fill(0, owner[items == targets[owner]], True)


def count_seen_targets(dataset: SequenceDataset, split: Split) -> int:
    """Return of how many samples of ``split`` the target is an item that the user has met before."""
    found = 0
    for rows in sample_blocks(split):
        stop = split.stop[rows]
        targets = torch.from_numpy(dataset.gather(split.users[rows], stop - 1, stop).items)
        found += int(is_among(targets, seen_before(dataset, split, torch.from_numpy(rows))).sum())
    return found


def trained_items(dataset: SequenceDataset, train: Split, collate: Collator) -> Tensor:
    """Return which items some sample of ``train`` shows, in its history or to be predicted, [items] bool."""
    found = np.zeros(dataset.schema.item.vocab_size or 0, bool)
    for rows in sample_blocks(train):
        found[collate.visible(dataset, train, rows)[0].items] = True
    return torch.from_numpy(found)


def met_contexts(dataset: SequenceDataset, train: Split, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return which ids of each context the users of ``train`` have, [vocab_size + 1] bool; the unknown one has not."""
    users = np.unique(train.users)
    values = dataset.gather(users, np.zeros_like(users), np.zeros_like(users)).contexts
    return {name: _marked(values[name], unknown_id(dataset.schema, name) + 1) for name in names}


def met_values(dataset: SequenceDataset, train: Split, collate: Collator) -> dict[str, np.ndarray]:
    """Return of categories of events and of sets of events and users which ids training shows, as ``met_contexts``."""
    schema, carried = dataset.schema, (*collate.event_features, *collate.user_features)
    features = (*schema.of("event", "categorical", "multi"), *schema.of("user", "multi"))
    features = tuple(feature for feature in features if feature.name in carried)
    found = {feature.name: np.zeros((feature.vocab_size or 0) + 1, bool) for feature in features}
    for rows in sample_blocks(train) if found else ():
        events, _, _ = collate.visible(dataset, train, rows)
        values = events.of_events | events.of_users
        for name, met in found.items():
            met[_ids(values[name])] = True
    for met in found.values():
        met[-1] = False
    return found


def met_categories(dataset: SequenceDataset, trained: Tensor) -> dict[str, np.ndarray]:
    """Return which ids of each feature the items ``trained`` [items] bool have, as ``met_contexts`` does."""
    chosen = np.flatnonzero(trained.numpy())
    return {
        feature.name: _marked(_ids(take(dataset.item_features(feature.name), chosen)), (feature.vocab_size or 0) + 1)
        for feature in dataset.schema.of("item", "categorical", "multi")
    }


def _ids(values: Values) -> np.ndarray:
    return values.ids if isinstance(values, Sets) else values


def _marked(ids: np.ndarray, size: int) -> np.ndarray:
    """Return which of the numbers below ``size`` are among ``ids``, [size] bool."""
    found = np.zeros(size, bool)
    found[ids] = True
    return found
