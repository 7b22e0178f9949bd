"""Draw items from known probabilities, whatever the size of the catalogue, and rank them as who knows these would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_DIRECT = 1024  # items of a catalogue that is looked at whole for each event
_LEAST_MASS = 1e-6  # of what is unseen, to be told by subtracting what is seen
_NONE = -1  # the cluster before the first event
_SEGMENT = 256  # items of a segment of a larger one


@dataclass(frozen=True, kw_only=True)
class PlantedModel:
    """The known probabilities.

    Args:
        cluster: Cluster of each item, [N].
        choice: Probability of each item given its cluster, [N].
        transition: Probability of the next cluster given the last, [K, K].
        interest: Probability of a cluster given the type, [G, K].
        transition_weight: Weight of ``transition`` in the mixture with ``interest``.
        action: Probability of a positive action given type and item, [G, N].
    """

    cluster: np.ndarray
    choice: np.ndarray
    transition: np.ndarray
    interest: np.ndarray
    transition_weight: float
    action: np.ndarray

    def cluster_weights(self, types: np.ndarray, last_cluster: np.ndarray) -> np.ndarray:
        """Probability of the cluster of the next item, were nothing seen, [B, K].

        Args:
            types: Type of each user, [B].
            last_cluster: Cluster of the last item, [B]; -1 where there is none yet.
        """
        weight = np.where(last_cluster == _NONE, 0.0, self.transition_weight)[:, None]
        return (1 - weight) * self.interest[types] + weight * self.transition[last_cluster]


class Sampler:
    """Draws items by the place of a uniform number in the cumulative probability over the catalogue.

    Of a large catalogue it first finds the segment by the segments' masses (those of all items, less what is seen),
    then the item within: the work for an event does not grow with the catalogue.
    """

    def __init__(self, model: PlantedModel) -> None:
        items = len(model.cluster)
        self.model = model
        self.size = items if items <= _DIRECT else _SEGMENT
        self.segment = np.arange(items) // self.size
        self.starts = np.arange(0, items, self.size)
        self.mass = np.zeros((model.interest.shape[1], len(self.starts)))  # of each cluster in each segment
        np.add.at(self.mass, (model.cluster, self.segment), model.choice)

    def draw(self, weights: np.ndarray, seen: _Seen, uniform: np.ndarray) -> np.ndarray:
        """Draw an unseen item for each user, [B].

        Args:
            weights: See ``PlantedModel.cluster_weights``, [B, K].
            seen: What they have seen.
            uniform: Numbers in [0, 1), [B].
        """
        rows, model = np.arange(len(weights)), self.model
        if len(self.starts) == 1:
            start, within = np.zeros(len(rows), np.int64), uniform
            probability = weights[:, model.cluster] * model.choice
            probability[rows[:, None], seen.items] = 0
        else:
            mass = self._unseen_mass(weights, seen)
            cumulative = mass.cumsum(axis=1)
            drawn = uniform * cumulative[:, -1]
            segment = (cumulative <= drawn[:, None]).sum(axis=1)
            within = 1 - (cumulative[rows, segment] - drawn) / mass[rows, segment]
            start = self.starts[segment]
            place = start[:, None] + np.arange(self.size)
            items = np.minimum(place, len(model.cluster) - 1)
            probability = np.take_along_axis(weights, model.cluster[items], axis=1) * model.choice[items]
            probability[place >= len(model.cluster)] = 0
            row, column = np.nonzero(seen.segments == segment[:, None])
            probability[row, seen.items[row, column] - start[row]] = 0
        cumulative = probability.cumsum(axis=1)
        # Scaled by the last sum, and below it, so that no draw lies beyond the last item.
        drawn = np.clip(within * cumulative[:, -1], 0, np.nextafter(cumulative[:, -1], 0))
        return start + (cumulative <= drawn[:, None]).sum(axis=1)

    def _unseen_mass(self, weights: np.ndarray, seen: _Seen) -> np.ndarray:
        """Probability of the unseen items of each segment, [B, S], up to a factor for each user."""
        users, segments = len(weights), len(self.starts)
        lost = np.take_along_axis(weights, seen.clusters, axis=1) * seen.choices
        flat = np.arange(users)[:, None] * segments + seen.segments
        taken = np.bincount(flat.ravel(), lost.ravel(), users * segments).reshape(users, segments)
        mass = np.maximum(weights @ self.mass - taken, 0)
        mass[seen.left == 0] = 0
        for row in np.flatnonzero(mass.sum(axis=1) < _LEAST_MASS):  # differences of nearly equal numbers
            exact = weights[row, self.model.cluster] * self.model.choice
            exact[seen.items[row]] = 0
            mass[row] = np.add.reduceat(exact, self.starts)
        return mass


@dataclass(frozen=True)
class _Seen:
    """Items that users have seen, [B, L], what the sampler knows of each, and unseen items of each segment, [B, S]."""

    items: np.ndarray
    clusters: np.ndarray
    choices: np.ndarray
    segments: np.ndarray
    left: np.ndarray

    @classmethod
    def nothing(cls, sampler: Sampler, users: int, steps: int) -> _Seen:
        """Room for ``steps`` items of each user."""
        whole = [np.full((users, steps), _NONE, kind) for kind in (np.int64, np.int64, np.float64, np.int64)]
        items, clusters, choices, segments = whole
        return cls(items, clusters, choices, segments, np.tile(np.bincount(sampler.segment), (users, 1)))

    def of(self, users: int, steps: int) -> _Seen:
        """What the first ``users`` have seen in ``steps`` steps."""
        whole = (self.items, self.clusters, self.choices, self.segments)
        items, clusters, choices, segments = (values[:users, :steps] for values in whole)
        return _Seen(items, clusters, choices, segments, self.left[:users])

    def add(self, step: int, items: np.ndarray, sampler: Sampler) -> None:
        """The first users see an item each."""
        users, segments = np.arange(len(items)), sampler.segment[items]
        self.items[users, step], self.segments[users, step] = items, segments
        self.clusters[users, step] = sampler.model.cluster[items]
        self.choices[users, step] = sampler.model.choice[items]
        self.left[users, segments] -= 1


def draw_items(
    sampler: Sampler, types: np.ndarray, lengths: np.ndarray, uniform: np.ndarray, tell: Callable[[int], None]
) -> np.ndarray:
    """Draw the items of a block of users, one step of all of them at a time; the sequences are flat, [T].

    Args:
        sampler: Of the model.
        types: Type of each user, [B].
        lengths: Events of each user, [B].
        uniform: A number in [0, 1) for each event, [T], step after step, in the order of the users.
        tell: Told how many events more are drawn.
    """
    order = np.argsort(-lengths, kind="stable")  # those who are still there stand in front
    seen = _Seen.nothing(sampler, len(types), int(lengths.max()))
    used = 0
    for step in range(seen.items.shape[1]):
        active = np.flatnonzero(lengths > step)
        users = order[: len(active)]
        last = seen.clusters[: len(active), step - 1] if step else np.full(len(active), _NONE)
        weights = sampler.model.cluster_weights(types[users], last)
        drawn = uniform[used : used + len(active)][np.searchsorted(active, users)]
        seen.add(step, sampler.draw(weights, seen.of(len(active), step), drawn), sampler)
        used += len(active)
        tell(len(active))
    items = seen.items[np.argsort(order)]
    return items[items != _NONE]


def oracle_ranks(model: PlantedModel, types: np.ndarray, items: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Rank of the last but one and of the last item of each user among the items unseen then, ties half, [U, 2]."""
    ranks = np.zeros((len(types), 2))
    first = np.cumsum(lengths) - lengths
    for split in (0, 1):
        target = first + lengths - 2 + split
        kinds = types * model.transition.shape[0] + model.cluster[items[target - 1]]
        order = np.argsort(kinds, kind="stable")
        for users in np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1):  # who have the same scores
            weights = model.cluster_weights(types[users[:1]], model.cluster[items[target[users[:1]] - 1]])[0]
            scores = weights[model.cluster] * model.choice
            ascending = np.sort(scores)
            for user in users:
                own = scores[items[target[user]]]
                low, high = np.searchsorted(ascending, own), np.searchsorted(ascending, own, side="right")
                seen = scores[items[first[user] : target[user]]]
                higher = len(scores) - high - np.count_nonzero(seen > own)
                ties = high - low - 1 - np.count_nonzero(seen == own)
                ranks[user, split] = 1 + higher + ties / 2
    return ranks
