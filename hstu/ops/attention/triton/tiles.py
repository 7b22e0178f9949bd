"""What the attention kernels share: visibility, relative bias and SiLU of one tile of scores.

A tile's rows and columns come as two broadcastable index tensors, so that a kernel may hold it transposed.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

# Options of a call, one bit each: a kernel is compiled for a combination.
CAUSAL = tl.constexpr(1)
CONTEXT = tl.constexpr(2)
CONTEXT_FULL = tl.constexpr(4)
CANDIDATES = tl.constexpr(8)
GROUPS = tl.constexpr(16)
WINDOW = tl.constexpr(32)
SEGMENTS = tl.constexpr(64)
MEMORY = tl.constexpr(128)
POSITION = tl.constexpr(256)
TIME = tl.constexpr(512)

BUCKETS_PER_OCTAVE = tl.constexpr(0.6931471805599453 / 0.301)


@triton.jit
def sample_extent(OFFSETS, NUM_CONTEXT, NUM_CANDIDATES, sample, FLAGS: tl.constexpr):
    """First token, length, context tokens and place of the first candidate of a sample."""
    start = tl.load(OFFSETS + sample)
    length = (tl.load(OFFSETS + sample + 1) - start).to(tl.int32)
    context = 0
    if CONTEXT & FLAGS:
        context = tl.load(NUM_CONTEXT + sample).to(tl.int32)
    history = length
    if CANDIDATES & FLAGS:
        history = length - tl.load(NUM_CANDIDATES + sample).to(tl.int32)
    return start, length, context, history


@triton.jit
def load_rows(X, place, length, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``[len(place), BLOCK]`` of a sample; zero beyond its length and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    pointers = X + place[:, None] * stride + column[None, :]
    if WIDTH == BLOCK:
        return tl.load(pointers, mask=place[:, None] < length, other=0.0)
    return tl.load(pointers, mask=(place[:, None] < length) & (column[None, :] < WIDTH), other=0.0)


@triton.jit
def store_rows(X, rows, place, length, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write what :func:`load_rows` would read."""
    column = tl.arange(0, BLOCK)
    pointers = X + place[:, None] * stride + column[None, :]
    inside = (place[:, None] < length) & (column[None, :] < WIDTH)
    tl.store(pointers, rows.to(X.dtype.element_ty), mask=inside)


@triton.jit
def visible(i, j, length, context, history, window, group_size, SEGMENT, IS_MEMORY, FLAGS: tl.constexpr):
    """Whether row i may read column j."""
    seen = j < length
    if CAUSAL & FLAGS:
        ordered = j <= i
        if CONTEXT_FULL & FLAGS:
            ordered = ordered | (i < context)
        seen = seen & ordered
    reach = j < 0
    if CONTEXT & FLAGS:
        reach = j < context
    if MEMORY & FLAGS:
        reach = reach | (tl.load(IS_MEMORY + j, mask=j < length, other=0) != 0)
    if SEGMENTS & FLAGS:
        of_i = tl.load(SEGMENT + i, mask=i < length, other=-1)
        of_j = tl.load(SEGMENT + j, mask=j < length, other=-2)
        seen = seen & ((of_i == of_j) | reach)
    if CANDIDATES & FLAGS:
        own = i == j
        if GROUPS & FLAGS:
            same = (i - history) // group_size == (j - history) // group_size
            own = (i >= history) & (j <= i) & same
        seen = seen & ((j < history) | own)
    if WINDOW & FLAGS:
        near = tl.minimum(i, history) - tl.minimum(j, history) <= window
        near = near | reach
        if MEMORY & FLAGS:
            near = near | (tl.load(IS_MEMORY + i, mask=i < length, other=0) != 0)
        seen = seen & near
    return seen


@triton.jit
def time_buckets(READERS, KEYS, THRESHOLDS, i, j, length, num_buckets):
    """Bucket of ``t_i' - t_j``: the logarithm rounded a little down, then one exact comparison."""
    # Relative to the sample's first token, seconds fit 32 bits (68 years).
    first = tl.load(KEYS)
    reader = (tl.load(READERS + tl.minimum(i, length - 1)) - first).to(tl.int32)
    key = (tl.load(KEYS + tl.minimum(j, length - 1)) - first).to(tl.int32)
    seconds = tl.abs(reader - key)
    low = tl.log2(tl.maximum(seconds, 1).to(tl.float32)) * BUCKETS_PER_OCTAVE - 0.001
    bucket = tl.minimum(tl.maximum(low, 0.0).to(tl.int32), num_buckets)
    return bucket + (seconds >= tl.load(THRESHOLDS + bucket)).to(tl.int32)


