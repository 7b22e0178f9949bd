"""The two models: their losses, what their rows may read, and what does not fit together."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import Config, ConfigError
from hstu.data import SequenceDataset, leave_one_out
from hstu.data.batch import POOL, Batch, keyed_features
from hstu.data.loader import BatchLoader
from hstu.data.splits import make_splits
from hstu.models import RankingModel, RetrievalModel, build_model, make_collator
from hstu.ops import Mask
from tests.samples import label_mask, make_config, make_dataset, scores_of

LENGTHS = [3, 9, 4, 12, 5, 3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


def build(dataset: SequenceDataset, config: Config, *, spread: bool = True) -> Any:
    model = build_model(config, dataset.schema)
    if model.item_encoder is not None:
        model.item_encoder.read(dataset)
    for index, parameter in enumerate(model.parameters() if spread else ()):
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(index))
    return model


def batch_of(dataset: SequenceDataset, config: Config, split: str = "train", rows: list[int] | None = None) -> Batch:
    chosen = leave_one_out(dataset.lengths)[split]
    numbers = np.arange(len(chosen)) if rows is None else np.array(rows, np.int64)
    return make_collator(config, dataset.schema)(dataset, chosen, numbers, numbers + 40, 2)


RANKING = {
    "history": ("RankingArgs.prediction_head_arch=[6, 4]",),
    "candidates": ("DatasetArgs.max_num_candidates=3",),
    "candidates_add": ("DatasetArgs.max_num_candidates=3", "NetworkArgs.token_layout='add'"),
    "candidates_item": ("DatasetArgs.max_num_candidates=3", "NetworkArgs.token_layout='item'"),
    "candidates_times": ("DatasetArgs.max_num_candidates=3", "NetworkArgs.num_time_buckets=20"),
    "candidates_full": ("DatasetArgs.max_num_candidates=3", "NetworkArgs.context_attention='full'"),
}
RETRIEVAL = {
    "item": ("NetworkArgs.token_layout='item'",),
    "add": ("NetworkArgs.token_layout='add'",),
    "interleave": ("NetworkArgs.token_layout='interleave'",),
    "narrow": ("NetworkArgs.item_embedding_dim=5",),
    "gaps": ("NetworkArgs.num_time_buckets=20", "NetworkArgs.time_bucket_of='gap'"),
}
EVERY = [("ranking", lines) for lines in RANKING.values()] + [("retrieval", lines) for lines in RETRIEVAL.values()]
PRESETS = ["research", "production"]
WIDTHS = ("NetworkArgs.action_embedding_dim=5", "NetworkArgs.contextual_embedding_dim=3")


def every(preset: str, task: str, lines: tuple[str, ...], *more: str) -> Config:
    return make_config(task, f"NetworkArgs.preset='{preset}'", *lines, *more)


# Losses


def log_softmax_of(scores: list[float], chosen: int) -> float:
    top = max(scores)
    return scores[chosen] - top - math.log(sum(math.exp(s - top) for s in scores))


@pytest.mark.parametrize("name", RANKING)
def test_ranking_loss_multiclass(dataset: SequenceDataset, name: str) -> None:
    config = every("production", "ranking", RANKING[name])
    model, batch = build(dataset, config), batch_of(dataset, config)
    logits = scores_of(model, batch).double()
    loss = model(batch)
    expected = -sum(log_softmax_of(row.tolist(), int(a)) for row, a in zip(logits, batch.labels, strict=True))
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-5)
    assert loss.count == batch.labels.numel() == int(label_mask(batch).sum()) > len(LENGTHS)


def test_ranking_loss_binary_tasks(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "bits", LENGTHS, num_actions=8, action_type="bitmask")
    config = make_config("ranking", "RankingArgs.prediction_head_arch=[6, 3]", "RankingArgs.num_tasks=3")
    model, batch = build(dataset, config), batch_of(dataset, config)
    expected = 0.0
    for row, action in zip(scores_of(model, batch).tolist(), batch.labels.tolist(), strict=True):
        for k, score in enumerate(row):
            expected += math.log1p(math.exp(-score if action // 2**k % 2 else score))
    assert float(model(batch).total.detach()) == pytest.approx(expected, rel=1e-5)


def naive_retrieval(model: RetrievalModel, batch: Batch, config: Config) -> tuple[float, int]:
    """Sum of the loss and live negatives, from queries and the raw table, negatives redrawn by hand."""
    assert config.retrieval is not None
    queries = scores_of(model, batch).double()
    table = model.embeddings.weights["item"].double()  # type: ignore[index, union-attr]
    if config.network.output_norm == "l2":
        table = table / table.norm(dim=-1, keepdim=True)
    pool = {
        "all": list(range(30)),
        "uniform": list(range(30)),
        "in_batch": sorted(set(batch.labels.tolist())),
    }[config.retrieval.negatives]
    starts = np.cumsum([0, *batch.lengths("item").tolist()])
    total, live, t = 0.0, 0, 0
    for b in range(batch.num_samples):
        for place in range(starts[b + 1] - starts[b]):
            if not label_mask(batch)[starts[b] + place]:
                continue
            label = int(batch.ids("item")[starts[b] + place + 1])
            assert label == int(batch.labels[t])
            key = torch.tensor([int(batch.sample_ids[b]) * 2**20 + place])
            columns = model.sampler.columns(key, len(pool))
            drawn = pool if columns is None else [pool[c] for c in columns[0].tolist()]
            negatives = [item for item in drawn if item != label]
            scores = [float(queries[t] @ table[item]) / config.retrieval.temperature for item in [label, *negatives]]
            total, live, t = total - log_softmax_of(scores, 0), live + len(negatives), t + 1
    return total, live


STRATEGIES = {
    "uniform": ("RetrievalArgs.num_negatives=5",),
    "in_batch": ("RetrievalArgs.num_negatives=-1",),
    "in_batch_some": ("RetrievalArgs.num_negatives=3", "RetrievalArgs.sampling_strategy='in_batch'"),
    "full": ("RetrievalArgs.loss='full_softmax'",),
}


@pytest.mark.parametrize("norm", ["l2", "layer_norm", "none"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", RETRIEVAL)
@torch.no_grad()
def test_retrieval_loss(dataset: SequenceDataset, strategy: str, name: str, norm: str) -> None:
    lines = (*RETRIEVAL[name], *STRATEGIES[strategy], f"NetworkArgs.output_norm='{norm}'")
    config = every("research", "retrieval", lines, "RetrievalArgs.temperature=0.4")
    model, batch = build(dataset, config), batch_of(dataset, config)
    total, live = naive_retrieval(model, batch, config)
    loss = model(batch)
    assert float(loss.total) == pytest.approx(total, rel=1e-4)
    assert float(loss.live_negatives) == live > loss.count == batch.labels.numel()


@torch.no_grad()
def assert_evaluation_scores_what_training_trained(model: RetrievalModel, batch: Batch) -> None:
    scores = scores_of(model, batch) @ model.catalogue_vectors(batch, torch.arange(30)).T / model.args.temperature
    expected = torch.nn.functional.cross_entropy(scores, batch.labels, reduction="sum")
    torch.testing.assert_close(model(batch).total, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", ["l2", "layer_norm", "none"])
def test_training_and_evaluation_use_one_similarity(dataset: SequenceDataset, norm: str) -> None:
    lines = ("RetrievalArgs.loss='full_softmax'", f"NetworkArgs.output_norm='{norm}'")
    config = every("research", "retrieval", RETRIEVAL["item"], *lines)
    assert_evaluation_scores_what_training_trained(build(dataset, config), batch_of(dataset, config))


def test_items_normalised_in_training_only_are_caught(
    dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("retrieval", "RetrievalArgs.loss='full_softmax'")
    model, batch = build(dataset, config), batch_of(dataset, config)
    monkeypatch.setattr(model, "catalogue_vectors", lambda batch, ids: model.embeddings.weights["item"][ids])
    with pytest.raises(AssertionError):
        assert_evaluation_scores_what_training_trained(model, batch)


# What a labelled row may read


def changed(batch: Batch, feature: str, index: int, vocabulary: int) -> Batch:
    """The batch with another id at ``index`` of ``feature``."""
    names = batch.features.keys()
    values = {name: batch.ids(name).clone() for name in names}
    values[feature][index] = (values[feature][index] + 1) % vocabulary
    features = keyed_features(
        names, torch.cat(list(values.values())), batch.features.lengths(), [v.numel() for v in values.values()]
    )
    return dataclasses.replace(batch, features=features)


@torch.no_grad()
def assert_rows_see_only_what_is_before_them(model: Any, batch: Batch) -> None:
    """Perturb every item and action; compare which labelled rows change with which may."""
    ranking = isinstance(model, RankingModel)

    before = scores_of(model, batch)
    owner = torch.repeat_interleave(batch.lengths("item")).tolist()
    starts = np.cumsum([0, *batch.lengths("item").tolist()])
    history = (batch.lengths("item") - batch.num_candidates).tolist()
    rows = [(owner[e], e - starts[owner[e]]) for e in label_mask(batch).nonzero().flatten().tolist()]

    def check(feature: str, vocabulary: int, index: int, b: int, place: int) -> None:
        after = scores_of(model, changed(batch, feature, index, vocabulary))
        is_candidate = place >= history[b]
        for row, (sample, at) in enumerate(rows):
            if feature == "item":
                may = sample == b and (at == place or (place < at and not is_candidate))
            else:  # an event's own action is what a ranking row predicts
                may = sample == b and (place < at or (place == at and not ranking))
            if not may:
                assert torch.equal(after[row], before[row]), (feature, b, place, sample, at)
            else:
                assert not torch.equal(after[row], before[row]), ("blind", feature, b, place, sample, at)

    for e, b in enumerate(owner):
        check("item", 30, e, b, e - starts[b])
    if "action" in model.features:
        action_owner = torch.repeat_interleave(batch.lengths("action")).tolist()
        action_starts = np.cumsum([0, *batch.lengths("action").tolist()])
        for a, b in enumerate(action_owner):
            check("action", 4, a, b, a - action_starts[b])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("task", "lines"), EVERY, ids=[*RANKING, *RETRIEVAL])
@pytest.mark.parametrize("preset", PRESETS)
def test_rows_see_only_what_is_before_them(
    dataset: SequenceDataset, preset: str, task: str, lines: tuple[str, ...], split: str
) -> None:
    smooth = ("RankingArgs.prediction_head_act_type='gelu'",) if task == "ranking" else ()  # no unit is ever dead
    config = every(preset, task, lines, *smooth)
    assert_rows_see_only_what_is_before_them(build(dataset, config), batch_of(dataset, config, split, [0, 2, 3]))


def test_a_row_that_holds_its_own_label_is_caught(dataset: SequenceDataset) -> None:
    config = make_config("ranking")
    model, batch = build(dataset, config), batch_of(dataset, config)
    model.postprocess.last_token = True  # the action token of the event whose action is predicted
    with pytest.raises(AssertionError):
        assert_rows_see_only_what_is_before_them(model, batch)


def test_a_retrieval_row_at_the_item_to_predict_is_caught(dataset: SequenceDataset) -> None:
    config = make_config("retrieval", *RETRIEVAL["item"])
    model, batch = build(dataset, config), batch_of(dataset, config)
    model.postprocess.forward = lambda hidden, rows: hidden[rows + 1]
    with pytest.raises(AssertionError):
        assert_rows_see_only_what_is_before_them(model, batch)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", [name for name in RANKING if name != "history"])
@torch.no_grad()
def test_a_candidates_score_does_not_depend_on_its_place(dataset: SequenceDataset, preset: str, name: str) -> None:
    config = every(preset, "ranking", RANKING[name])
    model, batch = build(dataset, config), batch_of(dataset, config, rows=[3])
    events = int(batch.lengths("item")[0])
    same_time = batch.timestamps.clone()
    same_time[-3:] = same_time[-1]  # one request
    batch = dataclasses.replace(batch, timestamps=same_time)
    order = [*range(events - 3), events - 1, events - 3, events - 2]
    values = [batch.ids(n)[order] if n == "item" else batch.ids(n) for n in batch.features.keys()]  # noqa: SIM118
    features = keyed_features(
        batch.features.keys(), torch.cat(values), batch.features.lengths(), [v.numel() for v in values]
    )
    moved = scores_of(model, dataclasses.replace(batch, features=features))
    torch.testing.assert_close(moved, scores_of(model, batch)[[2, 0, 1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("task", "lines"), EVERY, ids=[*RANKING, *RETRIEVAL])
@torch.no_grad()
def test_other_samples_change_nothing(dataset: SequenceDataset, preset: str, task: str, lines: tuple[str, ...]) -> None:
    config = every(preset, task, lines)
    model = build(dataset, config)

    whole = scores_of(model, batch_of(dataset, config))
    single = torch.cat([scores_of(model, batch_of(dataset, config, rows=[row])) for row in range(len(LENGTHS))])
    assert (whole - single).abs().max() <= 32 * torch.finfo(torch.float32).eps * whole.abs().max()


# Ranks, seeds, gradients


def totals(dataset: SequenceDataset, config: Config, world: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Loss, labels and live negatives of the global batches of an epoch, summed over ranks."""
    model = build(dataset, config)
    ranks = [
        BatchLoader(
            dataset=dataset,
            split=leave_one_out(dataset.lengths)["train"],
            collate=make_collator(config, dataset.schema),
            batch_size=4 // world,
            rank=rank,
            world_size=world,
            shuffle=True,
        )
        for rank in range(world)
    ]
    result = []
    for step in zip(*(loader.epoch(1) for loader in ranks), strict=True):
        if isinstance(model, RetrievalModel):
            everything = torch.cat([batch.labels for batch in step])
            monkeypatch.setattr(model.sampler, "gather", lambda ids, all_labels=everything: all_labels)
        losses = [model(batch) for batch in step]
        result += [sum(float(loss.total) for loss in losses), sum(loss.count for loss in losses)]
        result += [sum(float(loss.live_negatives or 0) for loss in losses)]
    return result


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_retrieval_loss_does_not_depend_on_the_number_of_ranks(
    dataset: SequenceDataset, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("retrieval", *STRATEGIES[strategy])
    expected = totals(dataset, config, 1, monkeypatch)
    for world in (2, 4):  # the second step has two samples, so two of four ranks get none
        assert totals(dataset, config, world, monkeypatch) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["history", "candidates"])
