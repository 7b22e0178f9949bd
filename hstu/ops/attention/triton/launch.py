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
        batch: what it attends in.
        inputs: q, k and v.
        query_time: of a time bias.
        tables: position and time, or None.
    """

    @classmethod
    def of(cls, name: Kernel, batch: Batch, inputs: Inputs, query_time: QueryTime, tables: Tables) -> Launch:
        """Return that for operands like these, made once a batch for all layers."""
        q, k, v = inputs
        key = (
            name, q.dtype, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
            (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16, tables[0] is None, tables[1] is None, query_time,
        )  # fmt: skip
        found: Launch | None = batch.launches.get(key)
        if found is None:
            found = batch.launches[key] = cls(name, batch, inputs, query_time, tables)
        return found

    def __init__(self, name: Kernel, batch: Batch, inputs: Inputs, query_time: QueryTime, tables: Tables) -> None:
        q, k, v = inputs
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

    def chunks(self, tables: Tables, *, gradients: bool = False) -> Iterator[Chunk]:
        """Yield the blocks in parts whose bias, and gradients if wanted, fit the buffer: one part if there is none."""
        if not self.biased:
            yield Chunk(0, None, None, self.number)
            return
        size = self.plan.width * self.tile.rows * self.tile.columns
        # Half precision holds the bias of half-precision scores; gradients need the range of bfloat16.
        bias_dtype = torch.float32 if self.dtype == torch.float32 else torch.float16
        each = size * (bias_dtype.itemsize + (self.heads * self.dtype.itemsize if gradients else 0))
        blocks = min(self.number, max(1, CHUNK_BYTES // each))
        stored = torch.empty(blocks * size, dtype=bias_dtype, device=self.plan.blocks.device)
        kept = stored.new_empty(self.heads * blocks * size, dtype=self.dtype) if gradients else None
        for first in range(0, self.number, blocks):
            chunk = Chunk(first, stored, kept, min(blocks, self.number - first))
            self._write_bias(chunk, tables)
            yield chunk

    def reduce(self, chunk: Chunk, tables: Tables, gradients: Gradients, scale: float) -> None:
        """Add the gradients of the chunk's scores to those of the tables."""
        buckets = triton.next_power_of_2(1 if tables[1] is None else tables[1].numel())
        reduce_bias[(chunk.blocks, triton.cdiv(self.plan.width, TILES_EACH))](
            self.plan, chunk, self.tokens, bias_of(tables), gradients, scale, ROWS=self.tile.rows,
            COLUMNS=self.tile.columns, BUCKETS=buckets, HEADS=self.heads, num_warps=8, maxnreg=80,
        )  # fmt: skip

    def run(
        self,
        kernel: Any,
        chunk: Chunk,
        operands: tuple[Any, ...],
        strides: Operands,
        factors: tuple[float, float],
        part: int = 0,
    ) -> None:
        """Run the kernel for the blocks of ``chunk`` and all heads.

        ``factors``: alpha and scale. ``part``: which launch of those that ``parts`` tells of.
        """
        call = Call(strides, self.plan, chunk, self.batch.rules, self.tokens, *factors)
        kernel[(chunk.blocks * self.programs,)](
            *operands, call, self.configs[part], num_warps=self.tile.warps, num_stages=self.tile.stages
        )

    def _write_bias(self, chunk: Chunk, tables: Tables) -> None:
        part = min(16, self.tile.rows if self.by_rows else self.tile.columns)
        parts = (self.tile.rows if self.by_rows else self.tile.columns) // part
        write_bias[(chunk.blocks, triton.cdiv(self.plan.width, TILES_EACH), parts)](
            self.plan, chunk, self.tokens, bias_of(tables), ROWS=self.tile.rows, COLUMNS=self.tile.columns,
            BY_ROWS=self.by_rows, PART=part, num_warps=4,
        )  # fmt: skip


def bias_of(tables: Tables) -> Bias:
    """Both tables as the kernels are given them."""
    position, time = tables
    centre = 0 if position is None else (position.numel() - 1) // 2
    buckets = 0 if time is None else time.numel() - 1
    return Bias(position, time, None if time is None else _thresholds(buckets, time.device), centre, buckets)


def strides_of(heads: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *gradients: Tensor | None) -> Operands:
    """Strides of the operands of a kernel: ``gradients``: dq, dk and dv, or None."""
    rows = [None if x is None else Rows(x.stride(0), x.stride(1)) for x in (q, k, v, out, *gradients)]
    return Operands(**dict(zip(Operands._fields, [*rows, *[None] * (7 - len(rows)), heads], strict=True)))


@cache
def _thresholds(num_buckets: int, device: torch.device) -> Tensor:
    """Threshold above each bucket as int32, the largest number where there is none within 68 years."""
    bounds = torch.full((num_buckets + 1,), _INT32_MAX, dtype=torch.int64)
    thresholds = bucket_thresholds(num_buckets)
    bounds[: thresholds.numel()] = thresholds.clamp(max=_INT32_MAX)
    return bounds.int().to(device)


def check_device(q: Tensor) -> None:
    """Raise ``ValueError`` for tensors that no kernel takes."""
    if q.dtype == torch.float64:
        raise ValueError("the Triton kernels do not do float64: use backend='reference'")
    if not config.capability(q.device):
        raise ValueError("backend 'triton' needs a GPU, q is on the CPU: use backend='auto'")


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
    return TensorDescriptor(x, [tokens, heads * width], [x.stride(0), 1], [rows, width])


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with neighbours side by side in the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
