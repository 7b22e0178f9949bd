"""CUDA graphs of the dense part of a step: from the rows of the tables to the loss, and back to their gradients.

What a small model costs a GPU is mostly the host's calls. A graph is recorded for each size of slots that batches stand
in (:mod:`hstu.models.padding`); other batches of that size are copied into its slots, and it is replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hstu.config import Config
from hstu.config.retrieval import LOSSES
from hstu.models import RankingModel, RetrievalModel
from hstu.models.lookup import Lookup
from hstu.models.losses import LossSum
from hstu.models.padding import ROWS, DenseInputs, Key, dense_inputs, in_slots, why_not_padded
from hstu.parallel import Parallelized

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16  # each keeps its slots; what is between them shares one memory
MOST_TOKENS = 1 << 15  # of a batch: more keep a device busy for longer than the host's calls take
_TOLERANCE = 0.02  # between a replay and what it was recorded of, whose sums may be in another order

BACKBONES = ("hstu", "sasrec", "llama")

Weights = list[tuple[nn.Parameter, Tensor]]
"""Dense weights, and where their gradients are added up."""


class Recorder(Protocol):
    """Records what a device is asked to do."""

    def aside(self, run: Callable[[], None]) -> None:
        """Run something apart from the step, which leaves random numbers to be drawn as they are."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what does again, in the same memory, what the device is asked for by ``run``."""


class CudaRecorder:
    """Records CUDA graphs that share memory: one is replayed after the other, never two at once.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.memory = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def aside(self, run: Callable[[], None]) -> None:
        """See :class:`Recorder`."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream), torch.random.fork_rng(devices=[self.device]):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on copying batches, saving and watching ranks.
        with torch.cuda.graph(graph, pool=self.memory, stream=self.stream, capture_error_mode="thread_local"):
            run()
        replay: Callable[[], None] = graph.replay
        return replay


class Recording:
    """The dense part for batches in slots of one size.

    Args:
        model: Whose loss it is.
        weights: Of the model.
        inputs: The first batch.
        recorder: What records.

    Attributes:
        total: Loss of the last batch that ``forward`` was run for, a scalar.
        live: Its live negatives, likewise, or None.
        gradients: Of the rows of the tables in their slots, once ``backward`` was run, which adds those of the weights
            to where they belong; of ``total`` times ``scale``.

    Raises:
        RuntimeError: if it cannot be recorded, or a replay gives something else.
    """

    def __init__(
        self, model: RankingModel | RetrievalModel, weights: Weights, inputs: DenseInputs, recorder: Recorder
    ) -> None:
        self.loss: Callable[..., LossSum] = model.loss
        self.weights, self.facts = weights, inputs.facts
        self.paddings = {name: slot.padding() for name, slot in inputs.slots.items()}
        self.slots = {name: padding.clone() for name, padding in self.paddings.items()}
        self.rows = [name for name in self.slots if name.startswith(ROWS)]
        self.leaves = [self.slots[name].requires_grad_() for name in self.rows]
        self.load(inputs)
        recorder.aside(self._forward)  # what is done for the first time is over then
        self.scale = torch.ones_like(self.total)
        recorder.aside(self._run)
        recorder.aside(self._run)
        wanted = [x.clone() for x in (self.total, *self._found_of_rows(), *(own for _, own in self.reached))]
        before = [into.clone() for into, _ in self.reached]
        self.forward, self.backward = recorder.record(self._forward), recorder.record(self._backward)
        del self._loss
        recorder.aside(lambda: self._require(wanted, before))
        del self.reached

    @torch.no_grad()
    def load(self, inputs: DenseInputs) -> None:
        """Copy a batch into the slots."""
        kinds: dict[Any, list[str]] = {}
        for name, slot in inputs.slots.items():
            kinds.setdefault((slot.tensor.dtype, name in self.rows), []).append(name)
        for names in kinds.values():
            own = {name: inputs.slots[name].tensor for name in names}
            padded = [name for name in names if len(own[name]) < len(self.slots[name])]
            if padded:
                torch._foreach_copy_([self.slots[name] for name in padded], [self.paddings[name] for name in padded])
            torch._foreach_copy_([self.slots[name][: len(own[name])] for name in names], list(own.values()))

    def _forward(self) -> None:
        with torch.enable_grad():
            found, request = in_slots(self.slots, self.facts)
            self._loss = self.loss(found, request)
        self.total, self.live = self._loss.total.detach(), self._loss.live_negatives

    def _backward(self) -> None:
        self._differentiate()
        torch._foreach_add_([into for into, _ in self.reached], [gradient for _, gradient in self.reached])

    def _differentiate(self) -> None:
        inputs = [*self.leaves, *(weight for weight, _ in self.weights)]
        gradients = torch.autograd.grad(self._loss.total, inputs, self.scale, allow_unused=True)
        self.gradients = gradients[: len(self.leaves)]
        found = zip(self.weights, gradients[len(self.leaves) :], strict=True)
        #: Where gradients of weights belong, and these.
        self.reached = [(into, gradient) for (_, into), gradient in found if gradient is not None]

    def _run(self) -> None:
        self._forward()
        self._differentiate()

    def _found_of_rows(self) -> list[Tensor]:
        return [gradient for gradient in self.gradients if gradient is not None]

    @torch.no_grad()
    def _require(self, wanted: list[Tensor], before: list[Tensor]) -> None:
        """Raise ``RuntimeError`` unless a replay gives the loss and the gradients that are ``wanted``.

        Gradients of weights, to which recording may have added some, are those ``before`` then.
        """
        places = [into for into, _ in self.reached]
        torch._foreach_copy_(places, before)
        self.forward()
        self.backward()
        added = [into - own for into, own in zip(places, before, strict=True)]
        torch._foreach_copy_(places, before)
        found = [self.total, *self._found_of_rows(), *added]
        off = torch.stack([(x - y).double().norm() for x, y in zip(found, wanted, strict=True)])
        size = torch.stack([x.double().norm() for x in wanted])
        for part in (slice(0, 1), slice(1, None)):
            if bool(size.isfinite().all() & ~(off[part].norm() <= _TOLERANCE * size[part].norm())):
                raise RuntimeError("a replay gives another loss, or other gradients, than what was recorded")


