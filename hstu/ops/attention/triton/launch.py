"""One kernel on operands of certain shapes: its tiles, descriptors, strides, and the chunks that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hstu.ops.attention.bias import QueryTime, bucket_thresholds
from hstu.ops.attention.triton import config
from hstu.ops.attention.triton.bias import reduce_bias, write_bias
from hstu.ops.attention.triton.config import Kernel, TileConfig, device_kind, padded_width, tile_config
from hstu.ops.attention.triton.plan import Batch
from hstu.ops.attention.triton.structs import Bias, Call, Chunk, Config, Gradients, Operands, Rows

Tables = tuple[Tensor | None, Tensor | None]  # position and time
Inputs = tuple[Tensor, Tensor, Tensor]  # q, k and v

CHUNK_BYTES = 1 << 30  # of the relative bias and of the scores' gradients, stored at once
TILES_EACH = 4  # that a program of the passes over the bias does
_INT32_MAX = 2**31 - 1


class Launch:
    """One kernel, for operands of these shapes.

    Args:
        name: of the kernel.
        kernel: itself, of HSTU or of softmax attention.
        batch: what it attends in.
        inputs: q, k and v.
        query_time: of a time bias.
        tables: position and time, or None.
    """

    @classmethod
    def of(
        cls, name: Kernel, kernel: Any, batch: Batch, inputs: Inputs, query_time: QueryTime, tables: Tables
    ) -> Launch:
        """Return that for operands like these, made once a batch for all layers."""
        q, k, v = inputs
        key = (
            kernel.__name__, q.dtype, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16, tables[0] is None, tables[1] is None, query_time,
        )  # fmt: skip
        found: Launch | None = batch.launches.get(key)
        if found is None:
            found = batch.launches[key] = cls(name, kernel, batch, inputs, query_time, tables)
        return found

    def __init__(
        self, name: Kernel, kernel: Any, batch: Batch, inputs: Inputs, query_time: QueryTime, tables: Tables
    ) -> None:
        q, k, v = inputs
        self.kernel = kernel
        self._given = [x.stride() for x in inputs]
        self._strides: dict[Any, Operands] = {}
        self._compiled: dict[Any, Any] = {}
        self.batch, self.heads, self.dtype = batch, q.shape[1], q.dtype
        self.by_rows, self.biased = name != "columns", tables[0] is not None or tables[1] is not None
        padded = padded_width(q.shape[2]), padded_width(v.shape[2])
        self.tile: TileConfig = tile_config(
            name,
            device_kind(q.device, q.dtype, aligned=all(map(_is_aligned, inputs))),
            max(padded),
            biased=self.biased,
            longest=padded_width(batch.keys.longest or 1),
        )
        self.plan, self.number = batch.plan(self.tile.rows, self.tile.columns, by_rows=self.by_rows)
        self.tokens = batch.tokens if tables[1] is None else batch.timed(query_time)
        self.described = describable(q, padded[0]) and describable(k, padded[0]) and describable(v, padded[1])
        values = (
            batch.flags, q.shape[2], v.shape[2], *padded, self.tile.rows, self.tile.columns,
            q.shape[1] // k.shape[1], self.described, q.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret,
            "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        )  # fmt: skip
        # Programs that share a block's tiles in the passes over the bias.
        self.turns = triton.cdiv(self.plan.width, TILES_EACH)
        # A program by columns sums over the query heads that share its keys.
        self.programs = self.heads if self.by_rows else k.shape[1]
        self.configs = [Config(*map(tl.constexpr, (*values, *parts))) for parts in self.parts]

    @property
    def parts(self) -> tuple[tuple[bool, bool], ...]:
        """What each launch of the kernel by columns writes: dk, dv."""
        return ((True, False), (False, True)) if self.tile.split else ((True, True),)

    def operands(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None = None) -> list[Tensor | TensorDescriptor]:
        """q, k, v and the gradient of the output as the kernel loads them: by rows of a tile, or by its columns."""
        if not self.described:
            return [q, k, v] if grad is None else [q, k, v, grad]
        rows, columns = self.tile.rows, self.tile.columns
        loaded = [_described(q, rows), _described(k, columns), _described(v, columns)]
        if grad is not None:
            whole = grad if describable(grad, grad.shape[2]) else grad.clone(memory_format=torch.contiguous_format)
            loaded.append(_described(whole, rows))
        return loaded

    def strides(self, *rest: Tensor | None) -> Operands:
        """Strides of all operands; ``rest``: the output or its gradient, dq, dk and dv, as far as there are."""
        key = tuple([None if x is None else x.stride() for x in rest])
        found = self._strides.get(key)
        if found is None:
            rows = [None if stride is None else Rows(*stride[:2]) for stride in (*self._given, *key)]
            fields = dict(zip(Operands._fields, [*rows, *[None] * (7 - len(rows)), self.heads], strict=True))
            found = self._strides[key] = Operands(**fields)
        return found

    def chunks(self, tables: Tables, *, gradients: bool = False) -> Iterator[Chunk]:
        """Yield the blocks in parts whose bias, and gradients if wanted, fit the buffer: one part if there is none."""
        if not self.biased:
            yield Chunk(0, None, None, self.number)
            return
        size = self.plan.width * self.tile.rows * self.tile.columns
        # Half precision holds the bias of half-precision scores; gradients need the range of bfloat16.
        bias_dtype = torch.float32 if self.dtype == torch.float32 else torch.float16
        each = size * self.dtype.itemsize * (1 + (self.heads if gradients else 0))
        blocks = min(self.number, max(1, CHUNK_BYTES // each))
        stored = self.plan.blocks.new_empty(blocks * size, dtype=bias_dtype)
        kept = stored.new_empty(self.heads * blocks * size, dtype=self.dtype) if gradients else None
        for first in range(0, self.number, blocks):
            chunk = Chunk(first, stored, kept, min(blocks, self.number - first))
            self._write_bias(chunk, tables)
            yield chunk

    def reduce(self, chunk: Chunk, tables: Tables, gradients: Gradients, scale: float) -> None:
        """Add the gradients of the chunk's scores to those of the tables."""
        buckets = triton.next_power_of_2(1 if tables[1] is None else tables[1].numel())
        fixed = self.tile.rows, self.tile.columns, buckets, self.heads
        self._start(
            reduce_bias, (chunk.blocks, self.turns, 1),
            (self.plan, chunk, self.tokens, bias_of(tables), gradients, scale, *fixed), chunk, _kind_of(tables),
            gradients.position is None, gradients.time is None, num_warps=8, maxnreg=80,
        )  # fmt: skip

    def run(
        self, chunk: Chunk, operands: tuple[Any, ...], strides: Operands, factors: tuple[float, float], part: int = 0
    ) -> None:
        """Run the kernel for the blocks of ``chunk`` and all heads.

        ``factors``: alpha and scale. ``part``: which launch of those that ``parts`` tells of.
        """
        call = Call(strides, self.plan, chunk, self.batch.rules, self.tokens, *factors)
        aligned = [x.data_ptr() % 16 == 0 for x in operands if isinstance(x, Tensor)]
        self._start(
            self.kernel, (chunk.blocks * self.programs, 1, 1), (*operands, call, self.configs[part]), chunk, part,
            strides, *aligned, num_warps=self.tile.warps, num_stages=self.tile.stages,
        )  # fmt: skip

    def _write_bias(self, chunk: Chunk, tables: Tables) -> None:
        size = self.tile.rows if self.by_rows else self.tile.columns
        part = min(16, size)
        fixed = self.tile.rows, self.tile.columns, self.by_rows, part
        self._start(
            write_bias, (chunk.blocks, self.turns, size // part),
            (self.plan, chunk, self.tokens, bias_of(tables), *fixed), chunk, _kind_of(tables), num_warps=4,
        )  # fmt: skip

    def _start(
        self, kernel: Any, grid: tuple[int, int, int], values: tuple[Any, ...], chunk: Chunk, *kind: Any, **options: Any
    ) -> None:
        """Launch a kernel: what Triton chose for arguments of this kind before, without asking it to choose again.

        ``kind`` has all that Triton looks at to choose and that is not the same whenever this object launches.
        """
        key = kernel.__name__, chunk.first, chunk.blocks, chunk.gradient is None, kind
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = kernel[grid](*values, **options)
        else:
            compiled[grid](*values)


def _kind_of(tables: Tables) -> tuple[Any, ...]:
    """What a kernel is compiled for of tables."""
    return tuple(None if x is None else (x.dtype, x.numel(), x.data_ptr() % 16) for x in tables)


def bias_of(tables: Tables) -> Bias:
    """Both tables as the kernels are given them."""
    position, time = tables
    centre = 0 if position is None else (position.numel() - 1) // 2
    buckets = 0 if time is None else time.numel() - 1
    return Bias(position, time, None if time is None else _thresholds(buckets, time.device), centre, buckets)


@cache
def _thresholds(num_buckets: int, device: torch.device) -> Tensor:
    """Threshold above each bucket as int32, the largest number where there is none within 68 years."""
    bounds = torch.full((num_buckets + 1,), _INT32_MAX, dtype=torch.int64)
    thresholds = bucket_thresholds(num_buckets)
    bounds[: thresholds.numel()] = thresholds.clamp(max=_INT32_MAX)
    return bounds.int().to(device)


def check_device(q: Tensor, v: Tensor) -> None:
    """Raise ``ValueError`` for tensors that no kernel takes."""
    if q.dtype == torch.float64:
        raise ValueError("the Triton kernels do not do float64: use backend='reference'")
    if not config.capability(q.device):
        raise ValueError("backend 'triton' needs a GPU, q is on the CPU: use backend='auto'")
    if 1 in (q.shape[2], v.shape[2]) and triton.__version__.startswith("3.6."):
        # It loses the stride of such heads, a 1 that stands in a struct of a struct.
        raise ValueError(
            f"head width is 1, which triton {triton.__version__} does not compile: install triton 3.7, "
            "or use backend='reference'"
        )


def _is_aligned(x: Tensor) -> bool:
    """Whether every head of every row of ``x [T, H, d]`` is of whole 16 bytes and begins at a multiple of them."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in (x.stride(0), x.stride(1), x.shape[2]))


def describable(x: Tensor, padded: int) -> bool:
    """Whether a tensor descriptor may load heads of ``x [T, H, d]``: rows and heads of whole 16 bytes, no padding."""
    return x.shape[2] == padded and x.stride(1) == x.shape[2] and _is_aligned(x) and config.capability(x.device) >= 90


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor that loads so many rows of one head of ``x [T, H, d]``."""
    tokens, heads, width = x.shape
    made = TensorDescriptor.__new__(TensorDescriptor)  # whose checks `describable` has made
    made.base, made.shape, made.strides, made.block_shape = x, [tokens, heads * width], [x.stride(0), 1], [rows, width]
    return made


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with neighbours side by side in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
