"""Declared features in models: each value reaches the tokens of its event, user or item and none that it may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hstu.config import Config, ConfigError
from hstu.data import SequenceDataset, Split, leave_one_out
from hstu.data.batch import Batch, keyed_features
from hstu.data.reader import Sequences
from hstu.data.schema import Feature
from hstu.data.values import Sets
from hstu.models import RetrievalModel, build_model, make_collator
from hstu.models.binding import MERGED_CONTEXT
from tests.models.test_models import totals
from tests.samples import declared_features, make_config, make_dataset, scores_of

LENGTHS = (3, 4, 12, 7, 5)
EVENTS, OUTCOMES = ("device", "price", "place", "tags"), ("watched", "ending", "marks")
NO_NOISE = "FeatureArgs.unknown_rate=1e-12"
CANDIDATES = "DatasetArgs.max_num_candidates=3"
KINDS = {
    "history": ("ranking",),
    "candidates": ("ranking", CANDIDATES),
    "added": ("ranking", CANDIDATES, "NetworkArgs.token_layout='add'"),
    "no_actions": ("ranking", CANDIDATES, "NetworkArgs.token_layout='item'"),
    "next": ("retrieval", "NetworkArgs.token_layout='interleave'"),
    "masked": ("retrieval", "NetworkArgs.backbone='bert'"),
}
WAYS = {
    "defaults": (),
    "merged": ("FeatureArgs.context_merge='concat'", "FeatureArgs.merge_hidden_size=7"),
    "sums": ("FeatureArgs.merge='sum'", "FeatureArgs.item_merge='concat'", "FeatureArgs.number_encoding='linear'"),
    "scaled": ("FeatureArgs.merge='multiply'", "FeatureArgs.item_merge='multiply'", "FeatureArgs.widths={'likes': 5}"),
    "raw": ("FeatureArgs.number_encoding='raw'", "FeatureArgs.number_scaling='quantile'",
            "NetworkArgs.item_embedding='categorical'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    folder = tmp_path_factory.mktemp("data") / "small"
    return make_dataset(folder, LENGTHS, num_items=30, declared=declared_features())


def build(dataset: SequenceDataset, config: Config) -> Any:
    """A model whose every weight is random."""
    model = build_model(config, dataset.schema)
    assert model.item_encoder is not None
    model.item_encoder.read(dataset)
    for index, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(index))
    return model


def batch_of(dataset: Any, config: Config, split: str = "train", rows: list[int] | None = None) -> Batch:
    chosen = leave_one_out(dataset.lengths)[split]
    numbers = np.arange(len(chosen)) if rows is None else np.array(rows, np.int64)
    return make_collator(config, dataset.schema)(dataset, chosen, numbers, numbers + 40, 2)


def config_of(kind: str, *lines: str) -> Config:
    task, *own = KINDS[kind]
    return make_config(task, *own, *lines)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(dataset: SequenceDataset, kind: str, way: str) -> None:
    config = config_of(kind, *WAYS[way])
    model = build(dataset, config)
    batch = batch_of(dataset, config)
    event = int(batch.lengths("item")[:2].sum())  # of a long history, whatever the draws are something is missing
    for name, numbers in batch.numbers.items():
        numbers[2 if name in ("income", "face") else event] = torch.nan
    for place in range(len(model.item_encoder.numbers)):
        model.item_encoder.get_buffer(f"numbers_{place}")[batch.ids("item")[event]] = torch.nan
    model(batch).total.backward()
    still = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert not still
    nobody = batch_of(dataset, config, rows=[])  # a rank without samples runs the same backward
    model.zero_grad()
    model(nobody).total.backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())
    for some in (batch, nobody):
        assert model.num_tokens(some) == model.lay_out(some).num_local


# What the tokens hold, event by event


def rows_of(model: Any, name: str, ids: Any) -> Tensor:
    tables = {key: table.name for table in model.embeddings.tables for key in table.features}
    rows: Tensor = model.embeddings.weights[tables[name]][torch.as_tensor(ids, dtype=torch.int64)]
    return rows


def part(model: Any, encoders: Any, feature: Feature, key: str, value: Any) -> Tensor:
    """The vector of one value, [1, width]: a mean of rows, a row, or what its encoder makes of the numbers."""
    if feature.kind == "multi":
        rows = rows_of(model, key, value)
        return rows.mean(0, keepdim=True) if len(value) else rows.new_zeros(1, rows.shape[1])
    if feature.kind == "categorical":
        return rows_of(model, key, [int(value)])
    vector: Tensor = encoders.encoders[feature.name](torch.tensor(value)[None])
    return vector


def value_at(values: Any, place: int) -> Any:
    return values.ids[values.offsets[place] : values.offsets[place + 1]] if isinstance(values, Sets) else values[place]


def item_vector(model: Any, dataset: SequenceDataset, item: int) -> Tensor:
    encoder, features = model.item_encoder, dataset.schema.of("item")
    parts = {
        f.name: part(model, encoder.encoders, f, f"item:{f.name}", value_at(dataset.item_features(f.name), item))
        for f in features
    }
    if "item" in model.embeddings.weights:
        parts["item"] = rows_of(model, "item", [item])
    vector: Tensor = encoder.merge(parts)
    return vector


def blank(feature: Feature) -> Any:
    missing = {"multi": np.empty(0, np.int64), "categorical": feature.vocab_size}
    return missing.get(feature.kind, np.full(feature.width or 1, np.nan, np.float32))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["history", "candidates", "no_actions"])
@torch.no_grad()
def test_tokens_hold_what_a_loop_over_events_joins(dataset: SequenceDataset, kind: str, way: str) -> None:
    config = config_of(kind, NO_NOISE, *WAYS[way])
    model, batch = build(dataset, config), batch_of(dataset, config)
    request = model.request(batch)
    found = model.token_vectors(model.join(model.embeddings(request.features), request.values), request)
    items, actions, contexts, schema = [], [], [], dataset.schema
    tokens, known = model.feature_tokens, {feature.name: feature for feature in schema.features}

    def own(events: Sequences, names: tuple[str, ...], encoders: Any, place: int | None) -> dict[str, Tensor]:
        chosen = {n: blank(known[n]) if place is None else value_at(events.of_events[n], place) for n in names}
        return {n: part(model, encoders, known[n], n, value) for n, value in chosen.items()}

    for sample, user in enumerate(batch.users.tolist()):
        length, asked = int(batch.lengths("item")[sample]), int(batch.num_candidates[sample])
        stop = LENGTHS[user] - 2
        at = np.array([user]), np.array([stop - length]), np.array([stop])
        events = dataset.gather(*at, (*EVENTS, *OUTCOMES, "income", "face", "likes"))
        for place in range(length):
            is_asked = place >= length - asked

            parts = {
                "item": item_vector(model, dataset, int(events.items[place])),
                **own(events, EVENTS, tokens.events, place),
            }
            if kind == "no_actions":
                parts |= own(events, OUTCOMES, tokens.events, None if is_asked else place)
            items.append(tokens.merges["events"](parts))
            if kind != "no_actions" and not is_asked:
                assert events.actions is not None
                parts = {"action": rows_of(model, "action", [events.actions[place]])}
                actions.append(tokens.merges["outcomes"](parts | own(events, OUTCOMES, tokens.outcomes, place)))
        of_user = {name: value_at(values, 0) for name, values in (events.of_users | events.contexts).items()}
        contexts.append({n: part(model, tokens.users, known[n], n, value) for n, value in of_user.items()})
    torch.testing.assert_close(found["item"], torch.cat(items), rtol=1e-5, atol=1e-5)
    if kind != "no_actions":
        torch.testing.assert_close(found["action"], torch.cat(actions), rtol=1e-5, atol=1e-5)
    if way == "merged":
        whole = torch.cat([tokens.merges["users"](parts) for parts in contexts])
        torch.testing.assert_close(found[MERGED_CONTEXT], whole, rtol=1e-5, atol=1e-5)
    else:
        assert model.feature_tokens.contexts == ("country", "age", "income", "face", "likes")
        for name in model.feature_tokens.contexts:
            torch.testing.assert_close(found[name], torch.cat([parts[name] for parts in contexts]))


# What a labelled row may see of a feature


def changed(batch: Batch, name: str, event: int, vocabulary: int) -> Batch:
    """The batch with another value of a feature of one event."""
    if name in batch.numbers:
        numbers = batch.numbers[name].clone()
        numbers[event] = numbers[event].nan_to_num(0.0) + 1.0
        return replace(batch, numbers=batch.numbers | {name: numbers})
    names = batch.features.keys()
    values = {key: batch.ids(key).clone() for key in names}
    values[name][event] = (values[name][event] + 1) % vocabulary
    lengths = batch.features.lengths()
    sizes = [own.numel() for own in values.values()]
    return replace(batch, features=keyed_features(names, torch.cat([*values.values()]), lengths, sizes))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "masked"])
@torch.no_grad()
def test_rows_see_features_of_what_is_before_them(dataset: SequenceDataset, kind: str, split: str) -> None:
    smooth = ("RankingArgs.prediction_head_act_type='gelu'",) if KINDS[kind][0] == "ranking" else ()
    config = config_of(kind, NO_NOISE, *smooth)
    model, batch = build(dataset, config), batch_of(dataset, config, split, [1, 3])
    before, lengths = scores_of(model, batch), batch.lengths("item")
    owner = torch.repeat_interleave(lengths).tolist()
    starts = np.cumsum([0, *lengths.tolist()])
    rows = [(owner[e], e - starts[owner[e]]) for e in batch.label_events.tolist()]
    has_action = kind != "no_actions"
    for event, sample in enumerate(owner):
        place = event - starts[sample]
        is_asked = place >= int(lengths[sample] - batch.num_candidates[sample])
        for name in ("device", "price", "watched", "ending"):
            after = scores_of(model, changed(batch, name, event, 3))
            late = name in OUTCOMES and has_action
            for row, (own, at) in enumerate(rows):
                # Of what is asked about nothing late is there; without actions a late value would join the item.
                may = own == sample and (place < at or (place == at and not (late and KINDS[kind][0] == "ranking")))
                may &= not is_asked or (at == place and not late)
                assert torch.equal(after[row], before[row]) != may, (name, sample, place, own, at)


class Altered:
    """A data set in which the last event before each ``stop`` went otherwise."""

    def __init__(self, dataset: SequenceDataset, split: Split) -> None:
        self.dataset, self.schema, self.lengths = dataset, dataset.schema, dataset.lengths
        self.last = dict(zip(split.users.tolist(), (split.stop - 1).tolist(), strict=True))

    def gather(self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple = ()) -> Sequences:
        found = self.dataset.gather(users, start, stop, features)
        places = np.concatenate([np.arange(a, b) for a, b in zip(start, stop, strict=True)] or [np.empty(0, int)])
        last = places == np.array([self.last[user] for user in np.repeat(users, found.lengths).tolist()], int)
        other = dict(found.of_events)
        other["watched"] = np.where(last[:, None], np.float32(5.0), found.of_events["watched"])
        other["ending"] = np.where(last, (found.of_events["ending"] + 1) % 3, found.of_events["ending"])
        assert found.actions is not None
        return replace(found, of_events=other, actions=np.where(last, (found.actions + 1) % 4, found.actions))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("kind", ["candidates", "added", "no_actions", "history"])
@torch.no_grad()
def test_how_the_predicted_event_went_changes_no_score(dataset: SequenceDataset, kind: str, split: str) -> None:
    config = config_of(kind, NO_NOISE)
    model, chosen = build(dataset, config).eval(), leave_one_out(dataset.lengths)[split]
    other: Any = Altered(dataset, chosen)
    scores = scores_of(model, batch_of(dataset, config, split))
    assert torch.equal(scores, scores_of(model, batch_of(other, config, split)))
    if split != "train":  # and what training calls the future is the past of the next request
        later: Any = Altered(dataset, leave_one_out(dataset.lengths)["valid"])
        expected = scores_of(model, batch_of(dataset, config, "test"))
        assert not torch.equal(scores_of(model, batch_of(later, config, "test")), expected)


def test_masked_events_hide_their_features_too(dataset: SequenceDataset) -> None:
    config = config_of("masked", NO_NOISE)
    model, batch = build(dataset, config).eval(), batch_of(dataset, config, "test", [2, 3])
    before = scores_of(model, batch)
    hidden = (batch.lengths("item").cumsum(0) - 1).tolist()
    for name in ("device", "price", "watched", "ending"):
        for event in range(batch.num_events):
            after = scores_of(model, changed(batch, name, event, 3))
            assert torch.equal(after, before) == (event in hidden), (name, event)
    with pytest.raises(ConfigError, match="swap_rate = 0.1: could show what bert is to predict"):
        build_model(config_of("masked", "FeatureArgs.swap_rate=0.1"), dataset.schema)


# Ranks, noise, items


@pytest.mark.parametrize("way", ["defaults", "merged"])
@pytest.mark.parametrize("kind", ["candidates", "next"])
@torch.no_grad()
def test_losses_do_not_depend_on_the_number_of_ranks(
    dataset: SequenceDataset, kind: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(kind, *WAYS[way], "FeatureArgs.swap_rate=0.3", "FeatureArgs.unknown_rate=0.2")
    expected = totals(dataset, config, 1, monkeypatch)
    for world in (2, 4):  # in which some ranks have no samples
        assert totals(dataset, config, world, monkeypatch) == pytest.approx(expected, rel=1e-5)
    calm = replace(config, feature=replace(config.feature, swap_rate=0.0))
    assert totals(dataset, calm, 1, monkeypatch) != pytest.approx(expected, rel=1e-3), "something was swapped"


def test_swaps_are_of_earlier_events_by_seed_and_sample(dataset: SequenceDataset, tmp_path: Path) -> None:
    large = make_dataset(tmp_path / "small", [12] * 200, num_items=300, declared=declared_features())
    config = config_of("next", "FeatureArgs.swap_rate=0.4", NO_NOISE, "DatasetArgs.max_history_seqlen=20")
    model: Any = build_model(config, large.schema)
    batch = batch_of(large, config)
    true, noisy = batch.ids("device"), model.feature_tokens.values(batch, model.lay_out(batch)).ids("device")
    count, swapped = 0, []
    for a, b in zip(true.view(200, 10), noisy.view(200, 10), strict=True):
        assert a[0] == b[0] and ((a == 5) <= (b == 5)).all(), "nothing comes before the first; missing stays missing"
        for place in range(10):
            assert b[place] in a[: place + 1]
        count += int((a != b).sum())
        swapped.append(tuple((a != b).tolist()))
    # Of 0.4, those of 5 of 6 values that are known, whose source is another event (0.71) and value (0.83 of those).
    assert 0.14 < count / 2000 < 0.26 and len(set(swapped)) > 50
    rows = np.arange(200)[::-7].copy()
    few = make_collator(config, large.schema)(large, leave_one_out(large.lengths)["train"], rows, rows + 40, 2)
    part = model.feature_tokens.values(few, model.lay_out(few)).ids("device")
    assert torch.equal(part.view(-1, 10), noisy.view(200, 10)[rows])
    model.eval()
    assert torch.equal(model.feature_tokens.values(batch, model.lay_out(batch)).ids("device"), true)
    with pytest.raises(ConfigError, match="swap_rate"):
        config_of("next", "FeatureArgs.swap_rate=1.0")


def test_item_features_are_swapped_by_item_and_step(tmp_path: Path) -> None:
    large = make_dataset(tmp_path / "small", [5] * 4, num_items=4000, declared=declared_features())
    with pytest.raises(ConfigError, match="items lack a value of 'brand'"):
        build(large, config_of("next", "FeatureArgs.unknown_rate=0.0"))
    model = build_model(config_of("next", "FeatureArgs.swap_rate=0.4", NO_NOISE), large.schema)
    assert model.item_encoder is not None
    model.item_encoder.read(large)
    items, true = torch.arange(4000), torch.from_numpy(large.item_features("brand"))
    drawn = [model.item_encoder.ids_of(items, step)[0] for step in (0, 1)]
    for ids in drawn:  # 4 of 5 values differ
        assert 0.27 < float((ids != true).double().mean()) < 0.37
    assert not torch.equal(*drawn)
    assert torch.equal(model.item_encoder.ids_of(items.flip(0), 1)[0].flip(0), drawn[1])


def test_an_item_never_trained_is_ranked_by_its_features(dataset: SequenceDataset) -> None:
    config = config_of("next", "RetrievalArgs.loss='full_softmax'", NO_NOISE, "NetworkArgs.output_norm='none'")
    model, batch = build(dataset, config).eval(), batch_of(dataset, config)
    assert isinstance(model, RetrievalModel)
    with torch.no_grad():
        everything = model.catalogue_vectors(batch, torch.arange(30))
        expected = torch.cat([item_vector(model, dataset, item) for item in range(30)])
        torch.testing.assert_close(everything, expected)
        for name in ("brand", "weight", "genres", "image"):  # each of its features moves it
            encoder = model.item_encoder
            assert encoder is not None
            before = {n: own.clone() for n, own in encoder.named_buffers()}
            if name == "brand":
                encoder.ids[0, 7] = (encoder.ids[0, 7] + 1) % 4
            elif name == "genres":
                encoder.get_buffer("set_ids_0").add_(1).remainder_(5)
            else:
                encoder.get_buffer(f"numbers_{['weight', 'image'].index(name)}")[7] = 2.5
            moved = (model.catalogue_vectors(batch, torch.arange(30)) != everything).any(1)
            own = torch.from_numpy(dataset.item_features("genres").lengths > 0)  # type: ignore[union-attr]
            assert torch.equal(moved, own if name == "genres" else torch.arange(30) == 7), name
            for n, value in before.items():
                encoder.get_buffer(n).copy_(value)


def test_ids_that_no_trained_item_has_leave_their_sets(dataset: SequenceDataset) -> None:
    config = config_of("next")
    model: Any = build_model(config, dataset.schema)
    met = np.array([True, False, True, True, True, False])
    model.item_encoder.read(dataset, {"genres": met})
    items = torch.tensor([3, 3, 29, 0])
    members, lengths = model.item_encoder._members(0, items)
    sets = dataset.item_features("genres")
    expected = [[i for i in value_at(sets, item).tolist() if met[i]] for item in items.tolist()]
    assert [own.tolist() for own in members.split(lengths.tolist())] == expected


# Tables


def test_widths_follow_the_rule_or_the_config_and_tables_are_shared(dataset: SequenceDataset) -> None:
    def widths(*lines: str) -> dict[str, tuple[int, int, tuple[str, ...]]]:
        model = build_model(config_of("candidates", *lines), dataset.schema)
        return {table.name: (table.rows, table.width, table.features) for table in model.embeddings.tables}

    found = widths()
    assert found["device"] == (6, 4, ("device",))  # 2 * 5 ** 0.25 = 2.99; a row for unknown ones
    assert found["likes"] == (6, 8, ("likes", "tags")), "a context is as wide as the stream, and who shares its table"
    assert found["brand"] == (5, 8, ("item:brand",)) and found["genres"][:2] == (5, 8), "added up with the item"
    assert widths("FeatureArgs.widths={'tags': 12, 'device': 3, 'brand': 6}")["likes"][1] == 12
    assert widths("FeatureArgs.shared_tables={'tags': 'likes'}") == found
    assert "device" not in widths("FeatureArgs.event_features=('price',)")
    assert widths("FeatureArgs.item_merge='concat'")["brand"][1] == 4
    assert "brand" not in widths("FeatureArgs.item_features=('weight',)")
    assert "brand" not in widths("NetworkArgs.item_embedding='local'")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("FeatureArgs.event_features=('prise',)", "no feature of events 'prise'; it has: device, price, place"),
        ("FeatureArgs.item_features=('price',)", "no feature of items 'price'; it has: brand"),
        ("FeatureArgs.widths={'colour': 3}", "reads no feature 'colour'"),
        ("FeatureArgs.number_encodings={'prise': 'raw'}", "reads no feature 'prise'"),
        ("FeatureArgs.widths={'tags': 3, 'likes': 4}", "are of one table, 'likes', which has one width"),
        ("FeatureArgs.shared_tables={'device': 'brand'}", "have different vocabularies"),
        ("FeatureArgs.shared_tables={'device': 'colour'}", "reads no feature 'colour'"),
        ("DatasetArgs.contextual_feature_names=('price',)", "no context feature 'price'; it has: country, age, income"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(dataset: SequenceDataset, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model(config_of("candidates", line), dataset.schema)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Tasks


@pytest.mark.parametrize("kind", ["history", "candidates", "no_actions"])
@torch.no_grad()
def test_tasks_predict_features_that_inputs_do_not_show(dataset: SequenceDataset, kind: str) -> None:
    tasks = (("watch", "regression", "watched"), ("end", "multiclass", "ending"), ("did", "multiclass", "action"))
    lines = (
        f"RankingArgs.tasks={tasks!r}",
        "RankingArgs.prediction_head_arch=[6, 8]",
        "RankingArgs.eval_metrics=['MAE']",
    )
    config = config_of(kind, *lines)
    model, batch = build(dataset, config), batch_of(dataset, config)
    logits = model.logits(model.scoring_request(batch))
    stops, at, expected = np.cumsum(batch.lengths("item").numpy()), 0, 0.0
    for event in batch.label_events.tolist():
        sample = int(np.searchsorted(stops, event, side="right"))
        user, left = int(batch.users[sample]), stops[sample] - event
        place = np.array([LENGTHS[user] - 2 - left])
        true = dataset.gather(np.array([user]), place, place + 1, ("watched", "ending"))
        watched, ending = float(true.of_events["watched"][0, 0]), int(true.of_events["ending"][0])
        row = logits[at].double()
        expected += 0.0 if np.isnan(watched) else (float(row[0]) - watched) ** 2
        expected -= float(row[1:4].log_softmax(0)[ending]) if ending < 3 else 0.0
        assert true.actions is not None
        expected -= float(row[4:8].log_softmax(0)[true.actions[0]])
        at += 1
    assert at == batch.labels.numel() > 4 and float(model(batch).total) == pytest.approx(expected, rel=1e-5)


def test_data_without_actions_are_ranked_by_features(tmp_path: Path) -> None:
    bare = make_dataset(tmp_path / "small", LENGTHS, num_items=30, num_actions=None, declared=declared_features())
    lines = ("RankingArgs.tasks=(('w', 'regression', 'watched'),)", "RankingArgs.prediction_head_arch=[6, 1]")
    config = config_of("no_actions", *lines)
    model, batch = build(bare, config), batch_of(bare, config)
    loss = model(batch)
    assert loss.count == batch.labels.numel() > 0 and float(loss.total.detach()) > 0
