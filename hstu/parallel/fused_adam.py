"""Fused Adam for tables in host memory, which FBGEMM lacks: same update, same state layout as its CUDA kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import ComputeDevice, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor


class _Lookup(torch.autograd.Function):
    """Gathers rows; its backward pass is the optimizer step."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tables: HostAdamTables, rows: Tensor) -> Tensor:
        ctx.tables = tables
        ctx.save_for_backward(rows)
        return tables.flat_weights().index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.tables.adam_step(ctx.saved_tensors[0], gradients[0])
        return None, None, None


class HostAdamTables(SplitTableBatchedEmbeddingBagsCodegen):
    """FBGEMM's batched tables, except that Adam on host memory is done here.

    Only rows that were looked up move; their duplicates are summed first; the bias correction counts
    steps of the table, not of the row; weight decay is decoupled; clipping is of each gradient before duplicates
    are summed (FBGEMM, ``EmbOptimType.ADAM``).
    """

    def __init__(
        self,
        embedding_specs: list,
        *args: Any,
        optimizer: EmbOptimType = EmbOptimType.EXACT_SGD,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1.0e-8,
        weight_decay: float = 0.0,
        gradient_clipping: bool = False,
        max_gradient: float = 1.0,
        **kwargs: Any,
    ) -> None:
        on_host = all(compute is ComputeDevice.CPU for _, _, _, compute in embedding_specs)
        self.adam_on_host = on_host and optimizer == EmbOptimType.ADAM
        engine = EmbOptimType.EXACT_SGD if self.adam_on_host else optimizer
        hyper: dict[str, float] = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        clipping: dict[str, Any] = dict(gradient_clipping=gradient_clipping, max_gradient=max_gradient)
        super().__init__(embedding_specs, *args, optimizer=engine, **clipping, **hyper, **kwargs)
        if not self.adam_on_host:
            return
        rows, widths = [spec[0] for spec in embedding_specs], {spec[1] for spec in embedding_specs}
        assert self.pooling_mode == PoolingMode.NONE and len(widths) == 1, "sequence embeddings of one width"
        self.hyper, self.steps, self.width = hyper, 0, widths.pop()
        self.limit = max_gradient if gradient_clipping else None
        self.table_starts = torch.tensor([0, *rows]).cumsum(0).tolist()
        for moment in ("exp_avg", "exp_avg_sq"):
            self.register_buffer(moment, torch.zeros(sum(rows), self.width), persistent=False)
        self.anchor = torch.zeros((), requires_grad=True)

    def flat_weights(self) -> Tensor:
        """All tables one after another, [sum of rows, width], a view."""
        return self.weights_host.detach().view(-1, self.width)

    def forward(self, indices: Tensor, offsets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Look up ``indices`` [n], grouped by feature as ``offsets`` [features * B + 1] says: [n, width]."""
        if not self.adam_on_host:
            return super().forward(indices, offsets, *args, **kwargs)
        features = len(self.feature_table_map)
        samples = (offsets.numel() - 1) // features
        ends = offsets[samples::samples] if samples else offsets.new_zeros(features)
        starts = torch.tensor([self.table_starts[table] for table in self.feature_table_map])
        rows = indices.long() + starts.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)).long())
        return _Lookup.apply(self.anchor, self, rows)

    @torch.no_grad()
    def adam_step(self, rows: Tensor, gradients: Tensor) -> None:
        """Update the looked-up rows with their gradients [n, width]."""
        self.steps += 1
        if rows.numel() == 0:
            return
        beta1, beta2, eps, decay = (self.hyper[name] for name in ("beta1", "beta2", "eps", "weight_decay"))
        touched, inverse = rows.unique(return_inverse=True)
        gradients = gradients.float() if self.limit is None else gradients.float().clamp(-self.limit, self.limit)
        gradient = torch.zeros(touched.numel(), self.width).index_add_(0, inverse, gradients)
        # index_select and index_copy_ take half the time of self.exp_avg[touched] and its assignment.
        mean = self.exp_avg.index_select(0, touched).lerp_(gradient, 1 - beta1)
        square = self.exp_avg_sq.index_select(0, touched).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self.exp_avg.index_copy_(0, touched, mean)
        self.exp_avg_sq.index_copy_(0, touched, square)
        rate, weights = self.get_learning_rate(), self.flat_weights()
        new = weights.index_select(0, touched).mul_(1 - rate * decay)
        deviation = square.div_(1 - beta2**self.steps).sqrt_().add_(eps)
        weights.index_copy_(0, touched, new.addcdiv_(mean, deviation, value=-rate / (1 - beta1**self.steps)))

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """Return the moments of each table, under FBGEMM's names."""
        if not self.adam_on_host:
            return super().get_optimizer_state()
        bounds = list(zip(self.table_starts, self.table_starts[1:], strict=False))
        return [{"exp_avg": self.exp_avg[a:b], "exp_avg_sq": self.exp_avg_sq[a:b]} for a, b in bounds]

    def set_optimizer_step(self, step: int) -> None:
        """Set the count of steps that the bias correction uses; FBGEMM does not save it."""
        if self.adam_on_host:
            self.steps = int(step)
        else:
            super().set_optimizer_step(step)


@contextmanager
def adam_on_host() -> Iterator[None]:
    """Make TorchRec build ``HostAdamTables`` while it shards."""
    target = "torchrec.distributed.batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen"
    with mock.patch(target, HostAdamTables):
        yield
