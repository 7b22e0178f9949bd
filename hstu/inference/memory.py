"""Memory of all users: old events compressed once and stored, and answers from that and the recent events alone."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from hstu.bar import progress_bar
from hstu.data.batch import Batch
from hstu.data.loader import BatchLoader
from hstu.data.splits import Split
from hstu.data.vocabulary import Index
from hstu.inference.memory_files import (
    INDEX,
    RECORD,
    MemoryRecord,
    checkpoint_hash,
    next_part,
    open_part,
    part_files,
    read_index,
    read_record,
    require_same,
    take_rows,
    write_part,
    write_record,
)
from hstu.inference.opened import Opened
from hstu.inference.prediction_requests import PredictionRequests
from hstu.layers.cache import Cache
from hstu.layers.memory import MemoryBlocks
from hstu.models.caching import compress, memory_blocks_of, recall, stored_layout

logger = logging.getLogger(__name__)

PART_USERS = 1024  # of a file
_OPEN_PARTS = 16  # files that stay mapped
_TOLD_EVERY = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class MemoryCounts:
    """How many of the users who ask have a memory, and how old it is.

    Attributes:
        users: Who ask.
        missing: Without memory, or with that of another history.
        stale: With events that neither their memory nor their recent events cover.
        most_events: Such events of one user, at the most.
    """

    users: int
    missing: int
    stale: int
    most_events: int


class MemoryStore:
    """The memory in a directory, of everybody; read once, and asked often.

    Args:
        opened: The run.
        split: Before which events.
        directory: Where the memory is.

    Raises:
        ValueError: if there is none, it is of another run, checkpoint or split, or damaged.
    """

    def __init__(self, opened: Opened, split: str, directory: Path) -> None:
        self.opened, self.directory = opened, directory
        self.blocks = _blocks(opened)
        self.record = read_record(directory)
        require_same(directory, self.record, _record(opened, self.blocks, split))
        self.files = part_files(directory)
        self.part = lru_cache(_OPEN_PARTS)(lambda number: open_part(self.files[number]))
        every = [read_index(file, number) for number, file in enumerate(self.files)]
        found = pl.concat([pl.DataFrame(schema=INDEX), *every]).unique("user", keep="last", maintain_order=True)
        self._users = Index(found.get_column("user").to_arrow())
        nobody = pl.DataFrame({name: [-1] for name in INDEX if name != "user"})
        self._found = pl.concat([found.drop("user"), nobody])

    def find(self, users: list[str]) -> pl.DataFrame:
        """Return part, row, stop, item and time of the memory of each of ``users``; -1 where there is none."""
        places = self._users.places(pl.Series(users, dtype=pl.String))
        return self._found[places.fill_null(self._found.height - 1)]


class StoredMemory:
    """The memory in a directory, of those who ask.

    Args:
        store: The directory.
        requests: Who asks.

    Raises:
        ValueError: if a user asks after several histories.
    """

    def __init__(self, store: MemoryStore, requests: PredictionRequests) -> None:
        self.store, self.requests = store, requests
        self.opened, self.directory, self.blocks, self.record = (
            store.opened,
            store.directory,
            store.blocks,
            store.record,
        )
        names = np.array([str(user) for user in requests.users.to_pylist()], dtype=np.str_)
        self.users, self.rows, self.user_of = np.unique(names, return_index=True, return_inverse=True)
        history = requests.split.stop - 1
        if (history != history[self.rows][self.user_of]).any():
            protocol = self.opened.config.dataset.protocol
            raise ValueError(f"{self.directory}: memory is of one history a user, and DatasetArgs.protocol = "
                             f"{protocol!r} asks after several; use --split future")  # fmt: skip
        self.recent = self.blocks.history - self.blocks.compressed
        #: Events that the memory of each user should stand for.
        self.wanted = np.maximum(history[self.rows] - self.recent, 0)
        self.index = store.find(self.users.tolist())
        #: Events of each user that neither memory nor recent events cover; -1: there is no memory of its history.
        self.gaps = self._gaps()

    def _gaps(self) -> np.ndarray:
        stop = self.index["stop"].to_numpy()
        items, times = _last_events(self.requests, self.rows, np.minimum(np.maximum(stop, 0), self.wanted))
        same = (items == self.index["item"].to_numpy()) & (times == self.index["time"].to_numpy())
        return np.where((stop >= 0) & (stop <= self.wanted) & same, self.wanted - stop, -1)

    @property
    def counts(self) -> MemoryCounts:
        """How many users are there, and how stale they are."""
        missing, stale = int((self.gaps < 0).sum()), int((self.gaps > 0).sum())
        return MemoryCounts(
            users=len(self.gaps), missing=missing, stale=stale, most_events=int(self.gaps.max(initial=0))
        )

    def require_all(self) -> None:
        """Raise ``ValueError`` if there is no memory of somebody; say of how many it is old."""
        counts = self.counts
        if counts.missing:
            first = self.users[np.flatnonzero(self.gaps < 0)[0]]
            raise ValueError(f"{self.directory}: has no memory of {counts.missing} of {counts.users} users with their "
                             f"present histories, the first of them {first!r}; make it with --refresh")  # fmt: skip
        if counts.stale:
            logger.info("%d of %d users have events, up to %d, that neither their memory nor their %d recent events "
                        "cover; --refresh makes their memory again",
                        counts.stale, counts.users, counts.most_events, self.recent)  # fmt: skip

    def loader(self, loader: BatchLoader) -> BatchLoader:
        """Return ``loader`` with the recent events alone in front of what is asked for."""
        return replace(loader, collate=replace(loader.collate, max_history=self.recent))

    def hidden_rows(self, batch: Batch, requests: np.ndarray) -> Tensor:
        """Return the rows that carry labels of ``batch``, which ``loader`` made of ``requests`` [B], [L, D] float32."""
        rows, _ = recall(self.opened.model, self.cache(requests), batch)
        return rows

    def cache(self, requests: np.ndarray) -> Cache:
        """Return the memory of ``requests`` [B], rows of the split; that of nobody, -1, is zero."""
        record, size = self.record, len(requests)
        widths = [torch.Size(shape).numel() for shape in (record.key_shape, record.value_shape)]
        dtype = torch.bfloat16 if record.dtype_str == "bfloat16" else torch.float32
        found = {
            "keys_values": torch.zeros(size, record.layers, record.tokens, sum(widths), dtype=dtype),
            "times": torch.zeros(size, record.tokens, dtype=torch.int64),
            "places": torch.arange(record.tokens).repeat(size, 1),
            "lengths": torch.full((size,), record.tokens),
        }
        users = self.user_of[requests]
        part, row = (self.index[name].to_numpy()[users] for name in ("part", "row"))
        for number in np.unique(part[requests >= 0]):
            chosen = np.flatnonzero((part == number) & (requests >= 0))
            rows, file = torch.from_numpy(row[chosen]), self.store.files[int(number)]
            for name, values in take_rows(file, self.store.part(int(number)), rows).items():
                found[name][torch.from_numpy(chosen)] = values
        found = {name: values.to(self.opened.assembly.mesh.device) for name, values in found.items()}
        layers = (layer.flatten(0, 1).split(widths, 1) for layer in found["keys_values"].unbind(1))
        return Cache(
            layout=stored_layout(self.blocks, record.contexts, found["times"]),
            places=found["places"].flatten(),
            lengths=found["lengths"],
            timeless=found["lengths"] == record.tokens,
            layers=tuple((k.unflatten(1, record.key_shape), v.unflatten(1, record.value_shape)) for k, v in layers),
        )


def update_memory(
    opened: Opened, requests: PredictionRequests, split: str, directory: Path, *, refresh: bool = False
) -> MemoryCounts:
    """Compress the old events of all who ask and have no memory yet; all ranks call it.

    What was written when it is stopped stays, and the next call goes on.

    Args:
        opened: A run with memory tokens.
        requests: Who asks.
        split: Before which events.
        directory: Where to; made if it is not there.
        refresh: Also those whose memory is stale.

    Returns:
        How many had none, or a stale one, before.

    Raises:
        ValueError: if the directory holds the memory of something else, or memory cannot be stored.
    """
    mesh, blocks = opened.assembly.mesh, _blocks(opened)
    if not (directory / RECORD).is_file() and part_files(directory):
        raise ValueError(f"{directory}: holds files of users without {RECORD}; choose another directory")
    mesh.on_main(lambda: _begin(opened, blocks, split, directory))
    memory = StoredMemory(MemoryStore(opened, split, directory), requests)
    chosen = np.flatnonzero((memory.gaps < 0) | ((memory.gaps > 0) & refresh))
    first = mesh.on_main(lambda: next_part(directory))
    parts = [chosen[start : start + PART_USERS] for start in range(0, len(chosen), PART_USERS)]
    bar, told = progress_bar(total=len(chosen), unit="user") if mesh.is_main else None, time.monotonic()
    for step in range(0, len(parts), mesh.world_size):
        number = step + mesh.rank
        own = parts[number] if number < len(parts) else chosen[:0]
        together = max(len(part) for part in parts[step : step + mesh.world_size])
        tensors = _compressed(memory, own, together)
        if own.size:
            write_part(directory, first + number, memory.users[own].tolist(), tensors)
        done = min((step + mesh.world_size) * PART_USERS, len(chosen))
        if bar is not None:
            bar.update(done - bar.n)
        elif time.monotonic() - told > _TOLD_EVERY or done == len(chosen):
            logger.info("memory of %d of %d users", done, len(chosen))
            told = time.monotonic()
    if bar is not None:
        bar.close()
    mesh.on_main(lambda: None)  # everybody's files are there
    return memory.counts


def _compressed(memory: StoredMemory, users: np.ndarray, together: int) -> dict[str, Tensor]:
    """Return the rows of a file of ``users``; as many lookups as ``together`` users take, for they are collective."""
    opened, requests = memory.opened, memory.requests
    stop, rows, loader = memory.wanted[users], memory.rows[users], opened.loader
    collate = replace(loader.collate, max_history=memory.blocks.compressed)
    split = Split(name="test", users=requests.split.users[rows], stop=stop, asked=np.zeros_like(stop))
    found = []
    for start in range(0, together, loader.batch_size):
        some = np.arange(start, min(start + loader.batch_size, len(users)))
        batch = collate(requests.dataset, split, some, some, 0).to(opened.assembly.mesh.device)
        cache = compress(opened.model, batch)
        if some.size:
            found.append(_tensors(cache, len(some)))
    if not found:
        return {}
    items, times = _last_events(requests, rows, stop)
    tensors = {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}
    return tensors | {"stop": torch.from_numpy(stop), "item": torch.from_numpy(items), "time": torch.from_numpy(times)}


def _tensors(cache: Cache, users: int) -> dict[str, Tensor]:
    assert cache.layout.timestamps is not None
    layers = [torch.cat([k.flatten(1), v.flatten(1)], 1).unflatten(0, (users, -1)) for k, v in cache.layers]
    return {
        "keys_values": torch.stack(layers, 1),
        "times": cache.layout.timestamps.unflatten(0, (users, -1)),
        "places": cache.places.unflatten(0, (users, -1)),
        "lengths": cache.lengths,
    }


def _begin(opened: Opened, blocks: MemoryBlocks, split: str, directory: Path) -> None:
    if not (directory / RECORD).is_file():
        write_record(directory, _record(opened, blocks, split))


def _record(opened: Opened, blocks: MemoryBlocks, split: str) -> MemoryRecord:
    """Return what the memory of ``opened`` is."""
    network, contexts = opened.config.network, len(opened.model.preprocess.contexts)
    heads = network.num_query_groups or network.num_attention_heads
    return MemoryRecord(
        run=opened.run.path.name,
        step=opened.step,
        checkpoint=checkpoint_hash(opened),
        split=split,
        dtype_str=network.dtype_str,
        layers=network.num_layers,
        contexts=contexts,
        tokens=contexts + blocks.tokens_before(blocks.num_stored),
        key_shape=(heads, network.kv_channels),
        value_shape=(heads, network.value_channels or network.kv_channels),
    )


def _blocks(opened: Opened) -> MemoryBlocks:
    blocks, dataset = memory_blocks_of(opened.model), opened.config.dataset
    for name in ("history_start", "history_end"):
        if getattr(dataset, name) is not None:
            raise dataset.error(name, "memory is of the whole history; leave it out")
    if opened.config.memory.recent_item_num == 0:
        raise opened.config.memory.error("recent_item_num", "no event would stand behind a stored memory to answer "
                                         "from; use 1 or more")  # fmt: skip
    return blocks


def _last_events(requests: PredictionRequests, rows: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return item and time of the event before ``stop`` of ``rows`` of the split, int64; -1 where there is none."""
    events = requests.dataset.gather(requests.split.users[rows], np.maximum(stop - 1, 0), stop)
    items, times = np.full(len(rows), -1), np.full(len(rows), -1)
    items[stop > 0] = events.items
    if events.times is not None:
        times[stop > 0] = events.times
    return items, times
