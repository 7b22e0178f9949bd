"""The tensors of a checkpoint read in parts, whatever ranks wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

_BYTES = 1 << 26  # read at once


class SavedTensors:
    """Reads tensors of the checkpoint in ``path``.

    Args:
        path: A finished checkpoint.
    """

    def __init__(self, path: Path) -> None:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata()
        known = metadata.state_dict_metadata
        #: Shape of each tensor.
        self.shapes = {name: tuple(t.size) for name, t in known.items() if isinstance(t, TensorStorageMetadata)}
        self._parts: dict[str, list[tuple[tuple[int, ...], tuple[int, ...], str]]] = {}
        for index, stored in metadata.storage_data.items():
            assert index.offset is not None
            part = tuple(index.offset), tuple(stored.shape), stored.relative_path
            self._parts.setdefault(index.fqn, []).append(part)
        self._open: dict[str, Any] = {}

    def whole(self, name: str) -> Tensor:
        """Return the tensor ``name``."""
        return self.part(name, tuple(slice(0, size) for size in self.shapes[name]))

    def part(self, name: str, bounds: tuple[slice, ...]) -> Tensor:
        """Return ``bounds`` of the tensor ``name``, one slice of each dimension."""
        out: Tensor | None = None
        for offset, shape, file in self._parts[name]:
            low = [max(b.start, first) for b, first in zip(bounds, offset, strict=True)]
            high = [min(b.stop, first + n) for b, first, n in zip(bounds, offset, shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            values: Tensor = self._file(file).get_slice(name)[there]
            if out is None:
                out = values.new_zeros([b.stop - b.start for b in bounds])
            out[tuple(slice(a - b.start, c - b.start) for a, c, b in zip(low, high, bounds, strict=True))] = values
        return torch.zeros([b.stop - b.start for b in bounds]) if out is None else out

    def copy_rows(self, name: str, origin: Tensor, target: Tensor, first_column: int = 0) -> None:
        """Write row ``origin[i]`` of the tensor ``name`` into row i of ``target``, block by block.

        Args:
            name: A tensor [rows] or [rows, width].
            origin: [n] int64 in host memory; -1 leaves the row of ``target`` as it is.
            target: [n] or [n, columns]; columns beyond the width of the saved tensor stay as they are.
            first_column: Column of the saved tensor that is the first of ``target``.
        """
        rows, *width = self.shapes[name]
        columns = [slice(first_column, min(first_column + target.shape[1], width[0]))] if width else []
        if width and columns[0].start >= columns[0].stop:
            return
        known = (origin >= 0).nonzero().squeeze(1)
        order = known[origin[known].argsort()]
        sources = origin[order]
        for start in range(0, rows, block := max(1, _BYTES // (4 * max(1, *width, 1)))):
            stop = min(start + block, rows)
            low, high = torch.searchsorted(sources, torch.tensor([start, stop])).tolist()
            if low == high:
                continue
            found = self.part(name, (slice(start, stop), *columns))[sources[low:high] - start]
            places = order[low:high].to(target.device)
            if width:
                target[places, : found.shape[1]] = found.to(target)
            else:
                target[places] = found.to(target)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(name, "pt").__enter__()  # mapped, and given up with this object
        return self._open[name]
