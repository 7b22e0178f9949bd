"""Every backbone in both models: what rows read, what reaches the weights, what is learnt, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import Config, ConfigError
from hstu.data import SequenceDataset
from hstu.models import build_model
from hstu.models.backbone import make_backbone
from tests.models.test_models import (
    LENGTHS,
    RANKING,
    RETRIEVAL,
    assert_rows_see_only_what_is_before_them,
    batch_of,
    build,
)
from tests.samples import make_config, make_dataset, scores_of

BACKBONES = ["sasrec", "llama", "gru", "lstm", "mean"]
FULL = ("RetrievalArgs.loss='full_softmax'", "RetrievalArgs.num_negatives=-1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


def config_of(backbone: str, task: str, *lines: str) -> Config:
    smooth = ("RankingArgs.prediction_head_act_type='gelu'",) if task == "ranking" else ()  # no unit is ever dead
    width = "NetworkArgs.kv_channels=4"
    return make_config(task, f"NetworkArgs.backbone='{backbone}'", width, *smooth, *lines)


EVERY = [
    (backbone, task, lines)
    for backbone in BACKBONES
    for task, cases in (("ranking", RANKING), ("retrieval", RETRIEVAL))
    for name, lines in cases.items()
    if backbone not in ("gru", "lstm") or name != "candidates_full"
]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("backbone", "task", "lines"), EVERY)
def test_rows_see_only_what_is_before_them(
    dataset: SequenceDataset, backbone: str, task: str, lines: tuple[str, ...], split: str
) -> None:
    config = config_of(backbone, task, *lines)
    model: Any = build(dataset, config)
    for parameter in model.backbone.parameters():  # a gate that is shut would hide the past
        torch.nn.init.normal_(parameter, std=0.3)
    assert_rows_see_only_what_is_before_them(model, batch_of(dataset, config, split, [0, 2, 3]))


@pytest.mark.parametrize(("backbone", "task", "lines"), EVERY)
def test_gradients_reach_every_parameter_and_nothing_moves_none(
    dataset: SequenceDataset, backbone: str, task: str, lines: tuple[str, ...]
) -> None:
    config = config_of(backbone, task, *lines)
    for rows in (None, []):
        model, batch = build(dataset, config, spread=False), batch_of(dataset, config, rows=rows)
        model(batch).total.backward()
        assert model.num_tokens(batch) == 0 or rows is None
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
            assert rows is None or not parameter.grad.any(), name


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_bfloat16_stays_near(dataset: SequenceDataset, backbone: str) -> None:
    lines = ("DatasetArgs.max_num_candidates=3",)
    low, exact = (
        config_of(backbone, "ranking", *lines, f"NetworkArgs.dtype_str='{d}'") for d in ("bfloat16", "float32")
    )
    a, b = (build(dataset, config, spread=False)(batch_of(dataset, exact)).total for config in (low, exact))
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.0)


def planted_chain(folder: Path, num_items: int = 23) -> SequenceDataset:
    """Sequences in which each item follows from the one before it."""
    rng, lengths = np.random.default_rng(0), [8, 5, 7, 6] * 12
    items = [(start * 5**step) % num_items for n, start in zip(lengths, rng.integers(1, num_items, 48), strict=True)
             for step in range(n)]  # fmt: skip
    return make_dataset(folder, lengths, num_items=num_items, items=np.array(items), num_actions=None, contexts=())


def learnt(dataset: SequenceDataset, config: Config, steps: int = 60, counts: torch.Tensor | None = None) -> float:
    """Share of the test users whose target is the first unseen item after a few steps of Adam."""
    model: Any = build_model(config, dataset.schema)
    if counts is not None:
        model.sampler.set_counts(counts)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    batch = batch_of(dataset, config)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(dataclasses.replace(batch, sample_ids=batch.sample_ids + 1000 * step, step=step))
        (loss.total / loss.count).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        test = batch_of(dataset, config, "test")
        scores = model.scores(scores_of(model, test), model.catalogue_vectors(test, torch.arange(model.num_items)))
    # What a user has seen is never recommended; the binary loss never pushes it down.
    owner, ends = torch.repeat_interleave(test.lengths("item")), test.lengths("item").cumsum(0) - 1
    is_history = torch.ones_like(owner, dtype=torch.bool).index_fill(0, ends, False)
    scores[owner[is_history], test.ids("item")[is_history]] = -torch.inf
    return float((scores.argmax(1) == test.labels).double().mean())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_learns_what_follows_what(backbone: str, tmp_path: Path) -> None:
    dataset = planted_chain(tmp_path / "chain")
    config = config_of(backbone, "retrieval", *FULL, "NetworkArgs.hidden_size=16", "RetrievalArgs.temperature=0.1")
    assert learnt(dataset, config, steps=0) < 0.3
    assert learnt(dataset, config) > 0.6  # 1.0 with three seeds, with ATEN_CPU_CAPABILITY=default and on two threads


REFUSED = [
    ("rnn", "", "must be one of 'hstu'"),
    ("llama", "NetworkArgs.relative_position_bias=True", "relative bias inside SiLU attention (hstu)"),
    ("sasrec", "NetworkArgs.relative_time_bias=True", "which sasrec does not have"),
    ("sasrec", "NetworkArgs.gate='mul'", "gated attention"),
    ("llama", "NetworkArgs.scaling_seqlen=9", "without softmax"),
    ("gru", "NetworkArgs.ffn_hidden_size=9", "feed-forward"),
    ("hstu", "NetworkArgs.ffn_hidden_size=9", "which hstu does not have"),
    ("gru", "NetworkArgs.max_attn_len=9", "attention"),
    ("lstm", "NetworkArgs.context_attention='full'", "causal attention"),
    ("mean", "NetworkArgs.ffn_hidden_size=9", "feed-forward"),
    ("mean", "NetworkArgs.is_causal=False", "trained to predict what follows"),
    ("gru", "NetworkArgs.target_group_size=2", "between candidates"),
    ("llama", "NetworkArgs.norm_placement='post'", "pre- and post-norm"),
    ("llama", "NetworkArgs.num_query_groups=3", "must divide num_attention_heads = 2"),
    ("llama", "NetworkArgs.kv_channels=3", "even number"),
    ("llama", "NetworkArgs.num_position_buckets=99", "position table"),
    ("sasrec", "NetworkArgs.kernel_backend='triton'", "those of hstu"),
    ("gru", "NetworkArgs.is_causal=False", "trained to predict what follows"),
    ("bert", "NetworkArgs.is_causal=True", "trained to predict masked items"),
    ("bert", "NetworkArgs.token_layout='add'", "action of an item to be predicted is unknown"),
    ("bert", "NetworkArgs.target_group_size=2", "between candidates"),
    ("bert", "NetworkArgs.context_attention='full'", "causal attention"),
    ("bert", "RetrievalArgs.mask_probability=1.5", "at most 1"),
    ("sasrec", "NetworkArgs.residual_dtype_str='bfloat16'", "needs NetworkArgs.dtype_str = 'bfloat16'"),
]


@pytest.mark.parametrize(("backbone", "line", "reason"), REFUSED)
def test_what_makes_no_sense_is_refused_with_a_reason(backbone: str, line: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(backbone, "retrieval", *([line] if line else []))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_stream_of_low_precision_is_refused_where_it_is_not_the_librarys() -> None:
    with pytest.raises(ConfigError, match="residual_dtype_str = 'bfloat16': gru has no stream"):
        config_of("gru", "retrieval", *(f"NetworkArgs.{n}dtype_str='bfloat16'" for n in ("", "residual_")))


@pytest.mark.parametrize("backbone", ["hstu", "sasrec", "llama", "bert"])
def test_the_residual_stream_in_bfloat16(dataset: SequenceDataset, backbone: str) -> None:
    """What layers hand on is bfloat16; loss and gradients are those of float32 up to its rounding."""
    found = {}
    for precision, lines in (("float32", ("",)), ("bfloat16", ("", "residual_"))):
        config = config_of(backbone, "retrieval", *(f"NetworkArgs.{n}dtype_str={precision!r}" for n in lines))
        model: Any = build(dataset, config)
        handed_on: set[torch.dtype] = set()
        for layer in model.backbone.layers:
            layer.register_forward_hook(lambda module, inputs, out, met=handed_on: met.add(out.dtype))
        loss = model(batch_of(dataset, config))
        loss.total.backward()
        assert handed_on == {getattr(torch, precision)} and loss.total.dtype == torch.float32
        found[precision] = loss.total.detach(), torch.cat([p.grad.flatten() for p in model.backbone.parameters()])
    (exact, gradient), (rounded, narrow) = found.values()
    assert float((rounded - exact).abs() / exact) < 0.02 and not torch.equal(rounded, exact)
    assert float((narrow - gradient).norm() / gradient.norm()) < 0.1


def test_a_name_that_no_module_goes_by_is_an_error_and_not_another_backbone() -> None:
    network = config_of("sasrec", "retrieval").network
    object.__setattr__(network, "backbone", "sasrek")
    with pytest.raises(ConfigError, match="NetworkArgs.backbone = 'sasrek': is a name that no module goes by"):
        make_backbone(network, 9)


@pytest.mark.parametrize(("backbone", "scale"), [("hstu", 4.0), ("sasrec", 4.0), ("llama", 1.0), ("bert", 1.0)])
def test_inputs_are_scaled_as_each_backbones_paper_has_it_or_as_asked(
    dataset: SequenceDataset, backbone: str, scale: float
) -> None:
    width = "NetworkArgs.hidden_size=16"
    plain = build_model(config_of(backbone, "retrieval", width), dataset.schema)
    assert plain.preprocess.positions.scale == scale
    for asked, wanted in ((True, 4.0), (False, 1.0)):
        config = config_of(backbone, "retrieval", width, f"NetworkArgs.scale_inputs={asked}")
        assert build_model(config, dataset.schema).preprocess.positions.scale == wanted


def test_one_field_chooses_the_backbone_of_an_hstu_config(dataset: SequenceDataset) -> None:
    hstu = ("NetworkArgs.preset='research'", "NetworkArgs.bias_query_time='next'")
    for backbone in BACKBONES:
        build_model(config_of(backbone, "retrieval", *hstu), dataset.schema)
