"""Planted data: sequences drawn from known probabilities, so that the best possible scores are known.

A user has a latent type; a type is interested in a few clusters of items. The cluster of the next item is
drawn from the user's interests or, with probability ``transition_weight``, from the row of a transition
matrix that belongs to the last item's cluster; the item within the cluster by popularity; an item that the
user has seen is drawn again. Features of events may lead to the next cluster, and decide on the action
(:mod:`hstu.data.planted_features`). The action is binary with p = sigmoid(affinity of the type to the cluster +
quality of the item). The oracle knows all of this and is scored on the very events that are held out.
"""

from __future__ import annotations

import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from hstu.data.planted import Circumstances, PlantedModel, Sampler, draw_items, oracle_ranks
from hstu.data.planted_features import PLANTED, draw_features, drifting, spans_of
from hstu.data.planted_text import draw_cold, draw_titles, in_last_two
from hstu.data.schema import Feature, Schema, count_statistics
from hstu.data.spill import Progress
from hstu.data.splits import MIN_EVENTS
from hstu.data.writer import EncodedDataset, write_dataset

Distribution = Literal["uniform", "normal", "zipf", "lognormal"]

#: Behind the name of a split: the best possible scores there for who does not see the planted features of events.
WITHOUT_FEATURES = " without features"

