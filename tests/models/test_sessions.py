"""Session-aware runs: samples are sessions, earlier ones stand in front, as they are or behind memory tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hstu.config import Config, ConfigError
from hstu.data import SequenceDataset
from hstu.data.batch import Batch
from hstu.data.requests import Requests
from hstu.data.schema import unknown_id
from hstu.data.splits import Split, make_splits
from hstu.models import make_collator
from hstu.models.caching import memory_blocks_of, scores_slates
from tests.models.test_memory import cut_memory
from tests.models.test_models import build, changed
from tests.samples import declared_features, make_config, make_dataset, scores_of

LENGTHS = [3, 9, 1, 12, 5, 30]
REQUEST = [feature for feature in declared_features() if feature.name == "request"]
MEMORY = ("MemoryArgs.num_memory_tokens=3", "MemoryArgs.pretrain_item_num=4")
TASKS = {
    "retrieval": ("retrieval", ()),
    "ranking": ("ranking", ()),
    "candidates": ("ranking", ("DatasetArgs.max_num_candidates=3",)),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    # One vocabulary of sessions, so that they go on and come back, and some events have none.
    rng = np.random.default_rng(1)
    times = np.concatenate([10**9 + np.cumsum(rng.choice([60, 1800, 1801, 90_000], size=size)) for size in LENGTHS])
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30, times=times, declared=REQUEST)


def sessions_of(dataset: SequenceDataset, user: int, sessions: str) -> list[int]:
    """Number of the session of each event, by a plain loop."""
    n = dataset.lengths[user]
    events = dataset.gather(np.array([user]), np.zeros(1), np.array([n]), ("request",))
    assert events.times is not None
    found, known = [], None
    for k in range(n):
        label = events.of_events["request"][k]
        if sessions == "request":
            begins = known is not None and label not in (known, unknown_id(dataset.schema, "request"))
            known = known if label == unknown_id(dataset.schema, "request") else label
        else:
            begins = k > 0 and events.times[k] - events.times[k - 1] > 1800
        found.append((found[-1] if found else 0) + bool(begins))
    return found


def collated(dataset: SequenceDataset, config: Config, split: Split) -> Batch:
    rows = np.arange(len(split))
    return make_collator(config, dataset.schema)(dataset, split, rows, rows, 0)


@pytest.mark.parametrize("sessions", ["30m", "request"])
@pytest.mark.parametrize("lines", [(), MEMORY], ids=["visible", "memory"])
@pytest.mark.parametrize("name", TASKS)
def test_every_event_is_a_label_of_the_sample_of_its_session(
    dataset: SequenceDataset, name: str, lines: tuple[str, ...], sessions: str
) -> None:
    task, more = TASKS[name]
    config = make_config(task, *more, *lines, f"DatasetArgs.sessions={sessions!r}")
    split = make_splits(config.dataset, dataset, config.recent_targets)["train"]
    batch = collated(dataset, config, split)
    owner = torch.repeat_interleave(batch.lengths("item"))
    ends = batch.lengths("item").cumsum(0)
    labelled = []
    for event in batch.label_events.tolist():
        sample = int(owner[event])
        last = int(split.stop[sample]) - 1
        place = last - (int(ends[sample]) - 1 - event) + (task == "retrieval")
        user = int(split.users[sample])
        own = sessions_of(dataset, user, sessions)
        assert own[place] == own[last]
        labelled.append((user, place))
    held_out = [0 if n < 3 else 2 for n in LENGTHS]
    first = int(name != "ranking")  # nothing stands before a user's first event
    wanted = [(u, k) for u, n in enumerate(LENGTHS) for k in range(first, n - held_out[u])]
    assert sorted(label for label in labelled if label[1] >= first) == wanted


@pytest.mark.parametrize("lines", [(), MEMORY], ids=["visible", "memory"])
@pytest.mark.parametrize("name", TASKS)
@torch.no_grad()
def test_an_earlier_session_changes_rows_through_memory_if_there_is_one(
    dataset: SequenceDataset, name: str, lines: tuple[str, ...]
) -> None:
    task, more = TASKS[name]
    smooth = ("RankingArgs.prediction_head_act_type='gelu'",) if task == "ranking" else ()
    config = make_config(task, *more, *lines, *smooth, "DatasetArgs.sessions='30m'")
    split = make_splits(config.dataset, dataset, config.recent_targets)["train"]
    model, batch = build(dataset, config), collated(dataset, config, split)
    owner = torch.repeat_interleave(batch.lengths("item")).tolist()
    starts = (batch.lengths("item").cumsum(0) - batch.lengths("item")).tolist()
    before = scores_of(model, batch)
    shut = cut_memory(model, 0)
    checked = {True: 0, False: 0}
    for sample in range(batch.num_samples):
        rows = [k for k, event in enumerate(batch.label_events.tolist()) if owner[event] == sample]
        own = sessions_of(dataset, int(split.users[sample]), "30m")
        length, stop = owner.count(sample), int(split.stop[sample])
        earlier = [k for k in range(length - 1) if own[stop - length + k] < own[stop - 1]]
        if not rows or not earlier:
            continue
        other = changed(batch, "item", starts[sample] + earlier[0], 30)
        assert torch.equal(other.labels, batch.labels)
        after = scores_of(model, other)
        assert (after[rows] != before[rows]).any(1).all()
        others = [k for k in range(len(before)) if k not in rows]
        assert torch.equal(after[others], before[others])
        checked[bool(lines)] += 1
        if lines:
            # What predicts the first item of a session is the memory, which attends to what it compresses.
            rows = [k for k in rows if int(batch.label_events[k]) > starts[sample] + earlier[-1]]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(model, "whole_stream", shut)
                assert torch.equal(scores_of(model, other)[rows], scores_of(model, batch)[rows])
    assert checked[bool(lines)] > 5


def test_memory_stands_where_the_last_session_begins(dataset: SequenceDataset) -> None:
    config = make_config("retrieval", *MEMORY, "DatasetArgs.sessions='30m'")
    splits = make_splits(config.dataset, dataset, config.recent_targets)
    model = build(dataset, config)
    for split in splits.values():
        batch = collated(dataset, config, split)
        stream = model.whole_stream(batch)
        assert batch.recent is not None and stream.positions is not None
        item_ends = batch.lengths("item").cumsum(0)
        for sample, recent in enumerate(batch.recent.tolist()):
            own = sessions_of(dataset, int(split.users[sample]), "30m")
            stop = int(split.stop[sample])
            assert recent == min(own[:stop].count(own[stop - 1]) - 1, 2)
            asked = int(stream.event_rows[item_ends[sample] - 1])
            begin = asked - recent
            assert stream.layout.is_memory[begin - 3 : begin].all() and not stream.layout.is_memory[begin:asked].any()
            # Two tokens of context, four events and the memory, whatever is missing of them.
            assert stream.positions[begin] == 2 + 4 + 3 and stream.positions[asked] == 9 + recent


def test_a_request_after_the_gap_begins_a_session(dataset: SequenceDataset) -> None:
    config = make_config("retrieval", *MEMORY, "DatasetArgs.sessions='30m'")
    users = np.flatnonzero(dataset.lengths)
    last = sessions_of(dataset, 5, "30m")
    soon, late = (Requests(dataset, users, time=time) for time in (None, 2 * 10**9))
    recent = [
        make_collator(config, dataset.schema)(asked, asked.split, users, users, 0).recent.tolist()  # type: ignore
        for asked in (soon, late)
    ]
    assert recent[0][5] == min(2, last.count(last[-1])) > 0 and recent[1] == [0] * len(users)


def test_memory_of_sessions_is_neither_shared_nor_stored(dataset: SequenceDataset) -> None:
    lines = (*MEMORY, "DatasetArgs.max_num_candidates=3")
    assert scores_slates(build(dataset, make_config("ranking", *lines)))
    model = build(dataset, make_config("ranking", *lines, "DatasetArgs.sessions='30m'"))
    assert not scores_slates(model)
    with pytest.raises(ValueError, match="DatasetArgs.sessions: .* none can be stored; ask without one"):
        memory_blocks_of(model)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("DatasetArgs.sessions=' '",), "DatasetArgs.sessions = ' ': must be a length of time, as '30m', or name"),
        (
            ("DatasetArgs.sessions='1h'", "MemoryArgs.num_memory_tokens=3", "MemoryArgs.pretrain_item_num=6"),
            "leaves no room for events of the last session",
        ),
        (("DatasetArgs.sessions='1h'", *MEMORY, "DatasetArgs.train_stride=3"), "train_stride = 3: must be at most 2"),
        (
            (
                "DatasetArgs.sessions='1h'",
                *MEMORY,
                "MemoryArgs.num_memory_tokens=4",
                "MemoryArgs.insert_method=[[4, 3], [5, 1]]",
            ),
            "has a block after MemoryArgs.pretrain_item_num = 4",
        ),
    ],
)
def test_bad_sessions_are_one_line(lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make_config("retrieval", *lines)
    assert "\n" not in str(raised.value)


def test_sessions_that_the_data_lacks_are_refused(dataset: SequenceDataset, tmp_path: Path) -> None:
    timeless = make_dataset(tmp_path / "small", [5, 6], with_time=False)
    for data, sessions, message in (
        (dataset, "visit", "= 'visit': is no length of time, as '30m', and no column .* there are: request "),
        (timeless, "1h", "= '1h': data set 'small' has no times; name a column of events"),
    ):
        lines = ("NetworkArgs.relative_time_bias=False", f"DatasetArgs.sessions={sessions!r}")
        config = make_config("retrieval", *lines)
        for call in (lambda c=config, d=data: make_splits(c.dataset, d), lambda c=config, d=data: build(d, c)):
            with pytest.raises(ValueError, match="DatasetArgs.sessions " + message):
                call()
