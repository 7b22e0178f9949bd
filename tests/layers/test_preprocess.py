"""Embeddings to the token stream, against a loop over samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.layers.positions import PositionEncoder, token_positions
from hstu.layers.preprocess import Preprocess

D = 6
EVENTS, CANDIDATES = (4, 1, 0, 3, 2), (1, 1, 0, 0, 2)
B, E = len(EVENTS), sum(EVENTS)
LENGTHS = {
    "age": torch.ones(B, dtype=torch.int64),
    "country": torch.ones(B, dtype=torch.int64),
    "item": torch.tensor(EVENTS),
    "action": torch.tensor(EVENTS) - torch.tensor(CANDIDATES),
}
TIMES = torch.tensor([10, 20, 30, 40, 50, 61, 62, 63, 70, 71])


def build(
    layout: str, contexts: tuple[str, ...], widths: dict[str, int] | None = None
) -> tuple[Preprocess, dict[str, Tensor]]:
    torch.manual_seed(0)
    widths = {"age": D, "country": D, "item": D, "action": D, **(widths or {})}
    features = [*contexts, "item", *(["action"] if layout != "item" else [])]
    preprocess = Preprocess(
        D,
        {name: widths[name] for name in features},
        item="item",
        action=None if layout == "item" else "action",
        contexts=contexts,
        layout=layout,  # type: ignore[arg-type]
        positions=PositionEncoder(D, 12),
        max_tokens=12,
    )
    embedded = {name: torch.randn(int(LENGTHS[name].sum()), widths[name], requires_grad=True) for name in features}
    return preprocess, embedded


def run(preprocess: Preprocess, embedded: dict[str, Tensor]) -> Any:
    sizes = {name: int(lengths.sum()) for name, lengths in LENGTHS.items()}
    return preprocess(embedded, preprocess.stream(LENGTHS, sizes, torch.tensor(CANDIDATES), TIMES))


def expected_stream(preprocess: Preprocess, embedded: dict[str, Tensor], layout: str) -> dict[str, list]:
    """Values before positions, sample sizes, times and rows of the events, by a plain loop."""
    wide = {n: preprocess.project[n](x) if n in preprocess.project else x for n, x in embedded.items()}
    values: list[Tensor] = []
    sizes, times, rows = [], [], []
    item = action = 0
    for b, (events, candidates) in enumerate(zip(EVENTS, CANDIDATES, strict=True)):
        first = len(values)
        for name in preprocess.contexts:
            values.append(wide[name][b])
            times.append(int(TIMES[item]) if events else None)
        for event in range(events):
            rows.append(len(values))
            value, time = wide["item"][item], int(TIMES[item])
            has_action = layout != "item" and event < events - candidates
            if layout == "add" and has_action:
                value = value + wide["action"][action]
            values.append(value)
            times.append(time)
            if layout == "interleave" and has_action:
                values.append(wide["action"][action])
                times.append(time)
            action, item = action + has_action, item + 1
        sizes.append(len(values) - first)
    return {"values": values, "sizes": sizes, "times": times, "rows": rows}


@pytest.mark.parametrize("contexts", [(), ("age",), ("country", "age")])
@pytest.mark.parametrize("layout", ["interleave", "add", "item"])
@pytest.mark.parametrize("widths", [{}, {"item": 3}, {"action": 9, "age": 2, "item": 4}])
def test_tokens_times_and_rows(layout: str, contexts: tuple[str, ...], widths: dict[str, int]) -> None:
    preprocess, embedded = build(layout, contexts, widths)
    tokens = run(preprocess, embedded)
    expected = expected_stream(preprocess, embedded, layout)
    assert tokens.layout.lengths.tolist() == expected["sizes"]
    assert tokens.event_rows.tolist() == expected["rows"]
    assert tokens.tokens_per_event == (2 if layout == "interleave" else 1)
    assert (tokens.layout.lengths - tokens.layout.history).tolist() == list(CANDIDATES)
    assert tokens.layout.context.tolist() == [len(contexts)] * B
    for found, wanted in zip(tokens.timestamps.tolist(), expected["times"], strict=True):
        assert wanted is None or found == wanted
    encoder = preprocess.positions
    stream = torch.stack(expected["values"]) * encoder.scale + encoder.position[token_positions(tokens)]
    torch.testing.assert_close(tokens.values, stream)
    assert set(preprocess.project) == {name for name in embedded if embedded[name].shape[1] != D}
    wanted_gradients = torch.autograd.grad(stream.square().sum(), list(embedded.values()), retain_graph=True)
    found_gradients = torch.autograd.grad(tokens.values.square().sum(), list(embedded.values()))
    for a, b in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert bool((a != 0).any())


@pytest.mark.parametrize("layout", ["interleave", "add", "item"])
def test_a_batch_of_nothing(layout: str) -> None:
    preprocess, embedded = build(layout, ("age",), {"item": 3})
    empty = {name: x[:0] for name, x in embedded.items()}
    lengths = {name: torch.zeros(1, dtype=torch.int64) for name in embedded}
    none = torch.zeros(1, dtype=torch.int64)
    stream = preprocess.stream(lengths, dict.fromkeys(embedded, 0), none, none[:0])
    tokens = preprocess(empty, stream)
    assert tokens.values.shape == (0, D) and tokens.layout.offsets.tolist() == [0, 0]
    assert tokens.timestamps.numel() == 0 and tokens.event_rows.numel() == 0


@pytest.mark.parametrize("layout", ["interleave", "add", "item"])
def test_mixed_widths_in_bfloat16(layout: str) -> None:
    preprocess, embedded = build(layout, ("country", "age"), {"action": 9, "age": 2})
    exact = run(preprocess, embedded).values
    with torch.autocast("cpu", torch.bfloat16):
        low = run(preprocess, embedded).values
    torch.testing.assert_close(low.float(), exact, rtol=0.02, atol=0.05)


def test_contexts_stand_in_the_order_asked_for() -> None:
    (one, embedded), (other, _) = build("item", ("age", "country")), build("item", ("country", "age"))
    a, b = run(one, embedded).values, run(other, embedded).values
    first, second = a[0] - one.positions.position[0], a[1] - one.positions.position[1]
    torch.testing.assert_close(b[1] - other.positions.position[1], first)
    torch.testing.assert_close(b[0] - other.positions.position[0], second)
