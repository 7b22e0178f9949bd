"""Batches in flight: the next one is copied and its ids travel to the tables while this one is computed.

TorchRec's ``TrainPipelineSparseDist`` over the lookups alone: the model says what a batch looks up, negatives
included, when the batch enters. Weights are read when a batch is computed, so that losses are those of the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist
from torchrec.streamable import Pipelineable

from hstu.data.batch import Batch
from hstu.models import RankingModel, RetrievalModel
from hstu.models.lookup import Lookup
from hstu.parallel.embedding import ShardedTables

Rows = dict[str, Tensor]
"""What tables found: feature -> [ids of the feature, width]."""


class _Known(Pipelineable):
    """A request on the device, and as ``ids_<width>`` what each collection of tables looks up for it."""

    def __init__(self, request: Lookup, chosen: dict[str, KeyedJaggedTensor]) -> None:
        self.request = request
        for width, ids in chosen.items():
            setattr(self, f"ids_{width}", ids)

    def to(self, device: torch.device, non_blocking: bool = False) -> _Known:
        raise AssertionError("it is made where it is needed")

    def record_stream(self, stream: torch.Stream) -> None:
        for value in vars(self).values():
            value.record_stream(stream)


class _Lookups(nn.Module):
    """The lookups of every collection: all that the pipeline has to see of the model."""

    def __init__(self, tables: ShardedTables) -> None:
        super().__init__()
        self.widths = tuple(tables.collections)
        for width, collection in tables.collections.items():
            setattr(self, f"table_{width}", collection.module)

    def forward(self, known: _Known) -> list[Any]:
        return [getattr(self, f"table_{width}")(getattr(known, f"ids_{width}")) for width in self.widths]


class LookupPipeline(TrainPipelineSparseDist):
    """Runs batches through a model, with copies and exchanges of ids ahead.

    Args:
        model: The distributed model.
        tables: Its embeddings.
        device: Where it computes.
    """

    def __init__(self, model: RankingModel | RetrievalModel, tables: ShardedTables, device: torch.device) -> None:
        self.model, self.tables = model, tables
        self._source: Iterator[Batch] = iter(())
        self._expected = (0, 0, 0)
        self._compute: Callable[[Rows, Any], tuple[Tensor, Any]] | None = None
        nothing: Any = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)  # steps are taken outside
        lookups = _Lookups(tables)
        super().__init__(lookups, nothing, device, execute_all_batches=True, custom_model_fwd=self._forward)

    @property
    def is_empty(self) -> bool:
        """Whether every batch that was fed has been run."""
        return not self.batches

    def feed(self, source: Iterator[Batch]) -> None:
        """Take the next batches from ``source``; before its end tables can be used only by ``run``."""
        assert self.is_empty
        self.tables.unlock_cached_rows()
        if not self._model_attached:  # which only some of TorchRec's pipelines see to
            self.attach(self._model)
        self._source = source

    def run(self, batch: Batch, compute: Callable[[Rows, Any], tuple[Tensor, Any]]) -> Any:
        """Run the next batch forward and backward.

        Args:
            batch: The one that is to be next.
            compute: From the rows of the tables and the request on the device to the scalar to differentiate, and a
                result.

        Returns:
            The result.
        """
        self._compute, self._expected = compute, _size(batch)
        result = self.progress(self._source)
        if self.is_empty:
            self.detach()  # evaluation looks up without a pipeline
        return result

    def copy_batch_to_gpu(self, dataloader_iter: Iterator[Any]) -> tuple[Any, Any]:
        """Copy the next batch, and find out what it looks up."""
        batch, context = super().copy_batch_to_gpu(dataloader_iter)
        if batch is None:
            return None, context
        with self._stream_context(self._memcpy_stream), torch.no_grad():
            request = self.model.request(batch)
            return _Known(request, self.tables.request(request.features, ahead=True)), context

    def _forward(self, known: Any) -> tuple[Any, Any]:
        request: Lookup = known.request
        assert _size(request.batch) == self._expected, "the pipeline computes another batch than the one counted"
        self.tables.begin()
        answers = self._model(known)
        assert self._compute is not None
        return self._compute(self.tables.found(request.features, answers), request)

    def _backward(self, losses: Tensor) -> None:
        losses.backward()


class CachedLookupPipeline(LookupPipeline, PrefetchTrainPipelineSparseDist):
    """The same, which also brings rows of tables in host memory into their caches while the batch before is computed.

    TorchRec asks for the rows of the next batch between the forward and the backward pass, and keeps in the cache what
    that one needs.
    """

    def _prefetch(self, context: Any) -> None:
        if self._device.type == "cuda":
            return super()._prefetch(context)
        for module in self._pipelined_modules:  # TorchRec does nothing without streams; here rows are near already
            name = module.forward._name
            ids, own = context.input_dist_tensors_requests.pop(name).wait(), context.module_contexts.pop(name)
            module.prefetch(ctx=own, dist_input=ids)
            context.module_input_post_prefetch[name], context.module_contexts_post_prefetch[name] = ids, own


def _size(batch: Batch) -> tuple[int, int, int]:
    """Return what tells batches apart without asking the device."""
    return batch.step, batch.num_samples, batch.num_events
