"""Memory tokens in the token stream, against a loop over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hstu.layers.memory import MemoryBlocks
from hstu.layers.positions import PositionEncoder, token_positions
from hstu.layers.postprocess import Postprocess
from hstu.layers.preprocess import Preprocess

D, N = 4, 6  # width, events of a full history
# Events and candidates: full, short, only what is predicted, nothing at all, recent events alone, nothing.
EVENTS, CANDIDATES = (7, 5, 1, 0, 2, 0), (0, 0, 0, 0, 0, 0)
WITH_CANDIDATES = (8, 5, 2, 0, 3), (2, 1, 2, 0, 1)
BLOCKS = {
    "one": MemoryBlocks((4,), (2,), N, 4),
    "three": MemoryBlocks((2, 3, 6), (1, 3, 2), N, 3),
}


def build(layout: str, blocks: MemoryBlocks) -> Preprocess:
    torch.manual_seed(0)
    return Preprocess(
        D,
        {"age": D, "item": D, **({"action": D} if layout != "item" else {})},
        item="item",
        action=None if layout == "item" else "action",
        contexts=("age",),
        layout=layout,  # type: ignore[arg-type]
        positions=PositionEncoder(D, 40, scale_inputs=False),
        max_tokens=40,
        memory=blocks,
    )


def expected(layout: str, blocks: MemoryBlocks, events: tuple[int, ...], candidates: tuple[int, ...]) -> dict[str, Any]:
    """What each token is, by a plain loop over padded histories."""
    found: dict[str, list] = {key: [] for key in ("token", "segment", "memory", "position", "time", "last", "offsets")}
    item = 0
    per_event = 2 if layout == "interleave" else 1

    def add(token: tuple, segment: int, position: int, time: int | None, memory: bool = False) -> None:
        for key, value in zip(
            ("token", "segment", "position", "time", "memory"), (token, segment, position, time, memory), strict=True
        ):
            found[key].append(value)

    for b, (total, m) in enumerate(zip(events, candidates, strict=True)):
        found["offsets"].append(len(found["token"]))
        has_context = total > 0
        if has_context:
            add(("age", b), 0, 0, 10 * item)
        n = max(0, total - max(m, 1))
        position, memory, segment, own = int(has_context), 0, 0, 0
        for place in range(N + 1):  # places of a full history; the last is what comes after
            for j, offset in enumerate(blocks.offsets):
                if offset == place:
                    for _ in range(blocks.sizes[j]):
                        add(("memory", memory), j, position, 10 * (item + max(own - 1, 0)) if total else None, True)
                        memory, position = memory + 1, position + 1
                    segment = j + 1
            missing = place < N - n
            for e in [] if missing else [own] if place < N else range(own, total):
                candidate = e >= total - m
                if e:
                    found["last"].append(len(found["token"]) - 1 if e < total - m or e == total - m else None)
                add(("item", item + e), segment, position, 10 * (item + e))
                if layout == "interleave" and not candidate:
                    add(("action", item + e), segment, position + 1, 10 * (item + e))
                own += 1
            position += per_event
        if total:
            found["last"].append(None)  # nothing follows the last event
        item += total
    found["offsets"].append(len(found["token"]))
    return found


@pytest.mark.parametrize("layout", ["item", "interleave"])
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(EVENTS, CANDIDATES), WITH_CANDIDATES], ids=["history", "candidates"])
def test_stream_with_memory(layout: str, name: str, shape: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    (events, candidates), blocks = shape, BLOCKS[name]
    preprocess, wanted = build(layout, blocks), expected(layout, blocks, events, candidates)
    with torch.no_grad():
        preprocess.positions.position.zero_()  # type: ignore[union-attr]
    lengths = {"age": torch.tensor([int(n > 0) for n in events]), "item": torch.tensor(events)}
    if layout != "item":
        lengths["action"] = torch.tensor(events) - torch.tensor(candidates)
    sizes = {key: int(value.sum()) for key, value in lengths.items()}
    embedded = {key: torch.randn(size, D) for key, size in sizes.items()}
    stream = preprocess.stream(lengths, sizes, torch.tensor(candidates), 10 * torch.arange(sum(events)))
    tokens = preprocess(embedded, stream)
    assert tokens.layout.offsets.tolist() == wanted["offsets"]
    assert tokens.layout.segments.tolist() == wanted["segment"]  # type: ignore[union-attr]
    assert tokens.layout.is_memory.tolist() == wanted["memory"]  # type: ignore[union-attr]
    assert token_positions(tokens).tolist() == wanted["position"]
    told = [
        (own, time) for own, time in zip(tokens.timestamps.tolist(), wanted["time"], strict=True) if time is not None
    ]
    assert all(own == time for own, time in told) and len(told) > 20
    places = {"item": 0, "action": 0, "age": 0}
    for row, (kind, index) in enumerate(wanted["token"]):
        if kind == "memory":
            value = preprocess.memory[index]  # type: ignore[index]
        else:
            value = embedded[kind][places[kind]]
            places[kind] += 1
        assert torch.equal(tokens.values[row], value), (row, kind, index)
    if shape[1] == CANDIDATES:
        # The row that predicts an event is the one before it, memory where a block stands there.
        rows = Postprocess(D, "none", 1e-6, last_token=True).rows(stream, torch.ones(sum(events), dtype=torch.bool))
        assert [(a, b) for a, b in zip(rows.tolist(), wanted["last"], strict=True) if b is not None and a != b] == []
        assert sum(wanted["memory"][row] for row in wanted["last"] if row is not None) >= 2