@torch.no_grad()
def test_ranking_loss_does_not_depend_on_the_number_of_ranks(
    dataset: SequenceDataset, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("ranking", *RANKING[name])
    expected = totals(dataset, config, 1, monkeypatch)
    for world in (2, 4):
        assert totals(dataset, config, world, monkeypatch) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("task", "lines"), EVERY, ids=[*RANKING, *RETRIEVAL])
def test_a_batch_of_nothing_reaches_every_parameter_and_moves_none(
    dataset: SequenceDataset, task: str, lines: tuple[str, ...]
) -> None:
    config = every("research", task, lines)
    model, empty = build(dataset, config), batch_of(dataset, config, rows=[])
    loss = model(empty)
    loss.total.backward()
    assert float(loss.total.detach()) == 0.0 and loss.count == 0 and model.num_tokens(empty) == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize(
    "widths", [(), ("NetworkArgs.action_embedding_dim=5", "NetworkArgs.contextual_embedding_dim=3")]
)
@pytest.mark.parametrize(("task", "lines"), EVERY, ids=[*RANKING, *RETRIEVAL])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_reach_every_parameter(
    dataset: SequenceDataset, preset: str, task: str, lines: tuple[str, ...], widths: tuple[str, ...]
) -> None:
    config = every(preset, task, lines, *widths, "NetworkArgs.gate='concat'")
    model = build(dataset, config, spread=False)
    model(batch_of(dataset, config)).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        assert bool(parameter.grad.any()), name