@triton.jit
def position_index(i, j, length, history, centre):
    """Index ``p_j - p_i + N - 1`` into the position table; places beyond the sample are those of its end."""
    p_i = tl.minimum(tl.minimum(i, length - 1), history)
    p_j = tl.minimum(tl.minimum(j, length - 1), history)
    return p_j - p_i + centre


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """Logistic function; FAST takes the hardware's tanh (relative error 2^-11, enough for bfloat16)."""
    if FAST:
        half = 0.5 * x
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [half], dtype=tl.float32, is_pure=True, pack=1)
        return 0.5 * t + 0.5
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def add_bias(
    scores,
    i,
    j,
    length,
    history,
    POSITION_TABLE,
    TIME_TABLE,
    READERS,
    KEYS,
    THRESHOLDS,
    centre,
    num_buckets,
    FLAGS: tl.constexpr,
):
    """Scores plus ``r_ij``."""
    if POSITION & FLAGS:
        scores += tl.load(POSITION_TABLE + position_index(i, j, length, history, centre)).to(tl.float32)
    if TIME & FLAGS:
        bucket = time_buckets(READERS, KEYS, THRESHOLDS, i, j, length, num_buckets)
        scores += tl.load(TIME_TABLE + bucket).to(tl.float32)
    return scores


@triton.jit
def column_ranges(
    m0,
    length,
    context,
    history,
    window,
    group_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Columns that rows ``[m0, m0 + BLOCK_M)`` may read.

    Returns ``(first, masked, middle, late, stop)``: no mask is needed in ``[first, masked)``; one is in
    ``[masked, middle)`` and, for candidates, which skip those before them, in ``[late, stop)``.
    """
    stop = length
    if CAUSAL & FLAGS:
        stop = tl.minimum(m0 + BLOCK_M, length)
        if CONTEXT_FULL & FLAGS:
            stop = tl.where(m0 < context, length, stop)
    first = stop * 0
    if ((WINDOW | MEMORY) & FLAGS) == WINDOW:
        near = tl.maximum(tl.minimum(m0, history) - window, 0) // BLOCK_N * BLOCK_N
        first = tl.where(context == 0, near, 0)
    masked = first
    if ((WINDOW | SEGMENTS) & FLAGS) == 0:
        masked = history // BLOCK_N * BLOCK_N
        if CAUSAL & FLAGS:
            masked = tl.minimum(history, m0) // BLOCK_N * BLOCK_N
    middle = stop
    late = stop
    if CANDIDATES & FLAGS:
        middle = tl.minimum(stop, (history + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        late = tl.maximum(middle, tl.maximum(m0 - group_size + 1, 0) // BLOCK_N * BLOCK_N)
    return first, masked, middle, late, stop


@triton.jit
def row_ranges(
    n0,
    length,
    context,
    history,
    window,
    group_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Rows that may read columns ``[n0, n0 + BLOCK_N)``.

    Returns ``(early, begin, plain, stop)``: a mask is needed in ``[0, early)`` and ``[begin, plain)``, none in
    ``[plain, stop)``.
    """
    begin = n0 // BLOCK_M * BLOCK_M
    stop = length
    early = n0 * 0
    plain = stop
    if CANDIDATES & FLAGS:
        stop = tl.where(n0 >= history, tl.minimum(length, n0 + BLOCK_N + group_size - 1), stop)
    if (CAUSAL & FLAGS) == 0:
        begin = tl.where(n0 >= history, begin, 0)
    if CONTEXT_FULL & FLAGS:
        early = tl.minimum(begin, (context + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    if ((WINDOW | MEMORY) & FLAGS) == WINDOW:
        reach = n0 + BLOCK_N + window
        stop = tl.where((n0 >= context) & (reach <= history), tl.minimum(stop, reach), stop)
    plain = stop
    if ((WINDOW | SEGMENTS) & FLAGS) == 0:
        after = begin
        if CAUSAL & FLAGS:
            after = (n0 + BLOCK_N - 1 + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        plain = tl.where(n0 + BLOCK_N <= history, tl.minimum(after, stop), stop)
    return early, begin, plain, stop