_BLOCK = 512  # users drawn at once; with another number, other data
_THREADS = 2
_START = 1_600_000_000  # seconds


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Size and shape of a planted data set.

    Args:
        num_users: Users.
        num_items: Catalogue; more than ``max_seqlen``, as nobody sees an item twice.
        num_clusters: Clusters of items.
        num_types: Latent user types.
        clusters_per_type: Clusters a type is interested in.
        min_seqlen: Shortest sequence, at least 3.
        max_seqlen: Longest sequence.
        seqlen_distribution: Distribution of the sequence lengths within their bounds.
        value_distribution: Distribution of item popularity over the ranks of the catalogue.
        transition_weight: Probability that the last cluster, not the interests, leads to the next one.
        context_visibility: Probability that the context feature shows the type; otherwise it is random.
        affinity_scale: Standard deviation of the affinity of types to clusters in the action's logit.
        quality_scale: Standard deviation of item quality in the action's logit.
        event_features: Which of number, brand (both lead to the next item) and price (of the action) are planted.
        feature_weight: Probability that number and brand, not interests and transitions, lead to the next cluster.
        price_scale: What a standard deviation of the price takes off the action's logit.
        num_brands: Brands.
        titles: Whether items have titles, whose words are shared by cluster (:mod:`hstu.data.planted_text`).
        cold_share: Share of the items of each cluster that nobody meets before their last two events: training shows
            none of them.
        popularity_drift: Step of the logarithm of an item's popularity from one tenth of the time to the next.
        seed: Seed of everything.
    """

    num_users: int = 6000
    num_items: int = 600
    num_clusters: int = 40
    num_types: int = 6
    clusters_per_type: int = 3
    min_seqlen: int = 10
    max_seqlen: int = 90
    seqlen_distribution: Distribution = "lognormal"
    value_distribution: Distribution = "zipf"
    transition_weight: float = 0.5
    context_visibility: float = 0.8
    affinity_scale: float = 1.6
    quality_scale: float = 0.4
    event_features: str = ""
    feature_weight: float = 0.8
    price_scale: float = 2.0
    num_brands: int = 8
    titles: bool = False
    cold_share: float = 0.0
    popularity_drift: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        self._at_least("num_users", 1, "one user")
        self._at_least("num_types", 1, "one type")
        self._at_least("clusters_per_type", 1, "one cluster")
        self._at_least("num_clusters", self.clusters_per_type, "clusters_per_type")
        self._at_least("min_seqlen", MIN_EVENTS, "one event each to train, validate and test")
        self._at_least("max_seqlen", self.min_seqlen, "min_seqlen")
        self._at_least("num_items", self.num_clusters, "num_clusters")
        self._at_least("num_items", self.max_seqlen + 1, "max_seqlen + 1, as nobody sees an item twice")
        self._at_least("seed", 0, "seeds are not negative")
        for name in ("seqlen_distribution", "value_distribution"):
            choices = get_args(Distribution)
            self._require(name, getattr(self, name) in choices, f"is none of {', '.join(choices)}")
        self._at_least("num_brands", 2, "one brand says nothing")
        if unknown := [name for name in self.planted_features if name not in PLANTED]:
            raise ValueError(f"event_features: {unknown[0]!r} is not planted; choose some of {', '.join(PLANTED)}")
        for name in ("transition_weight", "context_visibility", "feature_weight"):
            self._require(name, 0 <= getattr(self, name) <= 1, "must lie in [0, 1]")
        self._require("cold_share", 0 <= self.cold_share < 1, "must be at least 0 and below 1")
        warm = self.num_items - int(self.cold_share * self.num_items)
        reason = f"leaves {warm} items, not more than max_seqlen = {self.max_seqlen}, as nobody sees an item twice"
        self._require("cold_share", not self.cold_share or warm > self.max_seqlen, reason)
        self._require("cold_share", not (self.cold_share and self.popularity_drift), "goes without popularity_drift")
        for name in ("affinity_scale", "quality_scale", "price_scale", "popularity_drift"):
            self._require(name, 0 <= getattr(self, name) < float("inf"), "must be finite and not negative")

    @property
    def planted_features(self) -> tuple[str, ...]:
        """Names in ``event_features``."""
        return tuple(name.strip() for name in self.event_features.split(",") if name.strip())

    def _at_least(self, name: str, bound: int, why: str) -> None:
        self._require(name, getattr(self, name) >= bound, f"must be at least {bound} ({why})")

    def _require(self, name: str, condition: bool, reason: str) -> None:
        if not condition:
            raise ValueError(f"{name} = {getattr(self, name)!r} {reason}")


def distribution_weights(distribution: Distribution, size: int) -> np.ndarray:
    """Probabilities of the values 1..size, [size]: what "uniform", "normal", "zipf", "lognormal" mean here.

    normal: centred, the ends at 2.5 standard deviations; zipf: 1 / value; lognormal: median at 0.3 of the
    range, standard deviation 0.6 of the logarithm.
    """
    value = np.arange(1, size + 1)
    share = (value - 0.5) / size
    if distribution == "uniform":
        weights = np.ones(size)
    elif distribution == "normal":
        weights = np.exp(-0.5 * ((share - 0.5) / 0.2) ** 2)
    elif distribution == "zipf":
        weights = 1.0 / value
    else:
        weights = np.exp(-0.5 * (np.log(share / 0.3) / 0.6) ** 2) / share
    return weights / weights.sum()


def plant(config: SyntheticConfig, rng: np.random.Generator) -> PlantedModel:
    """Draw the known probabilities."""
    items, clusters, types = config.num_items, config.num_clusters, config.num_types
    popularity = rng.permutation(distribution_weights(config.value_distribution, items))
    cluster = rng.permutation(np.arange(items) % clusters)
    choice = popularity / np.bincount(cluster, weights=popularity)[cluster]
    successors = np.stack([rng.permutation(clusters) for _ in range(clusters)])
    transition = np.full((clusters, clusters), 0.04 / clusters)
    for share, successor in zip((0.7, 0.2, 0.06), successors.T, strict=False):
        transition[np.arange(clusters), successor] += share
    interest = np.full((types, clusters), 0.04 / clusters)
    for row in interest:
        favourites = rng.choice(clusters, config.clusters_per_type, replace=False)
        row[favourites] += rng.dirichlet(np.full(config.clusters_per_type, 5.0))
    affinity = config.affinity_scale * rng.standard_normal((types, clusters))
    quality = config.quality_scale * rng.standard_normal(items)
    return PlantedModel(
        cluster=cluster,
        choice=choice,
        transition=transition / transition.sum(axis=1, keepdims=True),
        interest=interest / interest.sum(axis=1, keepdims=True),
        transition_weight=config.transition_weight,
        action=1 / (1 + np.exp(-(affinity[:, cluster] + quality))),
    )


def ranking_metrics(ranks: np.ndarray) -> dict[str, float]:
    """HR@10, HR@50, NDCG@10 and MRR of average-tie ranks [S]."""
    gains = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
    return {
        "HR@10": float(np.mean(ranks <= 10)),
        "HR@50": float(np.mean(ranks <= 50)),
        "NDCG@10": float(gains.mean()),
        "MRR": float(np.mean(1 / ranks)),
    }


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    """AUC, ties counted half, of scores [S] for labels [S] in {0, 1}; 0.5 when there is only one class."""
    values, inverse = np.unique(scores, return_inverse=True)
    positive = np.bincount(inverse, weights=labels, minlength=len(values))
    negative = np.bincount(inverse, weights=1 - labels, minlength=len(values))
    pairs = positive.sum() * negative.sum()
    below = negative.cumsum() - negative
    return float((positive * (below + negative / 2)).sum() / pairs) if pairs else 0.5


def generate(
    config: SyntheticConfig,
    name: str = "synthetic",
    progress: Progress = lambda what, events, share: None,
) -> EncodedDataset:
    """Draw a planted data set; the same config gives the same data, bit for bit.

    Memory grows with the events (some 40 bytes each) and with the catalogue, not with their product.
    """
    seeds = np.random.SeedSequence(config.seed).spawn(10)
    plan, sizes, draws, labels, context, clock = (np.random.default_rng(seed) for seed in seeds[:6])
    model = plant(config, plan)
    users = config.num_users
    types = plan.integers(config.num_types, size=users)
    weights = distribution_weights(config.seqlen_distribution, config.max_seqlen - config.min_seqlen + 1)
    lengths = config.min_seqlen + sizes.choice(len(weights), size=users, p=weights)
    times, events = _draw_times(lengths, clock), int(lengths.sum())
    planted = draw_features(config.planted_features, events, config.num_brands, config.num_clusters, seeds[6])
    leads = config.feature_weight * bool(planted.share.any())
    model = replace(model, lead_weight=leads, lead_share=planted.share)
    models, spans = _models_of_spans(config, model, times, lengths, seeds)
    given = Circumstances(planted.lead, spans)
    items = _draw_all(models, types, lengths, given, draws, progress)
    # For who does not see the price the order is the same as of the mean over prices, which rises with it.
    without = model.action[np.repeat(types, lengths), items]
    price = planted.price(config.price_scale)
    probability = without if price is None else 1 / (1 + (1 / without - 1) * np.exp(price))
    actions = (labels.random(events) < probability).astype(np.int64)
    shown = context.random(users) < config.context_visibility
    segment = np.where(shown, types, context.integers(config.num_types, size=users))
    progress("scoring the oracle", events, 0.0)

    texts = [draw_titles(model.cluster, seeds[8])] if config.titles else []
    sequences = (types, items, lengths)
    scores = _best_possible(models, sequences, given, probability, actions)
    if planted.values:
        unseen = Circumstances(np.full(events, -1), given.span)
        scores |= _best_possible(models, sequences, unseen, without, actions, WITHOUT_FEATURES)
    schema = Schema(
        name=name,
        features=(
            Feature(name="user_id", role="user", vocab_size=users),
            Feature(name="segment", level="user", kind="categorical", vocab_size=config.num_types),
            Feature(name="item_id", role="item", vocab_size=config.num_items),
            Feature(name="cluster", level="item", kind="categorical", vocab_size=config.num_clusters),
            Feature(name="action", role="action", vocab_size=2, action_type="bitmask"),
            Feature(name="timestamp", role="time"),
            *planted.features(config.num_brands),
            *(feature for feature, _, _ in texts),
        ),
        counts=count_statistics(lengths, config.num_items, repeats=0),
        source={"SyntheticConfig": hashlib.sha256(json.dumps(asdict(config)).encode()).hexdigest()},
        best_possible=scores,
    )
    sizes_of = {f.name: f.vocab_size for f in schema.features if f.vocab_size and f.role != "action"}
    return EncodedDataset(
        schema=schema,
        lengths=lengths,
        contexts={"segment": segment},
        events={"item_id": items, "action": actions, "timestamp": times, **planted.values},
        vocabularies={feature: pa.array(np.arange(size)) for feature, size in sizes_of.items()}
        | {feature.name: originals for feature, _, originals in texts},
        categories={"cluster": model.cluster} | {feature.name: ids for feature, ids, _ in texts},
    )


def _models_of_spans(
    config: SyntheticConfig,
    model: PlantedModel,
    times: np.ndarray,
    lengths: np.ndarray,
    seeds: list[np.random.SeedSequence],
) -> tuple[list[PlantedModel], np.ndarray]:
    """Return the probabilities of each span, of time or before a user's last two events, and the span of events [T]."""
    if config.cold_share:
        cold = draw_cold(model.cluster, config.cold_share, seeds[9])
        warm = np.where(cold, 0.0, model.choice)
        first = replace(model, choice=warm / np.bincount(model.cluster, warm)[model.cluster])
        return [first, model], in_last_two(lengths)
    if config.popularity_drift:
        return drifting(model, config.popularity_drift, seeds[7]), spans_of(times)
    return [model], np.zeros(len(times), np.int64)