def test_dense_weights_are_those_of_the_seed_whoever_holds_the_tables(dataset: SequenceDataset) -> None:
    for task in ("ranking", "retrieval"):
        config = make_config(task)
        state = torch.get_rng_state()
        whole = dict(build_model(config, dataset.schema).named_parameters())
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        bare = dict(build_model(config, dataset.schema, allocate_tables=False).named_parameters())
        assert not any("embeddings" in name for name in bare) and len(bare) > 8
        for name, parameter in bare.items():
            assert torch.equal(parameter, whole[name]), name
        other = dict(build_model(make_config(task, "TrainerArgs.seed=7"), dataset.schema).named_parameters())
        assert not torch.equal(other["backbone.layers.0.uvqk.weight"], whole["backbone.layers.0.uvqk.weight"])
        assert not torch.equal(other["embeddings.weights.item"], whole["embeddings.weights.item"])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("task", "lines"), EVERY, ids=[*RANKING, *RETRIEVAL])
@torch.no_grad()
def test_number_of_tokens_and_the_bound_on_them(
    dataset: SequenceDataset, task: str, lines: tuple[str, ...], split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = every("research", task, lines)  # its bias and position tables end at the bound
    model, batch = build(dataset, config), batch_of(dataset, config, split)
    seen = []
    honest = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda tokens: seen.append(tokens) or honest(tokens))
    model(batch)
    (tokens,) = seen
    assert model.num_tokens(batch) == tokens.values.shape[0]
    bound = model.backbone.layers[0].config.max_tokens
    assert int(tokens.layout.lengths.max()) <= bound == model.preprocess.positions.position.shape[0]
    assert model.backbone.layers[0].config.scaling_seqlen == bound


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("task", "lines"), EVERY, ids=[*RANKING, *RETRIEVAL])
@torch.no_grad()
def test_bfloat16_stays_near(dataset: SequenceDataset, preset: str, task: str, lines: tuple[str, ...]) -> None:
    low, exact = (every(preset, task, lines, f"NetworkArgs.dtype_str='{d}'") for d in ("bfloat16", "float32"))
    batch = batch_of(dataset, exact)
    a, b = (build(dataset, config, spread=False)(batch).total for config in (low, exact))
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.0)


