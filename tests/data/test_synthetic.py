"""Planted data follow the known probabilities, and the oracle's scores are what a slow count gives."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu.data import (
    EncodedDataset,
    SequenceDataset,
    SyntheticConfig,
    generate,
    leave_one_out,
    write_synthetic,
)
from hstu.data import planted as module
from hstu.data.planted_text import title_words
from hstu.data.synthetic import PlantedModel, area_under_curve, distribution_weights, plant

TINY = SyntheticConfig(num_users=200, num_items=60, num_clusters=8, num_types=3, min_seqlen=3, max_seqlen=30)


def planted(config: SyntheticConfig) -> tuple[PlantedModel, np.ndarray]:
    """The known probabilities and the users' types of ``generate(config)``."""
    rng = np.random.default_rng(np.random.SeedSequence(config.seed).spawn(6)[0])
    return plant(config, rng), rng.integers(config.num_types, size=config.num_users)


def sequences(dataset: EncodedDataset, name: str) -> list[list[int]]:
    return [part.tolist() for part in np.split(dataset.events[name], np.cumsum(dataset.lengths)[:-1])]


def next_item(config: SyntheticConfig, model: PlantedModel, kind: int, history: list[int]) -> dict[int, float]:
    """Probability of every item that is not in the history, written out."""
    weight = {}
    for item in set(range(config.num_items)) - set(history):
        cluster = model.cluster[item]
        p_cluster = model.interest[kind, cluster]
        if history:
            from_last = model.transition[model.cluster[history[-1]], cluster]
            p_cluster = (1 - config.transition_weight) * p_cluster + config.transition_weight * from_last
        weight[item] = p_cluster * model.choice[item]
    total = sum(weight.values())
    return {item: value / total for item, value in weight.items()}


def test_best_possible_equals_a_slow_count() -> None:
    dataset = generate(TINY)
    model, types = planted(TINY)
    items, actions = sequences(dataset, "item_id"), sequences(dataset, "action")
    for name, back in (("valid", 2), ("test", 1)):
        ranks, scored = [], []
        for user, kind in enumerate(types):
            place = len(items[user]) - back
            target = items[user][place]
            probability = next_item(TINY, model, kind, items[user][:place])
            higher = sum(p > probability[target] * (1 + 1e-9) for p in probability.values())
            near = sum(abs(p / probability[target] - 1) <= 1e-9 for p in probability.values())
            ranks.append(1 + higher + (near - 1) / 2)
            scored.append((model.action[kind, target], actions[user][place]))
        positive = [p for p, label in scored if label]
        negative = [p for p, label in scored if not label]
        pairs = [(p > q) + 0.5 * (p == q) for p in positive for q in negative]
        expected = {
            "AUC": sum(pairs) / len(pairs),
            "HR@10": sum(rank <= 10 for rank in ranks) / len(ranks),
            "HR@50": sum(rank <= 50 for rank in ranks) / len(ranks),
            "NDCG@10": sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / len(ranks),
            "MRR": sum(1 / rank for rank in ranks) / len(ranks),
        }
        assert dataset.schema.best_possible[name] == pytest.approx(expected, abs=1e-12)


FEATURES = replace(TINY, event_features="number,brand,price", num_brands=3, num_users=150)


def cells(dataset: EncodedDataset) -> list[list[tuple[int, int]]]:
    """Brand and quarter of the number of each event."""
    brands, numbers = dataset.events["brand"], dataset.events["number"][:, 0]
    quarters = sum((numbers > edge).astype(int) for edge in (-0.6744897501960817, 0.0, 0.6744897501960817))
    pairs = list(zip(brands.tolist(), quarters.tolist(), strict=True))
    ends = np.cumsum(dataset.lengths)
    return [pairs[end - length : end] for end, length in zip(ends, dataset.lengths, strict=True)]


def learned_table(dataset: EncodedDataset, model: PlantedModel) -> dict[tuple[int, int], int]:
    """The cluster that most often follows each brand and quarter."""
    counts: dict[tuple[int, int], np.ndarray] = {}
    for items, given in zip(sequences(dataset, "item_id"), cells(dataset), strict=True):
        for cell, item in zip(given, items[1:], strict=False):
            counts.setdefault(cell, np.zeros(8))[model.cluster[item]] += 1
    assert min(count.max() / count.sum() for count in counts.values()) > 0.4
    return {cell: int(count.argmax()) for cell, count in counts.items()}