def _best_possible(
    models: list[PlantedModel],
    sequences: tuple[np.ndarray, np.ndarray, np.ndarray],
    given: Circumstances,
    probability: np.ndarray,
    actions: np.ndarray,
    suffix: str = "",
) -> dict[str, dict[str, float]]:
    """Score the oracle on the held-out events of ``sequences``: types and lengths [U] of users, items [T] between."""
    ranks, last = oracle_ranks(models, *sequences, given), np.cumsum(sequences[2]) - 1
    found = {}
    for split, (column, held_out) in {"valid": (0, last - 1), "test": (1, last)}.items():
        auc = area_under_curve(probability[held_out], actions[held_out])
        found[split + suffix] = {"AUC": auc, **ranking_metrics(ranks[:, column])}
    return found


def _draw_all(
    models: list[PlantedModel],
    types: np.ndarray,
    lengths: np.ndarray,
    given: Circumstances,
    rng: np.random.Generator,
    progress: Progress,
) -> np.ndarray:
    """Draw the items of all users, blocks of them in threads; flat, [T]."""
    samplers, total, lock = [Sampler(model) for model in models], int(lengths.sum()), threading.Lock()
    ends = np.cumsum(lengths)
    drawn = 0

    def tell(events: int) -> None:
        nonlocal drawn
        with lock:
            drawn += events
            progress("drawing events", drawn, drawn / total)

    def draw(block: slice, uniform: np.ndarray) -> np.ndarray:
        first, last = block.start, min(block.stop, len(types)) - 1
        events = slice(ends[first] - lengths[first], ends[last])
        return draw_items(samplers, types[block], lengths[block], given.of(events), uniform, tell)

    blocks = [slice(start, start + _BLOCK) for start in range(0, len(types), _BLOCK)]
    uniform = [rng.random(int(lengths[block].sum())) for block in blocks]
    pool = ThreadPoolExecutor(_THREADS)
    try:
        return np.concatenate(list(pool.map(draw, blocks, uniform)))
    finally:
        pool.shutdown(cancel_futures=True)


def _draw_times(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Strictly increasing seconds within each user, [T]: log-normal gaps, half of them under an hour."""
    gaps = 1 + np.exp(8.2 + 1.5 * rng.standard_normal(int(lengths.sum()))).astype(np.int64)
    first = np.cumsum(lengths) - lengths
    gaps[first] = rng.integers(86_400 * 30, size=len(lengths))
    elapsed = gaps.cumsum()
    return _START + elapsed - np.repeat(elapsed[first] - gaps[first], lengths)


def write_synthetic(config: SyntheticConfig, directory: str | Path) -> Schema:
    """Draw a planted data set and write it into ``directory``; returns its schema."""
    directory = Path(directory)
    return write_dataset(generate(config, name=directory.resolve().name), directory)
