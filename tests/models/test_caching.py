"""Models behind a cache give the rows of one pass: candidates, later events, and memory with recent events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.data import SequenceDataset
from hstu.data.batch import Batch
from hstu.data.requests import Requests
from hstu.data.splits import Split
from hstu.models import make_collator
from hstu.models.caching import compress, recall, scores_slates
from hstu.ops import lengths_to_offsets, positions_in_sequence, sequence_ids
from tests.models.test_memory import LLAMA, MEMORY, RESEARCH, SASREC
from tests.models.test_models import build
from tests.samples import declared_features, make_config, make_dataset

LENGTHS = [3, 9, 1, 12, 5]
BACKBONES: dict[str, tuple[str, ...]] = {
    "hstu": (), "next": RESEARCH, "sasrec": SASREC, "llama": LLAMA, "window": ("NetworkArgs.max_attn_len=2",),
}  # fmt: skip
RANKING: dict[str, tuple[str, ...]] = {
    "history": (),
    "candidates": ("DatasetArgs.max_num_candidates=3",),
    "add": ("DatasetArgs.max_num_candidates=2", "NetworkArgs.token_layout='add'"),
    "full": ("DatasetArgs.max_num_candidates=2", "NetworkArgs.context_attention='full'"),
    "times": ("DatasetArgs.max_num_candidates=2", "NetworkArgs.num_time_buckets=20"),
    "gaps": ("DatasetArgs.max_num_candidates=2", "NetworkArgs.num_time_buckets=20", "NetworkArgs.time_bucket_of='gap'"),
}
SMALL = ("MemoryArgs.num_memory_tokens=2", "MemoryArgs.pretrain_item_num=4")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, num_items=30)


def model_of(dataset: SequenceDataset, task: str, *lines: str) -> tuple[Any, Any]:
    config = make_config(task, *lines)
    return build(dataset, config).eval(), make_collator(config, dataset.schema)


def samples(collate: Any, dataset: SequenceDataset, stop: np.ndarray, asked: int | None = 1) -> Batch:
    """The first ``stop`` events of each user, of which the last is asked about."""
    every = np.arange(len(stop))
    counts = None if asked is None else np.minimum(np.full(len(stop), asked), stop)
    return collate(dataset, Split(name="test", users=every, stop=stop, asked=counts), every, every, 0)


def encoded(model: Any, batch: Batch) -> Tensor:
    """The rows that carry labels, from one pass over everything."""
    request = model.scoring_request(batch)
    rows: Tensor = model.encode(model.join(model.embeddings(request.features), request.values), request)
    return rows


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and found.numel()
    assert (found - wanted).abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted.abs().max()


@pytest.mark.parametrize("memory", [(), MEMORY], ids=["plain", "memory"])
@pytest.mark.parametrize("layout", RANKING)
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_slates_score_what_each_pair_scores_alone(
    dataset: SequenceDataset, backbone: str, layout: str, memory: tuple[str, ...]
) -> None:
    model, collate = model_of(dataset, "ranking", *BACKBONES[backbone], *RANKING[layout], *memory)
    users = np.array([3, 1, 1, 3, 0, 3, 3, 4, 2])
    requests = Requests(dataset, users, np.arange(9), 2 * 10**9)
    every = np.arange(9)
    batch = collate(dataset=requests, split=requests.split, rows=every, sample_ids=every, step=0)
    wanted = model.predictions(model.scoring_request(batch))
    if (backbone, layout, memory) == ("next", "full", ()):
        assert not scores_slates(model)
        return
    assert scores_slates(model)
    slates, cache, scores, pairs = requests.slates(3), None, [], []
    assert slates.number.tolist() == [1, 1, 1, 2, 1]
    for slate in range(2):
        rows = slates.rows(np.arange(5), slate)
        batch = collate(slates.requests, slates.requests.split, rows, rows, 0)
        if cache is None:
            _, cache = model.extend(None, batch, history_alone=True)
        hidden, after = model.extend(cache, batch)
        assert all(own is kept for own, kept in zip(after.layers, cache.layers, strict=True))
        scores.append(model.predictions_of(hidden))
        pairs.append(slates.pairs_of(rows))
    order = np.concatenate(pairs)
    assert sorted(order) == list(range(9))
    assert_same(torch.cat(scores)[np.argsort(order)], wanted)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("layout", ["item", "interleave"])
@torch.no_grad()
def test_events_are_appended(dataset: SequenceDataset, backbone: str, layout: str) -> None:
    model, collate = model_of(dataset, "retrieval", *BACKBONES[backbone], f"NetworkArgs.token_layout='{layout}'",
                              "DatasetArgs.max_history_seqlen=20")  # fmt: skip
    cache, lengths = None, np.array(LENGTHS)
    for share in (0.0, 0.3, 0.3, 0.7, 1.0):
        stop = np.floor(share * lengths).astype(np.int64)
        _, cache = model.extend(cache, samples(collate, dataset, stop, asked=0))
        rows, _ = model.extend(cache, batch := samples(collate, dataset, np.minimum(stop + 1, lengths)))
        # The row that is asked for may be one that the cache already has.
        wanted = encoded(model, batch)
        stream = model.whole_stream(batch)
        owner = sequence_ids(stream.layout.offsets, stream.timestamps.shape[0])
        place = positions_in_sequence(stream.layout.offsets, owner.numel())
        labelled = model.postprocess.rows(stream, batch.label_events)
        new = place[labelled] >= cache.lengths[owner[labelled]]
        assert torch.allclose(rows, wanted[new], atol=1e-5)
    whole = samples(collate, dataset, lengths)
    _, cache = model.extend(None, samples(collate, dataset, np.maximum(lengths - 2, 0), asked=0))
    assert_same(model.extend(cache, whole)[0], encoded(model, whole))


def tail(batch: Batch, model: Any, first: Tensor, stop: Tensor, *, contexts: bool) -> Batch:
    """The events of ``batch`` at the places from ``first`` to ``stop``, which a part of the history is."""
    kept, lengths = {}, {}
    for name in batch.features.keys():  # noqa: SIM118
        own = batch.lengths(name)
        if name in model.preprocess.contexts:
            kept[name] = torch.full((int(own.sum()),), contexts)
        else:
            offsets = lengths_to_offsets(own)
            place, owner = positions_in_sequence(offsets, int(own.sum())), sequence_ids(offsets, int(own.sum()))
            kept[name] = (place >= first[owner]) & (place < stop[owner])
        lengths[name] = own
    events = kept[batch.item]
    candidates = torch.minimum(batch.num_candidates, (stop - (lengths[batch.item] - batch.num_candidates)).clamp(min=0))
    labelled = events[batch.label_events]
    return replace(
        batch.only(kept),
        label_events=events.cumsum(0)[batch.label_events[labelled]] - 1,
        labels=batch.labels[labelled],
        timestamps=batch.timestamps[events],
        num_candidates=candidates,
    )


@pytest.mark.parametrize("blocks", [SMALL, MEMORY, (*MEMORY, "MemoryArgs.pretrain_item_num=2")],
                         ids=["one_block", "two_blocks", "block_after"])  # fmt: skip
@pytest.mark.parametrize("task", ["retrieval", "ranking", "ranking_full"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_memory_and_recent_events_give_the_full_rows(
    dataset: SequenceDataset, backbone: str, task: str, blocks: tuple[str, ...]
) -> None:
    lines = (*RANKING["full" if "pretrain_item_num=2" not in str(blocks) else "add"],) if task == "ranking_full" else ()
    model, collate = model_of(dataset, task.split("_")[0], *BACKBONES[backbone], *blocks, *lines)
    memory = model.preprocess.blocks
    batch = samples(collate, dataset, np.array(LENGTHS))
    events = batch.lengths("item")
    recent = (events - 1).clamp(max=memory.history - memory.compressed)
    cut = events - 1 - recent
    assert cut.max() == memory.compressed and cut.min() == 0
    cache = compress(model, tail(batch, model, torch.zeros_like(cut), cut, contexts=True))
    stored = sum(memory.sizes[: memory.num_stored])
    assert cache.layout.lengths.tolist() == [2 + stored] * len(LENGTHS)
    rows, _ = recall(model, cache, tail(batch, model, cut, events, contexts=False))
    wanted = encoded(model, batch)
    assert_same(rows, wanted[-rows.shape[0] :] if task == "retrieval" else wanted)


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused(dataset: SequenceDataset) -> None:
    gru, collate = model_of(dataset, "retrieval", "NetworkArgs.backbone='gru'")
    lengths = np.array(LENGTHS)
    with pytest.raises(ValueError, match="RecurrentStack keeps no keys and values"):
        gru.extend(None, samples(collate, dataset, lengths))
    timed, collate = model_of(dataset, "ranking", *RANKING["times"])
    _, cache = timed.extend(None, samples(collate, dataset, lengths - 1, asked=0))
    with pytest.raises(ValueError, match="num_time_buckets: tokens depend on the time of the request"):
        timed.extend(cache, samples(collate, dataset, lengths))
    with pytest.raises(ValueError, match="num_memory_tokens = 0"):
        compress(timed, samples(collate, dataset, lengths))
    moved, collate = model_of(dataset, "retrieval", *SMALL)
    _, cache = moved.extend(None, samples(collate, dataset, lengths - 1, asked=0))
    with pytest.raises(ValueError, match="blocks stand at a distance from the end"):
        moved.extend(cache, samples(collate, dataset, lengths))
    few = samples(collate, dataset, lengths[:2])
    with pytest.raises(ValueError, match="the cache is of 5 samples, the batch of 2"):
        moved.extend(cache, few)


WAYS = {
    "tokens": ("FeatureArgs.context_merge='tokens'", "FeatureArgs.merge='sum'"),
    "merged": ("FeatureArgs.context_merge='concat'",),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_features_of_users_and_events_stand_behind_a_cache_too(tmp_path: Path, way: str) -> None:
    dataset = make_dataset(tmp_path / "small", LENGTHS, num_items=30, declared=declared_features())
    model, collate = model_of(dataset, "ranking", *RANKING["candidates"], *WAYS[way], *MEMORY)
    model.item_encoder.read(dataset)
    users = np.array([3, 1, 1, 3, 0, 4, 2])
    requests, every = Requests(dataset, users, np.arange(7), 2 * 10**9), np.arange(7)
    wanted = model.predictions(model.scoring_request(collate(requests, requests.split, every, every, 0)))
    slates = requests.slates(5)
    rows = slates.rows(np.arange(5), 0)
    batch = collate(slates.requests, slates.requests.split, rows, rows, 0)
    _, cache = model.extend(None, batch, history_alone=True)
    found = model.predictions_of(model.extend(cache, batch)[0])
    assert_same(found[np.argsort(slates.pairs_of(rows))], wanted)
    recent, stop = model.preprocess.blocks.history - model.preprocess.blocks.compressed, dataset.lengths
    cut = np.maximum(stop - recent, 0)
    old = Split(name="test", users=np.arange(5), stop=cut, asked=np.zeros_like(cut))
    memory = compress(model, replace(collate, max_history=4)(dataset, old, np.arange(5), np.arange(5), 0))
    batch = replace(collate, max_history=recent)(slates.requests, slates.requests.split, rows, rows, 0)
    hidden, _ = recall(model, memory, batch)
    assert_same(model.predictions_of(hidden)[np.argsort(slates.pairs_of(rows))], wanted)