def test_best_possible_with_and_without_features_equals_a_slow_count() -> None:
    dataset = generate(FEATURES)
    model, types = planted(FEATURES)
    table, given = learned_table(dataset, model), cells(dataset)
    assert len(table) == 12
    weight, mean = FEATURES.feature_weight, np.bincount(list(table.values()), minlength=8) / 12
    items, prices = sequences(dataset, "item_id"), np.split(dataset.events["price"][:, 0], np.cumsum(dataset.lengths))
    actions = sequences(dataset, "action")
    best = dataset.schema.best_possible
    for sees, suffix in ((True, ""), (False, " without features")):
        ranks, scored = [], []
        for user, kind in enumerate(types):
            target, history = items[user][-1], items[user][:-1]
            base = next_item(FEATURES, model, kind, [])
            probability = {}
            for item in set(base) - set(history):
                cluster = model.cluster[item]
                led = float(table[given[user][-2]] == cluster) if sees else mean[cluster]
                mixture = model.interest[kind, cluster] + model.transition[model.cluster[history[-1]], cluster]
                probability[item] = ((1 - weight) * mixture / 2 + weight * led) * model.choice[item]
            higher = sum(p > probability[target] * (1 + 1e-9) for p in probability.values())
            near = sum(abs(p / probability[target] - 1) <= 1e-9 for p in probability.values())
            ranks.append(1 + higher + (near - 1) / 2)
            p = model.action[kind, target]
            price = FEATURES.price_scale * float(prices[user][-1]) if sees else 0.0
            scored.append((math.log(p / (1 - p)) - price, actions[user][-1]))
        pairs = [(p > q) + 0.5 * (p == q) for p, yes in scored if yes for q, other in scored if not other]
        found = best["test" + suffix]
        assert found["AUC"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-9)
        assert found["HR@10"] == pytest.approx(np.mean(np.array(ranks) <= 10), abs=1e-12)
        assert found["MRR"] == pytest.approx(np.mean(1 / np.array(ranks)), abs=1e-9)
    assert best["test"]["AUC"] > best["test without features"]["AUC"] + 0.1
    assert best["test"]["MRR"] > best["test without features"]["MRR"] + 0.1


def test_the_price_decides_on_the_action() -> None:
    dataset = generate(replace(FEATURES, event_features="price", num_users=600))
    model, types = planted(replace(FEATURES, num_users=600))
    items, price = dataset.events["item_id"], dataset.events["price"][:, 0].astype(np.float64)
    base = model.action[np.repeat(types, dataset.lengths), items]
    p = 1 / (1 + np.exp(2.0 * price) * (1 / base - 1))
    for low in np.arange(0, 1, 0.1):
        inside = (p >= low) & (p < low + 0.1)
        surprise = (dataset.events["action"] - p)[inside].sum()
        assert abs(surprise) < 4 * math.sqrt((p * (1 - p))[inside].sum())
    assert [*dataset.schema.best_possible] == ["valid", "test", "valid without features", "test without features"]
    assert "number" not in dataset.events and dataset.schema.of("event")[0].statistics.std == pytest.approx(1, abs=0.1)


def test_popularity_drifts() -> None:
    config = replace(TINY, num_users=2500, popularity_drift=1.0, max_seqlen=12)
    drifting, still = (generate(replace(config, popularity_drift=drift)) for drift in (config.popularity_drift, 0.0))
    moved = {}
    for name, dataset in (("drifting", drifting), ("still", still)):
        times = dataset.events["timestamp"]
        spans = (times - times.min()) * 10 // (times.max() - times.min() + 1)
        early, late = (np.bincount(dataset.events["item_id"][spans == span], minlength=60) + 1 for span in (0, 6))
        moved[name] = np.abs(early / early.sum() - late / late.sum()).sum()
    # Of the still data the distance is sampling alone; measured 0.15 and 1.0.
    assert moved["drifting"] > 3 * moved["still"]
    assert drifting.schema.best_possible["test"]["HR@10"] > 0.1
    np.testing.assert_array_equal(drifting.lengths, still.lengths)


def test_written_features_are_read_back(tmp_path: Path) -> None:
    write_synthetic(FEATURES, tmp_path / "tiny")
    dataset, wanted = SequenceDataset.open(tmp_path / "tiny"), generate(FEATURES)
    users = np.arange(dataset.num_users)
    found = dataset.gather(users, users * 0, dataset.lengths, ("number", "brand", "price")).of_events
    assert all((found[name] == wanted.events[name]).all() for name in ("number", "brand", "price"))


