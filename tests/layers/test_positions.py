"""Positions and times before the request."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hstu.layers.positions import PositionEncoder, token_positions
from hstu.layers.tokens import Tokens
from tests.layers.streams import at_times, make_tokens

LENGTHS, CANDIDATES = (6, 0, 1, 5, 3), (3, 0, 1, 0, 3)


def test_history_counts_up_and_all_candidates_share_the_place_after_it() -> None:
    tokens = make_tokens(LENGTHS, None, CANDIDATES)
    assert token_positions(tokens).tolist() == [0, 1, 2, 3, 3, 3, 0, 0, 1, 2, 3, 4, 0, 0, 0]


def test_scaled_values_plus_the_row_of_the_position() -> None:
    tokens = make_tokens(LENGTHS, None, CANDIDATES)
    encoder = PositionEncoder(10, 6)
    out = encoder(tokens)
    for t, p in enumerate(token_positions(tokens).tolist()):
        expected = math.sqrt(10) * tokens.values[t] + encoder.position[p]
        torch.testing.assert_close(out.values[t], expected, rtol=0, atol=1e-6)
    assert out.layout is tokens.layout and encoder.time is None


def test_without_a_scale_values_stay_and_positions_start_as_small_as_embeddings() -> None:
    torch.manual_seed(0)
    tokens, encoder = make_tokens(LENGTHS, None, CANDIDATES), PositionEncoder(10, 600, scale_inputs=False, std=0.03)
    added = encoder(tokens).values - encoder.position[token_positions(tokens)]
    torch.testing.assert_close(added, tokens.values, rtol=0, atol=1e-6)
    assert 0.02 < float(encoder.position.detach().std()) < 0.03 and float(encoder.position.detach().abs().max()) <= 0.06


def test_positions_from_the_end_are_those_of_a_history_cut_at_its_start() -> None:
    tokens = make_tokens((4, 0, 1, 3))
    assert token_positions(tokens, from_end=True).tolist() == [3, 2, 1, 0, 0, 2, 1, 0]
    encoder = PositionEncoder(10, 4, positions_from_end=True)
    cut = Tokens(**{**vars(make_tokens((3,))), "values": tokens.values[1:4]})
    torch.testing.assert_close(encoder(tokens).values[1:4], encoder(cut).values, rtol=0, atol=0)


def bounded(kind: str, seconds: int, largest: int) -> int:
    return min(int(math.sqrt(seconds) if kind == "sqrt" else math.log1p(seconds)), largest)


@pytest.mark.parametrize("kind", ["sqrt", "log"])
def test_time_rows_count_back_from_the_last_event(kind: str) -> None:
    ages = [10**10, 3 * 86400, 3600, 99, 1, 0]
    tokens = make_tokens((6, 0, 2))
    tokens = at_times(tokens, 10**11 - torch.tensor([*ages, 16, 0]))
    encoder = PositionEncoder(10, 6, num_time_buckets=12, time_bucket_fn=kind)  # type: ignore[arg-type]
    torch.nn.init.normal_(encoder.time)
    buckets = encoder.time_buckets(tokens).tolist()
    assert buckets == [bounded(kind, age, 12) for age in [*ages, 16, 0]]
    assert max(buckets) == 12 and encoder.time is not None and encoder.time.shape == (13, 10)
    plain = tokens.values * encoder.scale + encoder.position[token_positions(tokens)]
    torch.testing.assert_close(encoder(tokens).values, plain + encoder.time[buckets])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gaps_are_those_to_the_event_before_and_of_candidates_to_the_history(interleaved: bool) -> None:
    history, candidates, context = (3, 0, 1, 2), (2, 0, 0, 1), (2, 1, 0, 0)
    rng, lengths, times, rows, expected = np.random.default_rng(0), [], [], [], []
    for events, asked, contexts in zip(history, candidates, context, strict=True):
        clock = np.sort(rng.integers(0, 10**6, size=events)).tolist() + rng.integers(10**6, 2 * 10**6, asked).tolist()
        start, last = len(times), 0
        times += contexts * [clock[0] if clock else 0]
        expected += contexts * [0]
        for place, time in enumerate(clock):
            rows.append(len(times))
            copies = 2 if interleaved and place < events else 1
            times += copies * [time]
            expected += copies * [math.isqrt(time - last) if place else 0]
            last = time if place < events else last
        lengths.append(len(times) - start)
    tokens = at_times(make_tokens(lengths, context, candidates), torch.tensor(times))
    tokens = replace(tokens, event_rows=torch.tensor(rows), tokens_per_event=1 + interleaved)
    encoder = PositionEncoder(10, 20, num_time_buckets=5000, time_bucket_of="gap")
    assert encoder.time_buckets(tokens).tolist() == expected and max(expected) > 0
    alone = replace(make_tokens((1,), (1,)), event_rows=torch.tensor([], dtype=torch.int64))
    assert encoder.time_buckets(alone).tolist() == [0]


def test_seconds_are_not_rounded_to_float32() -> None:
    tokens = make_tokens((2,))
    age = 4097**2  # above 2**24: in float32 its square root is that of a neighbour
    tokens = at_times(tokens, torch.tensor([0, age - 1]))
    encoder = PositionEncoder(10, 2, num_time_buckets=5000)
    assert encoder.time_buckets(tokens).tolist() == [4096, 0]


def test_dropout_only_while_training() -> None:
    encoder, tokens = PositionEncoder(10, 8, dropout=0.5), make_tokens((8,))
    assert bool((encoder(tokens).values == 0).any())
    encoder.eval()
    assert not bool((encoder(tokens).values == 0).any())
