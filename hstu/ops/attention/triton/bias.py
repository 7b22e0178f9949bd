"""The relative bias of a chunk of tiles, made once for all heads, and the gradients of its tables.

The bias of a pair is the same for every head, and costs more to work out than its score: so a small pass writes half
of it, tile by tile as the attention reads it, for as many blocks at a time as a bounded buffer holds. Backward, the
attention leaves the gradients of the scores of each tile, and another pass sums them over heads and into the tables.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hstu.ops.attention.triton.tiles import load_block

BUCKETS_PER_OCTAVE = tl.constexpr(0.6931471805599453 / 0.301)
#: Steps of the time bias up to which a tile makes one comparison each.
FEW = tl.constexpr(6)


@triton.jit
def _load_times(times, place, block):
    """Seconds relative to the sample's first token, of the tokens at some places; beyond the end, the last one's."""
    return tl.load(times + block.k_row + tl.minimum(place, block.length - 1))


@triton.jit
def _bucket(seconds, bias):
    """Bucket of each time difference: the logarithm rounded a little down, then one exact comparison."""
    low = tl.log2(tl.maximum(seconds, 1).to(tl.float32)) * BUCKETS_PER_OCTAVE - 0.001
    bucket = tl.minimum(tl.maximum(low, 0.0).to(tl.int32), bias.num_buckets)
    return bucket + (seconds >= tl.load(bias.thresholds + bucket)).to(tl.int32)


@triton.jit
def _bucket_range(asked, own, bias):
    """Bounds on the buckets of the differences of two sets of times."""
    most = tl.max(asked, 0)
    least = tl.min(asked, 0)
    own_most = tl.max(own, 0)
    own_least = tl.min(own, 0)
    near = tl.maximum(tl.maximum(least - own_most, own_least - most), 0)
    far = tl.maximum(tl.abs(most - own_least), tl.abs(own_most - least))
    return _bucket(near, bias), _bucket(far, bias)


@triton.jit
def _half_time(asked, own, bias, BY_ROWS: tl.constexpr):
    """Half the time bias of a tile. Where its times lie in few buckets, each is one comparison more."""
    low, high = _bucket_range(asked, own, bias)
    if BY_ROWS:  # noqa: SIM108 - decided when compiling
        seconds = tl.abs(asked[:, None] - own[None, :])
    else:
        seconds = tl.abs(asked[None, :] - own[:, None])
    before = tl.load(bias.time + low).to(tl.float32) * 0.5
    half = tl.zeros(seconds.shape, tl.float32) + before
    if high - low <= FEW:
        for bucket in range(low, high):
            after = tl.load(bias.time + bucket + 1).to(tl.float32) * 0.5
            half += tl.where(seconds >= tl.load(bias.thresholds + bucket), after - before, 0.0)
            before = after
    else:
        half = tl.load(bias.time + _bucket(seconds, bias)).to(tl.float32) * 0.5
    return half


@triton.jit
def write_bias(
    plan, chunk, tokens, bias, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_ROWS: tl.constexpr, PART: tl.constexpr
):
    """Fill in ``chunk.bias`` for the tiles that block ``program_id(0)`` visits, each ``num_programs(1)``-th of them.

    A program has PART of the tile's rows (of its columns, where the tile is transposed): the ``program_id(2)``-th.
    """
    index = tl.program_id(0) + chunk.first
    block = load_block(plan, index)
    listed = plan.listed + index.to(tl.int64) * plan.width
    plain = block.stop - block.plain
    # Candidates stand at one position; no place is beyond the sample, so that no distance is beyond the table.
    end = tl.minimum(block.history, block.length - 1)
    own = tl.program_id(2) * PART + tl.arange(0, PART)
    for turn in range(tl.program_id(1), plain + block.listed, tl.num_programs(1)):
        tile = block.plain + turn
        if turn >= plain:
            tile = tl.load(listed + turn - plain)
        if BY_ROWS:
            i = block.place + own
            j = tile * COLUMNS + tl.arange(0, COLUMNS)
            place = own[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            distance = tl.minimum(j, end)[None, :] - tl.minimum(i, end)[:, None]
        else:
            i = block.first + tile * ROWS + tl.arange(0, ROWS)
            j = block.place + own
            place = own[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
            distance = tl.minimum(j, end)[:, None] - tl.minimum(i, end)[None, :]
        half = tl.zeros(distance.shape, tl.float32)
        if bias.position is not None:
            half += tl.load(bias.position + distance + bias.centre).to(tl.float32) * 0.5
        if bias.time is not None:
            asked = _load_times(tokens.query_time, i, block)
            half += _half_time(asked, _load_times(tokens.time, j, block), bias, BY_ROWS)
        slot = (tl.program_id(0).to(tl.int64) * plan.width + tile) * (ROWS * COLUMNS)
        tl.store(chunk.bias + slot + place, half.to(chunk.bias.dtype.element_ty))


@triton.jit
def _accumulate(table, index, value, mask, unit):
    """Add to a table in 64-bit fixed point, in which order does not matter."""
    tl.atomic_add(table + index, (value.to(tl.float64) * unit).to(tl.int64), mask=mask & (value != 0.0), sem="relaxed")


@triton.jit
def _over_heads(chunk, at, of_head, HEADS: tl.constexpr):
    """Gradients of some scores, summed over the heads."""
    total = tl.load(chunk.gradient + at).to(tl.float32)
    for head in tl.static_range(1, HEADS):
        total += tl.load(chunk.gradient + head * of_head + at).to(tl.float32)
    return total


@triton.jit
def _add_diagonals(ds, first, turns, gradients, centre, unit, TURNS: tl.constexpr):
    """Add a skewed tile, whose columns are diagonals, to the position table; ``first`` is its first column's."""
    COLUMNS: tl.constexpr = ds.shape[1]
    for turn in tl.static_range(TURNS):
        # Row a holds column (a + x) % N = a + x - turn * N at x: the column less the row is x - turn * N.
        sums = tl.sum(tl.where(turns == turn, ds, 0.0), 0)
        index = first + tl.arange(0, COLUMNS) - turn * COLUMNS + centre
        _accumulate(gradients.position, index, sums, (index >= 0) & (index <= 2 * centre), unit)