# What does not fit together


def refused(dataset: SequenceDataset, task: str, *lines: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build_model(make_config(task, *lines), dataset.schema)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_head_that_does_not_fit_the_actions(dataset: SequenceDataset, tmp_path: Path) -> None:
    bits = make_dataset(tmp_path / "bits", LENGTHS, num_actions=8, action_type="bitmask")
    none = make_dataset(tmp_path / "none", LENGTHS, num_actions=None)
    assert "has 4 classes" in refused(dataset, "ranking", "RankingArgs.prediction_head_arch=[6, 3]")
    message = refused(dataset, "ranking", "RankingArgs.prediction_head_arch=[6, 1]")
    assert "prediction_head_arch = (6, 1)" in message and "2 tasks or 4 classes" in message
    assert "use num_tasks = 8" in refused(bits, "ranking", "RankingArgs.prediction_head_arch=[6, 8]")
    message = refused(bits, "ranking", "RankingArgs.prediction_head_arch=[6, 2]", "RankingArgs.num_tasks=2")
    assert "end with 3 tasks" in message
    assert "use 'item', with DatasetArgs.max_num_candidates above 0" in refused(none, "ranking")
    item = ("NetworkArgs.token_layout='item'", "DatasetArgs.max_num_candidates=2")
    assert "has no actions, so nothing can be ranked" in refused(none, "ranking", *item)
    build_model(make_config("ranking", "RankingArgs.prediction_head_arch=[6, 9]"), dataset.schema)  # wider is fine


def test_other_misfits_of_config_and_data(dataset: SequenceDataset, tmp_path: Path) -> None:
    timeless = make_dataset(tmp_path / "timeless", LENGTHS, with_time=False, contexts=())
    assert "has no timestamps" in refused(timeless, "retrieval", "NetworkArgs.preset='research'")
    build_model(make_config("retrieval"), timeless.schema)
    message = refused(dataset, "ranking", "DatasetArgs.contextual_feature_names=('height',)")
    assert "no context feature 'height'; it has: country, age" in message
    assert "it has: none" in refused(timeless, "ranking", "DatasetArgs.contextual_feature_names=('age',)")
    message = refused(dataset, "ranking", "EmbeddingArgs.table_sharding_types={'itm': 'row_wise'}")
    assert "no table 'itm'; tables: item, action, country, age" in message
    message = refused(dataset, "ranking", "NetworkArgs.num_position_buckets=15")
    assert "can have 16 tokens" in message and "num_position_buckets = 15" in message
    build_model(make_config("ranking", "NetworkArgs.num_position_buckets=16"), dataset.schema)


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("context_attention='full'", "mask", Mask(context="full")),
        ("max_attn_len=5", "mask", Mask(max_attn_len=5)),
        ("target_group_size=3", "mask", Mask(candidate_group_size=3)),
        ("scaling_seqlen=77", "scaling_seqlen", 77.0),
        ("hidden_dropout=0.25", "dropout", 0.25),
        ("norm_epsilon=1e-3", "norm_eps", 1e-3),
        ("gate='concat'", "gate", "concat"),
        ("relative_position_bias=True", "position_bias", True),
        ("relative_time_bias=True", "time_bias_buckets", 128),
        ("bias_query_time='next'", "bias_query_time", "next"),
        ("value_channels=9", "value_channels", 9),
        ("kernel_backend='pytorch'", "backend", "reference"),
    ],
)
def test_the_networks_options_reach_the_layers(dataset: SequenceDataset, line: str, field: str, value: object) -> None:
    candidates = "DatasetArgs.max_num_candidates=2"
    plain = build_model(make_config("ranking", candidates), dataset.schema)
    model = build_model(make_config("ranking", candidates, f"NetworkArgs.{line}"), dataset.schema)
    assert len(model.backbone.layers) == 2
    for before, after in zip(plain.backbone.layers, model.backbone.layers, strict=True):
        assert after.config == dataclasses.replace(before.config, **{field: value}) != before.config  # type: ignore[arg-type]