class _Replay(torch.autograd.Function):
    """The loss of a batch, and the gradients of its rows; those of the weights are added up without autograd."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, inputs: DenseInputs, *rows: Tensor) -> Tensor:
        recording.load(inputs)
        recording.forward()
        ctx.recording, ctx.lengths = recording, [len(own) for own in rows]
        return recording.total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recording: Recording = ctx.recording
        recording.scale.copy_(grad)
        recording.backward()
        # Views of what the next batch is written to: tables step before it comes.
        found = zip(recording.gradients, ctx.lengths, strict=True)
        return None, None, *(None if own is None else own[:length] for own, length in found)


class GraphedLoss:
    """The loss of a model, replayed for batches in slots of a size that was met before.

    Args:
        model: A model of which ``why_not_recorded`` says nothing.
        weights: Of the model, with where their gradients are added up.
        recorder: What records.

    Attributes:
        recordings: By size.
    """

    def __init__(self, model: RankingModel | RetrievalModel, weights: Weights, recorder: Recorder) -> None:
        self.model, self.weights, self.recorder = model, weights, recorder
        self.recordings: dict[Key, Recording] = {}
        self._met: set[Key] = set()
        self._told: set[str] = set()
        self._fails = False

    def __call__(self, found: dict[str, Tensor], request: Any) -> LossSum:
        """Return what ``model.loss`` does; its gradients have to be asked for before the next one."""
        if self._fails or not self._is_small(request):
            return self.model.loss(found, request)
        inputs = dense_inputs(self.model, found, request)
        recording = self._recording(inputs)
        if recording is None:
            return self.model.loss(found, request)
        total: Tensor = _Replay.apply(recording, inputs, *(inputs.slots[name].tensor for name in recording.rows))
        live = None if recording.live is None else recording.live.clone()
        return LossSum(total=total, count=request.batch.labels.numel(), live_negatives=live)

    def _is_small(self, request: Lookup) -> bool:
        small = request.stream.timestamps.numel() <= MOST_TOKENS
        return small or self._tell(
            f"batches of more than {MOST_TOKENS:,} tokens are computed without: they are no shorter"
        )

    def _recording(self, inputs: DenseInputs) -> Recording | None:
        """Return that for batches like this, made when their size is met again; None: there is none."""
        key = inputs.key
        if key in self.recordings:
            return self.recordings[key]
        if key not in self._met:  # the last batch of an epoch, say, comes once
            self._met.add(key)
        elif len(self.recordings) == MOST_GRAPHS:
            self._tell(f"{MOST_GRAPHS} sizes of batches are recorded, and others computed without")
        else:
            try:
                self.recordings[key] = Recording(self.model, self.weights, inputs, self.recorder)
            except RuntimeError as error:
                self._fails = True
                self._tell(f"none from now on: {str(error).strip().splitlines()[0]}")
        return self.recordings.get(key)

    def _tell(self, what: str) -> bool:
        if what not in self._told:
            self._told.add(what)
            logger.warning("TrainerArgs.cuda_graphs = 'auto': %s", what)
        return False


def graphed_loss(parallel: Parallelized, config: Config) -> tuple[GraphedLoss | None, str | None]:
    """Return what gives the loss in place of the model where steps are recorded, and a line on why they are not."""
    recorder = make_recorder(parallel.mesh.device)
    if recorder is None or config.trainer.cuda_graphs == "off":
        return None, None
    reason = why_not_recorded(parallel, config)
    if reason is not None:
        return None, f"TrainerArgs.cuda_graphs = 'auto': none, for {reason}"
    return GraphedLoss(parallel.model, parallel.dense.gradients(), recorder), None


def make_recorder(device: torch.device) -> Recorder | None:
    """Return what records on ``device``; None where nothing can."""
    return CudaRecorder(device) if device.type == "cuda" else None


def why_not_recorded(parallel: Parallelized, config: Config) -> str | None:
    """Return what keeps the dense part of a step from being recorded once and replayed; None: nothing."""
    network, retrieval, mesh = config.network, config.retrieval, parallel.mesh
    if mesh.context.size > 1 or mesh.tensor.size > 1:
        return "context and tensor ranks exchange tokens in every layer"
    if network.backbone not in BACKBONES:
        return f"NetworkArgs.backbone = {network.backbone!r}; {', '.join(BACKBONES)} can"
    if network.recompute == "full":
        return "NetworkArgs.recompute = 'full' draws dropout again"
    if config.optimizer.overlap_grad_reduce:
        return "OptimizerArgs.overlap_grad_reduce exchanges gradients meanwhile"
    if retrieval is not None and retrieval.loss not in LOSSES:
        return f"RetrievalArgs.loss = {retrieval.loss!r}, which is registered"
    if retrieval is not None and retrieval.similarity == "mol" and retrieval.mol_dropout:
        return "RetrievalArgs.mol_dropout is drawn again in the backward pass"
    return why_not_padded(parallel.model)