@triton.jit
def reduce_bias(
    plan, chunk, tokens, bias, gradients, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BUCKETS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Sum ``chunk.gradient`` over heads and add it to the tables' gradients; programs as in ``write_bias``.

    A tile is loaded skewed, each row turned by its number, so that its diagonals lie in columns.
    """
    SIZE: tl.constexpr = ROWS * COLUMNS
    TURNS: tl.constexpr = (ROWS + COLUMNS - 2) // COLUMNS + 1
    index = tl.program_id(0) + chunk.first
    block = load_block(plan, index)
    listed = plan.listed + index.to(tl.int64) * plan.width
    plain = block.stop - block.plain
    unit = tl.load(gradients.unit)
    lane = tl.arange(0, BUCKETS)
    d_time = tl.zeros((BUCKETS,), tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    column = (row + tl.arange(0, COLUMNS)[None, :]) % COLUMNS
    turns = (row + tl.arange(0, COLUMNS)[None, :]) // COLUMNS
    of_head = (tl.zeros((), tl.int64) + chunk.blocks) * plan.width * SIZE
    for turn in range(tl.program_id(1), plain + block.listed, tl.num_programs(1)):
        tile = block.plain + turn
        if turn >= plain:
            tile = tl.load(listed + turn - plain)
        slot = (tl.program_id(0).to(tl.int64) * plan.width + tile) * SIZE
        ds = _over_heads(chunk, slot + row * COLUMNS + column, of_head, HEADS) * scale
        j0 = tile * COLUMNS
        if gradients.position is not None:
            of_history = ds
            if block.place + ROWS > block.history:
                # All candidates share one position: what those rows add depends on the column alone.
                j = j0 + tl.arange(0, COLUMNS)
                own = _over_heads(chunk, slot + row * COLUMNS + tl.arange(0, COLUMNS)[None, :], of_head, HEADS) * scale
                sums = tl.sum(tl.where(block.place + row >= block.history, own, 0.0), 0)
                at = tl.minimum(j, block.history) - block.history + bias.centre
                _accumulate(gradients.position, at, sums, j < block.length, unit)
                of_history = tl.where(block.place + row < block.history, ds, 0.0)
            _add_diagonals(of_history, j0 - block.place, turns, gradients, bias.centre, unit, TURNS)
        if gradients.time is not None:
            asked = _load_times(tokens.query_time, block.place + tl.arange(0, ROWS), block)
            own = _load_times(tokens.time, j0 + tl.arange(0, COLUMNS), block)
            low, high = _bucket_range(asked, own, bias)
            seconds = tl.abs(asked[:, None] - _load_times(tokens.time, j0 + column, block))
            # Each bucket by its own pairs: a difference of sums over the tile would have the error of the whole tile.
            least = 0
            for bucket in range(low, high):
                beyond = tl.load(bias.thresholds + bucket)
                inside = (seconds >= least) & (seconds < beyond)
                d_time += tl.where(lane == bucket, tl.sum(tl.sum(tl.where(inside, ds, 0.0), 1), 0), 0.0)
                least = beyond
            d_time += tl.where(lane == high, tl.sum(tl.sum(tl.where(seconds >= least, ds, 0.0), 1), 0), 0.0)
    if gradients.time is not None:
        _accumulate(gradients.time, lane, d_time, lane <= bias.num_buckets, unit)