def test_presets_may_be_overridden(dataset: SequenceDataset) -> None:
    lines = ("NetworkArgs.preset='research'", "NetworkArgs.relative_time_bias=False")
    layer = build_model(make_config("ranking", *lines), dataset.schema).backbone.layers[0]
    assert layer.config.alpha == 1.0 and not layer.config.affine_norm and layer.config.norm_eps == 1e-6
    assert layer.position_table is not None and layer.time_table is None


def test_only_the_features_asked_for_have_tables(dataset: SequenceDataset) -> None:
    config = make_config("retrieval", "DatasetArgs.contextual_feature_names=('age',)")
    model = build_model(config, dataset.schema)
    assert {t.name: (t.rows, t.features) for t in model.embeddings.tables} == {
        "item": (30, ("item", POOL)),
        "age": (8, ("age",)),  # seven values, and the unknown ones
    }
    model = build_model(make_config("ranking"), dataset.schema)
    assert [t.name for t in model.embeddings.tables] == ["item", "action", "country", "age"]
    assert all(POOL not in t.features for t in model.embeddings.tables)


# Times before the request, where a row cannot see in them what it is to predict


@torch.no_grad()
def test_one_row_a_sample_may_know_the_time_of_its_request(dataset: SequenceDataset) -> None:
    lines = ("NetworkArgs.num_time_buckets=20", "NetworkArgs.time_bucket_fn='log'")
    with pytest.raises(ConfigError, match="num_time_buckets = 20: times before the request would show the future"):
        make_config("retrieval", *lines)
    config = make_config("retrieval", *lines, "DatasetArgs.train_stride=1")
    split = make_splits(config.dataset, dataset)["train"]
    rows = np.arange(len(split))
    batch = make_collator(config, dataset.schema)(dataset, split, rows, rows, 0)
    last = batch.lengths("item").cumsum(0) - 1
    assert torch.equal(batch.label_events + 1, last[batch.lengths("item") > 1]), "of what comes after none is there"
    model = build(dataset, config)
    for name in ("time", "position"):
        assert getattr(model.preprocess.positions, name) is not None
    later = batch.timestamps.index_add(0, last, torch.full_like(last, 10**9))
    moved = scores_of(model, dataclasses.replace(batch, timestamps=later))
    assert (moved != scores_of(model, batch)).any(1).all(), "the request is known"
    masked = make_config("retrieval", *lines, "NetworkArgs.backbone='bert'")
    assert torch.isfinite(build(dataset, masked)(batch_of(dataset, masked)).total)