def test_ties_count_half() -> None:
    scores, labels = np.array([0.5, 0.5, 0.5, 0.1]), np.array([1, 0, 1, 0])
    assert area_under_curve(scores, labels) == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    # With equal popularity many items tie: an average rank, between the best and the worst case.
    config = replace(TINY, num_clusters=1, clusters_per_type=1, value_distribution="uniform")
    best = generate(config).schema.best_possible["test"]
    left = config.num_items - generate(config).lengths + 1
    assert best["MRR"] == pytest.approx(np.mean(2 / (left + 1)))
    assert best["HR@10"] == 0


def test_items_and_actions_follow_the_known_probabilities() -> None:
    config = replace(TINY, num_users=1500, min_seqlen=8, max_seqlen=10)
    dataset = generate(config)
    model, types = planted(config)
    surprise, variance, actions = 0.0, 0.0, np.zeros((2, 10))
    for kind, items, labels in zip(types, sequences(dataset, "item_id"), sequences(dataset, "action"), strict=True):
        for place in (0, 4, 7):
            probability = next_item(config, model, kind, items[:place])
            likeliest = max(probability, key=probability.get)
            surprise += (items[place] == likeliest) - probability[likeliest]
            variance += probability[likeliest] * (1 - probability[likeliest])
        for item, label in zip(items, labels, strict=True):
            p = model.action[kind, item]
            actions[:, min(int(10 * p), 9)] += label - p, p * (1 - p)
    assert abs(surprise) < 4 * math.sqrt(variance)
    assert np.all(np.abs(actions[0]) < 4 * np.sqrt(actions[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_items": 31},
        {"num_clusters": 3},
        {"value_distribution": "uniform"},
        {"min_seqlen": 29, "num_items": 31},
    ],
)
def test_a_large_catalogue_in_segments_is_drawn_as_if_whole(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(replace(TINY, **changes))
    monkeypatch.setattr(module, "_DIRECT", 8)
    monkeypatch.setattr(module, "_SEGMENT", 7)
    told: list[float] = []
    found = generate(replace(TINY, **changes), progress=lambda what, events, share: told.append(share))
    np.testing.assert_array_equal(found.events["item_id"], whole.events["item_id"])
    assert found.schema == whole.schema and max(told) == 1.0 and len(told) > 20


def test_same_config_gives_the_same_files(tmp_path: Path) -> None:
    def files(config: SyntheticConfig, name: str) -> dict[str, bytes]:
        root = tmp_path / name / "tiny"
        write_synthetic(config, root)
        return {path.name: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    assert files(TINY, "a") == files(TINY, "b")
    assert files(replace(TINY, seed=2), "c")["part-00000.parquet"] != files(TINY, "d")["part-00000.parquet"]


def test_written_data_set_is_read_back(tmp_path: Path) -> None:
    schema = write_synthetic(TINY, tmp_path / "tiny")
    dataset = SequenceDataset.open(tmp_path / "tiny")
    assert dataset.schema == schema and schema.name == "tiny"
    assert schema.counts["users"] == 200 and schema.counts["items"] == 60
    test = leave_one_out(dataset.lengths)["test"]
    batch = dataset.gather(test.users, np.zeros(200), test.stop)
    expected = generate(TINY)
    np.testing.assert_array_equal(batch.items, expected.events["item_id"])
    np.testing.assert_array_equal(batch.times, expected.events["timestamp"])


def test_nobody_sees_an_item_twice_and_times_rise() -> None:
    dataset = generate(replace(TINY, num_items=31))  # up to 30 of 31 items are seen
    for items, times in zip(sequences(dataset, "item_id"), sequences(dataset, "timestamp"), strict=True):
        assert len(set(items)) == len(items)
        assert all(b > a for a, b in zip(times, times[1:], strict=False))


def test_context_shows_most_types() -> None:
    config = replace(TINY, num_users=4000)
    _, types = planted(config)
    share = np.mean(generate(config).contexts["segment"] == types)
    expected = config.context_visibility + (1 - config.context_visibility) / config.num_types
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


@pytest.mark.parametrize("distribution", ["uniform", "normal", "zipf", "lognormal"])
def test_lengths_follow_the_distribution(distribution: str) -> None:
    config = replace(TINY, num_users=4000, seqlen_distribution=distribution)
    lengths = generate(config).lengths
    weights = distribution_weights(distribution, 28)
    assert weights.sum() == pytest.approx(1) and lengths.min() >= 3 and lengths.max() <= 30
    values = np.arange(3, 31)
    mean = (weights * values).sum()
    deviation = math.sqrt((weights * (values - mean) ** 2).sum())
    assert abs(lengths.mean() - mean) < 4 * deviation / math.sqrt(4000)
    peak = {"uniform": None, "normal": 14, "zipf": 1, "lognormal": 7}[distribution]
    if peak:
        assert np.argmax(weights) + 1 == pytest.approx(peak, abs=2)


def test_value_distribution_is_that_of_item_popularity() -> None:
    flat, steep = (
        np.sort(np.bincount(generate(replace(TINY, value_distribution=name)).events["item_id"]))[::-1]
        for name in ("uniform", "zipf")
    )
    assert steep[:6].sum() / steep.sum() > 1.4 * flat[:6].sum() / flat.sum()


def test_default_is_worth_learning() -> None:
    """The oracle is far from certain, and far above popularity and the items' mean action."""
    config = SyntheticConfig()
    dataset = generate(config)
    best = dataset.schema.best_possible["test"]
    assert 200_000 <= dataset.schema.counts["events"] <= 250_000
    assert 0.45 <= best["HR@10"] <= 0.65
    assert 0.78 <= best["AUC"] <= 0.85
    items, actions = dataset.events["item_id"], dataset.events["action"]
    last = np.cumsum(dataset.lengths) - 1
    train = np.ones(len(items), bool)
    train[last] = train[last - 1] = False
    popularity = np.bincount(items[train], minlength=config.num_items)
    likes = np.bincount(items[train], weights=actions[train], minlength=config.num_items)
    hits = [
        np.sum(np.delete(popularity, history[:-1]) > popularity[history[-1]]) < 10
        for history in sequences(dataset, "item_id")
    ]
    assert np.mean(hits) < 0.16
    assert area_under_curve((likes / popularity)[items[last]], actions[last]) < best["AUC"] - 0.08


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": 0}, "num_users = 0 must be at least 1"),
        ({"min_seqlen": 2}, "min_seqlen = 2 must be at least 3"),
        ({"max_seqlen": 2}, "max_seqlen = 2 must be at least 3"),
        ({"num_items": 30}, "num_items = 30 must be at least 31"),
        ({"clusters_per_type": 9}, "num_clusters = 8 must be at least 9"),
        ({"seqlen_distribution": "poisson"}, "'poisson' is none of uniform, normal, zipf, lognormal"),
        ({"transition_weight": 1.5}, "transition_weight = 1.5 must lie in"),
        ({"quality_scale": float("nan")}, "quality_scale = nan must be finite"),
        ({"seed": -1}, "seed = -1"),
        ({"event_features": "number,colour"}, "event_features: 'colour' is not planted; choose some of number, brand"),
        ({"num_brands": 1}, "num_brands = 1 must be at least 2"),
        ({"popularity_drift": -1.0}, "popularity_drift = -1.0 must be finite and not negative"),
        ({"cold_share": 1.0}, "cold_share = 1.0 must be at least 0 and below 1"),
        ({"cold_share": 0.5}, "cold_share = 0.5 leaves 30 items, not more than max_seqlen = 30"),
        ({"cold_share": 0.1, "popularity_drift": 1.0}, "cold_share = 0.1 goes without popularity_drift"),
    ],
)
def test_wrong_configs_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_titles_share_words_by_cluster_and_cold_items_come_last() -> None:
    config = replace(TINY, num_users=300, num_items=160, max_seqlen=12, titles=True, cold_share=0.5)
    dataset, still = generate(config), generate(replace(config, titles=False))
    titles = np.array(dataset.vocabularies["title"].to_pylist())[dataset.categories["title"]]
    for title, cluster in zip(titles, dataset.categories["cluster"], strict=True):
        own, common = title.split()[:3], title.split()[3:]
        assert all(word.startswith(f"k{cluster}w") for word in own) and len({*own}) == 3
        assert all(word.startswith("any") for word in common) and len(common) == 2
        assert {*title.split()} <= {*title_words(config.num_clusters)}
    assert np.array_equal(dataset.events["item_id"], still.events["item_id"]) and "title" not in still.categories
    ends = np.cumsum(dataset.lengths)
    last = np.zeros(ends[-1], bool)
    last[ends - 1] = last[ends - 2] = True
    items = dataset.events["item_id"]
    met = np.unique(items[~last])
    share = np.isin(items[last], met, invert=True).mean()
    assert len(met) <= config.num_items - config.num_clusters * int(0.5 * config.num_items / config.num_clusters)
    assert 0.3 < share < 0.7
    assert dataset.schema.best_possible != generate(replace(config, cold_share=0.0)).schema.best_possible
