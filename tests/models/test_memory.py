"""Models with memory tokens: what rows may see, which rows carry the loss, and configs that are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hstu.config import Config, ConfigError
from hstu.data import SequenceDataset
from hstu.data.batch import Batch
from hstu.data.splits import make_splits
from hstu.models import make_collator
from tests.models.test_models import batch_of, build, changed
from tests.samples import make_config, make_dataset, scores_of

LENGTHS = [3, 9, 4, 12, 5]
MEMORY = (
    "MemoryArgs.num_memory_tokens=3",
    "MemoryArgs.insert_method=[[2, 1], [4, 2]]",
    "MemoryArgs.pretrain_item_num=4",
)
CANDIDATES = ("DatasetArgs.max_num_candidates=3", "NetworkArgs.target_group_size=2")
SASREC = ("NetworkArgs.backbone='sasrec'",)
LLAMA = ("NetworkArgs.backbone='llama'", "NetworkArgs.kv_channels=4")
RESEARCH = ("NetworkArgs.preset='research'", "NetworkArgs.bias_query_time='next'")
SMOOTH = ("RankingArgs.prediction_head_act_type='gelu'",)  # no unit is ever dead
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "hstu-retrieval": ("retrieval", RESEARCH),
    "hstu-retrieval-interleave": ("retrieval", ("NetworkArgs.token_layout='interleave'", "NetworkArgs.max_attn_len=3")),
    "hstu-ranking": ("ranking", ("NetworkArgs.preset='research'", *SMOOTH)),
    "hstu-ranking-candidates": ("ranking", (*CANDIDATES, *RESEARCH, *SMOOTH)),
    "sasrec-retrieval": ("retrieval", SASREC),
    "sasrec-ranking-add": ("ranking", (*SASREC, *CANDIDATES, *SMOOTH, "NetworkArgs.token_layout='add'")),
    "llama-retrieval": ("retrieval", LLAMA),
    "llama-ranking": ("ranking", (*LLAMA, *SMOOTH)),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


def cut_memory(model: Any, segment: int) -> Any:
    """Return a function like ``model.whole_stream`` in which nobody later sees the memory of ``segment``."""
    lay_out = type(model).whole_stream.__get__(model)

    def without(batch: Batch) -> Any:
        stream = lay_out(batch)
        layout = stream.layout
        kept = layout.is_memory & (layout.segments != segment)
        return dataclasses.replace(stream, layout=dataclasses.replace(layout, is_memory=kept))

    return without


@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_an_old_item_reaches_recent_rows_through_memory_alone(dataset: SequenceDataset, name: str) -> None:
    task, lines = TASKS[name]
    config = make_config(task, *MEMORY, *lines)
    model, batch = build(dataset, config), batch_of(dataset, config)
    stream = model.whole_stream(batch)
    rows = model.postprocess.rows(stream, batch.label_events).tolist()
    segments, offsets = stream.layout.segments.tolist(), stream.layout.offsets
    sample_of = torch.repeat_interleave(stream.layout.lengths).tolist()
    candidates = stream.layout.offsets[:-1] + stream.layout.history
    through, direct = 0, 0
    for segment in range(3):
        model.whole_stream = cut_memory(model, segment)
        cut = scores_of(model, batch_of(dataset, config))
        del model.whole_stream
        whole = scores_of(model, batch)
        for event, row in enumerate(stream.event_rows.tolist()):
            b = sample_of[row]
            if segments[row] != segment or row >= candidates[b]:
                continue
            after = scores_of(model, changed(batch, "item", event, 30))
            model.whole_stream = cut_memory(model, segment)
            after_cut = scores_of(model, changed(batch_of(dataset, config), "item", event, 30))
            del model.whole_stream
            for label, place in enumerate(rows):
                sees = sample_of[place] == b and place >= row
                same = torch.equal(after[label], whole[label])
                assert same != sees or (not same and "max_attn_len" in str(lines)), (event, label)
                if not (sees and segments[place] == segment):
                    assert torch.equal(after_cut[label], cut[label]), (event, label)
                    through += sees
                direct += sees and segments[place] == segment
    assert through > 5 and direct > 5 and int(offsets[-1]) == model.num_tokens(batch)


@pytest.mark.parametrize("name", ["hstu-retrieval", "llama-retrieval"])
def test_memory_rows_predict_what_follows_them_and_no_row_predicts_memory(dataset: SequenceDataset, name: str) -> None:
    config = make_config("retrieval", *MEMORY, *TASKS[name][1])
    model, batch = build(dataset, config), batch_of(dataset, config)
    stream = model.whole_stream(batch)
    rows, targets = model.postprocess.rows(stream, batch.label_events), batch.label_events + 1
    assert torch.equal(rows, stream.event_rows[targets] - 1)
    is_memory = stream.layout.is_memory
    assert int(is_memory[rows].sum()) >= 3 and not bool(is_memory[rows + 1].any())
    model(batch).total.backward()
    assert bool((model.preprocess.memory.grad.abs().sum(1) > 0).all())


@pytest.mark.parametrize(("task", "labels"), [("retrieval", 2), ("ranking", 3)])
def test_loss_on_recent_rows_alone(dataset: SequenceDataset, task: str, labels: int) -> None:
    config = make_config(task, *MEMORY, "MemoryArgs.loss_on_recent_only=True")
    model = build(dataset, config)
    split = make_splits(config.dataset, dataset, config.recent_targets)["train"]
    numbers = torch.arange(len(split)).numpy()
    batch = make_collator(config, dataset.schema)(dataset, split, numbers, numbers, 0)
    stream = model.whole_stream(batch)
    rows = model.postprocess.rows(stream, batch.label_events)
    assert bool((stream.layout.segments[rows] == 2).all()) and not bool(stream.layout.is_memory[rows].any())
    owner = torch.repeat_interleave(batch.lengths("item"))[batch.label_events]
    # Of the users with a long history two, and in ranking three, of the others what they have.
    assert owner.bincount().tolist()[1::2] == [labels, labels]


def test_memory_of_short_histories_does_not_depend_on_what_follows(dataset: SequenceDataset) -> None:
    """Where nothing is compressed the memory rows are the same, so that one stored cache serves."""
    config = make_config("retrieval", *MEMORY, *RESEARCH, "MemoryArgs.recent_item_num=2")
    model = build(dataset, config)
    hidden: dict[int, Any] = {}

    def keep(module: Any, inputs: Any, out: torch.Tensor) -> None:
        hidden[len(hidden)] = out

    model.backbone.register_forward_hook(keep)
    batch = batch_of(dataset, config, rows=[0])
    scores_of(model, batch)
    scores_of(model, changed(batch, "item", 0, 30))
    memory = model.whole_stream(batch).layout.is_memory
    assert int(memory.sum()) == 3 and torch.equal(hidden[0][memory], hidden[1][memory])


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "order": (("MemoryArgs.insert_method=[[4, 2], [2, 1]]",), "offsets must ascend"),
    "twice": (("MemoryArgs.insert_method=[[4, 2], [4, 1]]",), "offsets must ascend"),
    "beyond": (("MemoryArgs.insert_method=[[4, 2], [7, 1]]",), "offset 7 lies beyond the history"),
    "beyond_alone": (("MemoryArgs.insert_method=[[4, 2], [7, 1]]", "MemoryArgs.pretrain_item_num=None"),
                     "offset 7 lies beyond the history"),
    "sum": (("MemoryArgs.num_memory_tokens=5",), "has 3 tokens, MemoryArgs.num_memory_tokens is 5"),
    "pairs": (("MemoryArgs.insert_method=[[2, 1, 3]]",), "must be a list of pairs"),
    "no_block": (("MemoryArgs.pretrain_item_num=3",), "no block of MemoryArgs.insert_method"),
    "nothing": (("MemoryArgs.insert_method=None", "MemoryArgs.pretrain_item_num=None"), "must be above 0 where"),
    "history": (("MemoryArgs.recent_item_num=3",), "must make DatasetArgs.max_history_seqlen = 6"),
    "off": (("MemoryArgs.num_memory_tokens=0",), "needs MemoryArgs.num_memory_tokens above 0"),
    "gru": (("NetworkArgs.backbone='gru'",), "keeps one state and attends to nothing"),
    "bert": (("NetworkArgs.backbone='bert'",), "attends to what comes later"),
    "hf": (("NetworkArgs.backbone='hf:gpt2'",), "knows no segments"),
    "none_recent": (("MemoryArgs.insert_method=[[4, 1], [6, 2]]", "MemoryArgs.loss_on_recent_only=True"),
                    "no event stands after the last block"),
    "stride": (("DatasetArgs.train_stride=3", "MemoryArgs.loss_on_recent_only=True"), "must be at most 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_memory_is_one_line(name: str) -> None:
    lines, message = BAD[name]
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as raised:
        make_config("retrieval", *MEMORY, *lines)
    assert "\n" not in str(raised.value) and "Args." in str(raised.value)


def test_one_block_is_the_default(tmp_path: Path) -> None:
    config: Config = make_config("retrieval", "MemoryArgs.num_memory_tokens=2", "MemoryArgs.pretrain_item_num=4")
    assert config.memory.insert_method == ((4, 2),) and config.memory.recent_item_num == 2
