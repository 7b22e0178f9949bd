"""A parquet file that grows batch by batch on rank 0 and appears when it is whole."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from hstu.parallel import Mesh


class ParquetOutput(contextlib.AbstractContextManager):
    """Writes columns to ``path`` on rank 0; a failure leaves no file, or the one that was there.

    Args:
        path: The file; its directory is created if absent.
        mesh: The ranks: all call ``write``.
        about: What readers should know, kept as JSON under ``hstu`` in the file's metadata; may grow until the end.
    """

    def __init__(self, path: Path, mesh: Mesh, about: dict[str, Any]) -> None:
        self.path, self.mesh, self.about, self.rows = path, mesh, about, 0
        self.partial = path.with_name(f".{path.name}.partial")
        self.writer: pq.ParquetWriter | None = None

    def write(self, columns: dict[str, pa.Array]) -> None:
        """Append rows."""
        self.mesh.on_main(lambda: self._write(columns))

    def _write(self, columns: dict[str, pa.Array]) -> None:
        table = pa.table(columns)
        with self._refusing():
            if self.writer is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.writer = pq.ParquetWriter(self.partial, table.schema, compression="zstd")
            self.writer.write_table(table)
        self.rows += table.num_rows

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written ({error.strerror or error}); choose another") from None

    def _finish(self) -> None:
        if self.writer is None:
            raise ValueError(f"{self.path}: not written, there is nobody to answer: no user has a history")
        self.writer.add_key_value_metadata({"hstu": json.dumps(self.about)})
        with self._refusing():
            self.writer.close()
            os.replace(self.partial, self.path)

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.mesh.on_main(self._finish)
        finally:
            if self.writer is not None and self.partial.exists():  # something went wrong
                with contextlib.suppress(OSError):
                    self.writer.close()
                self.partial.unlink(missing_ok=True)


def vector_column(vectors: Tensor) -> pa.Array:
    """Return [n, D] as one column of lists of D float32."""
    flat = np.ascontiguousarray(vectors.float().cpu().numpy()).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1])
