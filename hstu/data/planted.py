"""Draw items from known probabilities, whatever the size of the catalogue, and rank them as who knows these would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

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
        lead_weight: Probability that the features of the last event, not the mixture, lead to the next cluster.
        lead_share: How often they lead to a cluster, [K].
    """

    cluster: np.ndarray
    choice: np.ndarray
    transition: np.ndarray
    interest: np.ndarray
    transition_weight: float
    action: np.ndarray
    lead_weight: float = 0.0
    lead_share: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def cluster_weights(self, types: np.ndarray, last_cluster: np.ndarray, lead: np.ndarray) -> np.ndarray:
        """Probability of the cluster of the next item, were nothing seen, [B, K].

        Args:
            types: Type of each user, [B].
            last_cluster: Cluster of the last item, [B]; -1 where there is none yet.
            lead: Cluster to which the features of the last event lead, [B]; -1 for who does not see them.
        """
        weight = np.where(last_cluster == _NONE, 0.0, self.transition_weight)[:, None]
        mixture = (1 - weight) * self.interest[types] + weight * self.transition[last_cluster]
        if not self.lead_weight:
            return mixture
        led = np.where((lead == _NONE)[:, None], self.lead_share, np.arange(mixture.shape[1]) == lead[:, None])
        weight = np.where(last_cluster == _NONE, 0.0, self.lead_weight)[:, None]
        return (1 - weight) * mixture + weight * led


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
        lost = np.take_along_axis(weights, seen.clusters, axis=1) * self.model.choice[seen.items]
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
    """Items that users have seen, [B, L], cluster and segment of each, and unseen items of each segment, [B, S]."""

    items: np.ndarray
    clusters: np.ndarray
    segments: np.ndarray
    left: np.ndarray

    @classmethod
    def nothing(cls, sampler: Sampler, users: int, steps: int) -> _Seen:
        """Room for ``steps`` items of each user."""
        items, clusters, segments = (np.full((users, steps), _NONE) for _ in range(3))
        return cls(items, clusters, segments, np.tile(np.bincount(sampler.segment), (users, 1)))

    def of(self, users: slice | np.ndarray, steps: int) -> _Seen:
        """What ``users`` have seen in ``steps`` steps."""
        items, clusters, segments = (values[users, :steps] for values in (self.items, self.clusters, self.segments))
        return _Seen(items, clusters, segments, self.left[users])

    def add(self, step: int, items: np.ndarray, sampler: Sampler) -> None:
        """The first users see an item each."""
        users, segments = np.arange(len(items)), sampler.segment[items]
        self.items[users, step], self.segments[users, step] = items, segments
        self.clusters[users, step] = sampler.model.cluster[items]
        self.left[users, segments] -= 1


@dataclass(frozen=True)
class Circumstances:
    """What the next item depends on beside user and last item, for each of T events.

    Attributes:
        lead: Cluster to which the features of the event lead, [T]; -1 where there are none.
        span: Which of the models holds at its time, [T].
    """

    lead: np.ndarray
    span: np.ndarray

    def of(self, events: slice) -> Circumstances:
        """Those of some events."""
        return Circumstances(self.lead[events], self.span[events])


def draw_items(
    samplers: list[Sampler],
    types: np.ndarray,
    lengths: np.ndarray,
    given: Circumstances,
    uniform: np.ndarray,
    tell: Callable[[int], None],
) -> np.ndarray:
    """Draw the items of a block of users, one step of all of them at a time; the sequences are flat, [T].

    Args:
        samplers: One for each span of time.
        types: Type of each user, [B].
        lengths: Events of each user, [B].
        given: Of their events.
        uniform: A number in [0, 1) for each event, [T], step after step, in the order of the users.
        tell: Told how many events more are drawn.
    """
    order = np.argsort(-lengths, kind="stable")  # those who are still there stand in front
    first = np.cumsum(lengths) - lengths
    seen = _Seen.nothing(samplers[0], len(types), int(lengths.max()))
    used = 0
    for step in range(seen.items.shape[1]):
        active = np.flatnonzero(lengths > step)
        users = order[: len(active)]
        last = seen.clusters[: len(active), step - 1] if step else np.full(len(active), _NONE)
        lead = given.lead[first[users] + step - 1] if step else last
        drawn = uniform[used : used + len(active)][np.searchsorted(active, users)]
        items, spans = np.empty(len(active), np.int64), given.span[first[users] + step]
        for span, sampler in enumerate(samplers):
            # A slice copies nothing.
            rows = np.flatnonzero(spans == span) if len(samplers) > 1 else slice(len(active))
            weights = sampler.model.cluster_weights(types[users[rows]], last[rows], lead[rows])
            items[rows] = sampler.draw(weights, seen.of(rows, step), drawn[rows])
        seen.add(step, items, samplers[0])
        used += len(active)
        tell(len(active))
    items = seen.items[np.argsort(order)]
    return items[items != _NONE]


def oracle_ranks(
    models: list[PlantedModel], types: np.ndarray, items: np.ndarray, lengths: np.ndarray, given: Circumstances
) -> np.ndarray:
    """Rank of the last but one and of the last item of each user among the items unseen then, ties half, [U, 2]."""
    ranks = np.zeros((len(types), 2))
    first, model = np.cumsum(lengths) - lengths, models[0]
    clusters = model.transition.shape[0]
    for split in (0, 1):
        target = first + lengths - 2 + split
        last, lead, span = model.cluster[items[target - 1]], given.lead[target - 1], given.span[target]
        kinds = ((types * clusters + last) * (clusters + 1) + lead + 1) * len(models) + span
        order = np.argsort(kinds, kind="stable")
        for users in np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1):  # who have the same scores
            one, current = users[:1], models[span[users[0]]]
            scores = current.cluster_weights(types[one], last[one], lead[one])[0][model.cluster] * current.choice
            ascending = np.sort(scores)
            for user in users:
                own = scores[items[target[user]]]
                low, high = np.searchsorted(ascending, own), np.searchsorted(ascending, own, side="right")
                seen = scores[items[first[user] : target[user]]]
                higher = len(scores) - high - np.count_nonzero(seen > own)
                ties = high - low - 1 - np.count_nonzero(seen == own)
                ranks[user, split] = 1 + higher + ties / 2
    return ranks
