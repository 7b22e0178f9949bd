"""Models that answer from a cache: of the history, for candidates and later events, or of memory tokens alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hstu.data.batch import POOL, Batch
from hstu.layers.cache import Cache
from hstu.layers.memory import MemoryBlocks, Part
from hstu.layers.tokens import Stream
from hstu.models.lookup import Lookup
from hstu.ops import Layout, Mask, sequence_ids, sequences_and_positions

if TYPE_CHECKING:
    from hstu.models.encoder import Encoder


def can_cache(model: Encoder) -> bool:
    """Whether the backbone of ``model`` leaves keys and values behind: hstu, sasrec and llama do."""
    return hasattr(model.backbone, "extend") and _mask(model).causal


def scores_slates(model: Encoder) -> bool:
    """Whether candidates score the same alone and beside others, so that many may share one history."""
    if not can_cache(model) or _mask(model).candidate_group_size > 1:
        return False
    if model.preprocess.blocks is not None and model.preprocess.blocks.at_session:
        return False  # memory stands where the session of what is asked for begins
    # Context that attends to the last event would attend to one that does not know yet when it is asked.
    return not (_mask(model).context == "full" and _asks_next(model) and model.preprocess.blocks is None)


def can_go_on(model: Encoder) -> bool:
    """Whether :func:`extend` takes in events after those in its cache, whatever these are."""
    if not can_cache(model) or model.preprocess.blocks is not None:
        return False
    positions = model.preprocess.positions
    if positions.time is not None and positions.time_bucket_of == "age":
        return False
    return not (_mask(model).context == "full" and model.preprocess.contexts)


@torch.no_grad()
def extend(model: Encoder, cache: Cache | None, batch: Batch, *, history_alone: bool = False) -> tuple[Tensor, Cache]:
    """Run over the tokens of ``batch`` that stand behind those of ``cache``.

    What is asked for stands in the batch as candidates, in retrieval too; all other events count as history.

    Args:
        model: In evaluation mode, whole on this rank.
        cache: From the same samples, whose first ``cache.lengths`` tokens were the same; None for nothing.
        batch: Whole samples: of events in the cache only their number and times are looked at.
        history_alone: Leave out the candidates.

    Returns:
        The new rows that carry labels, as ``model.encode`` gives them, [L, D] float32; and the cache with the new
        events. Candidates are never in it; nor is, where rows ask at the time of the next event, the last of them.

    Raises:
        ValueError: if the backbone keeps no cache, or tokens in it would have to be computed again.
    """
    if not can_cache(model):
        raise ValueError(f"{type(model.backbone).__name__} keeps no keys and values; run the whole history at once")
    stream = model.whole_stream(batch)
    layout = stream.layout
    if layout.offsets.device.type != "cpu":  # candidates may be more than in training
        stream = replace(stream, layout=replace(layout, max_seqlen=layout.longest + batch.labels.numel()))
    start = torch.zeros_like(layout.lengths) if cache is None else cache.lengths
    if cache is not None and cache.num_samples != batch.num_samples:
        raise ValueError(f"the cache is of {cache.num_samples} samples, the batch of {batch.num_samples}")
    given, is_new = _given(model, batch, stream), batch.num_candidates > 0
    is_new = is_new | (layout.history > start + _asks_next(model))
    for name, values in given.items() if cache is not None else ():
        assert cache is not None
        if bool(((values != cache.given[name]) & is_new).any()):
            raise ValueError(f"{name}, which is no more what it was when the cache was made; run all tokens at once")
    rows, after = _run(model, cache, batch, stream, start, layout.history if history_alone else layout.lengths)
    return rows, replace(after, given=given) if given else after


@torch.no_grad()
def compress(model: Encoder, batch: Batch) -> Cache:
    """Return the memory of the events of ``batch``, the oldest of their users', and of nothing else.

    Args:
        model: With memory tokens.
        batch: At most ``pretrain_item_num`` events a sample, no candidates.

    Raises:
        ValueError: if tokens depend on what comes after the events.
    """
    blocks = memory_blocks_of(model)
    first = blocks.compressed - batch.lengths(batch.item)
    stream = model.whole_stream(batch, Part(first=first, blocks=range(blocks.num_stored)))
    _, cache = _run(model, None, batch, stream, torch.zeros_like(first), stream.layout.lengths)
    return cache.compressed()


@torch.no_grad()
def recall(model: Encoder, memory: Cache, batch: Batch) -> tuple[Tensor, Cache]:
    """Run over recent events behind the memory of the older ones.

    Args:
        model: With memory tokens.
        memory: From :func:`compress`.
        batch: At most ``recent_item_num`` events a sample, and what is asked for after them; context is in the memory.

    Returns:
        As :func:`extend`.
    """
    blocks = memory_blocks_of(model)
    history = _num_history(batch)
    stored = range(blocks.num_stored, len(blocks.offsets))
    part = Part(first=blocks.history - history, blocks=stored, context=memory.layout.context)
    names = [*batch.features.keys()]
    contexts = model.preprocess.contexts
    batch = batch.only(
        {name: torch.full_like(batch.ids(name), name not in contexts, dtype=torch.bool) for name in names}
    )
    stream = model.whole_stream(batch, part)
    return _run(model, memory, batch, stream, torch.zeros_like(history), stream.layout.lengths)


def stored_layout(blocks: MemoryBlocks, contexts: int, times: Tensor) -> Layout:
    """Return the layout of what :func:`compress` keeps of samples with ``contexts`` context tokens each.

    Args:
        blocks: Of the model.
        contexts: Context tokens of a sample.
        times: [B, contexts + stored memory tokens] int64 seconds.
    """
    (size, tokens), device = times.shape, times.device
    segments = torch.zeros(tokens, dtype=torch.int32, device=device)
    segments[contexts:] = blocks.on(device).of_tokens[: blocks.tokens_before(blocks.num_stored)]
    return Layout(
        torch.arange(size + 1, device=device) * tokens,
        max_seqlen=tokens,
        num_context=torch.full((size,), contexts, device=device),
        segments=segments.repeat(size),
        is_memory=(torch.arange(tokens, device=device) >= contexts).repeat(size),
        timestamps=times.flatten(),
    )


def memory_blocks_of(model: Encoder) -> MemoryBlocks:
    """Return the blocks of a model whose memory can be stored.

    Raises:
        ValueError: if there are none, or they depend on what comes after them.
    """
    blocks: MemoryBlocks | None = model.preprocess.blocks
    if blocks is None:
        raise ValueError("MemoryArgs.num_memory_tokens = 0: the run has no memory tokens; train one that has")
    if blocks.at_session:
        raise ValueError("DatasetArgs.sessions: which events a memory stands for depends on the request, so that none "
                         "can be stored; ask without one")  # fmt: skip
    if model.preprocess.positions.time is not None:
        raise ValueError("NetworkArgs.num_time_buckets: tokens depend on the time of the request, which a memory made "
                         "before it does not know; use 0")  # fmt: skip
    if _mask(model).context == "full" and len(blocks.offsets) > blocks.num_stored:
        raise ValueError("NetworkArgs.context_attention = 'full': context attends to memory after "
                         "MemoryArgs.pretrain_item_num, which a stored one cannot take in; use 'causal'")  # fmt: skip
    return blocks


def _num_history(batch: Batch) -> Tensor:
    """Return the events before what is asked for, [B] int64."""
    return (batch.lengths(batch.item) - batch.num_candidates.clamp(min=1)).clamp(min=0)


def _mask(model: Encoder) -> Mask:
    mask: Mask = model.backbone.config.mask  # type: ignore[union-attr, assignment]
    return mask


def _asks_next(model: Encoder) -> bool:
    return bool(getattr(model.backbone, "asks_next", False))


def _given(model: Encoder, batch: Batch, stream: Stream) -> dict[str, Tensor]:
    """Return what the tokens of a sample depend on beside those before them, [B] int64, by how a message begins."""
    positions, layout, given = model.preprocess.positions, stream.layout, {}
    if positions.time is not None and positions.time_bucket_of == "age":
        owner = sequence_ids(layout.offsets, stream.timestamps.shape[0])
        latest = torch.zeros_like(layout.lengths).scatter_reduce(0, owner, stream.timestamps, "amax")
        given["NetworkArgs.num_time_buckets: tokens depend on the time of the request"] = latest
    if model.preprocess.blocks is not None:
        given["MemoryArgs.insert_method: blocks stand at a distance from the end of the history"] = _num_history(batch)
    if batch.recent is not None:
        given["DatasetArgs.sessions: memory stands where the last session begins"] = batch.recent
    return given


def _run(
    model: Encoder, cache: Cache | None, batch: Batch, stream: Stream, start: Tensor, stop: Tensor
) -> tuple[Tensor, Cache]:
    """Run over the tokens at the places from ``start`` to ``stop`` [B] of each sample of ``stream``."""
    total = stream.timestamps.shape[0]
    owner, place = sequences_and_positions(stream.layout.offsets, total)
    rows = ((place >= start[owner]) & (place < stop[owner])).nonzero().squeeze(1)
    local = stream.shard(rows)
    labelled, places = model.local_labels(batch, local, batch.label_events)
    pool = batch.labels[:0] if POOL in model.embeddings.widths else None  # tables want every feature that they have
    request = Lookup(batch=labelled, stream=local, rows=places, values=model.values(batch, local, pool))
    return model.encode_behind(cache, model.join(model.embeddings(request.features), request.values), request)
