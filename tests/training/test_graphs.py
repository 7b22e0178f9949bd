"""The dense part of a step, recorded once and replayed: what no GPU is needed to see."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu.data import SequenceDataset
from hstu.models.padding import ROWS, DenseInputs, dense_inputs, in_slots
from hstu.training import graphs
from hstu.training.graphs import GraphedLoss, Recording
from tests.models.padding_cases import CASES, differentiated, model_and_batches
from tests.parallel.cases import ACCUMULATED, CANDIDATES, IN_BATCH, PIPELINED, RESEARCH, SASREC
from tests.training.launches import counted
from tests.training.runs import losses, state_of, trainer, worst
from tests.training.tape import TapeRecorder, compute_by_shapes
from tests.training.test_launches import ML_100K

AUTO = "TrainerArgs.cuda_graphs='auto'"
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ranking": ("ranking", (*CANDIDATES, *ACCUMULATED)),
    "research": ("retrieval", (*RESEARCH, *PIPELINED)),
    "sasrec": ("retrieval", (*SASREC, *IN_BATCH)),
}


def two_alike(model: Any, batches: list[Any]) -> list[tuple[Any, dict[str, Tensor], DenseInputs]]:
    """Return two batches that stand in slots of one size: what they ask for, the rows, and what goes into the slots."""
    met: dict[Any, Any] = {}
    for batch in batches:
        request = model.request(batch)
        found = {name: rows.detach() for name, rows in model.embeddings(request.features).items()}
        inputs = dense_inputs(model, found, request)
        other = met.setdefault(inputs.key, (request, found, inputs))
        if request.stream.num_local != other[0].stream.num_local:
            return [other, (request, found, inputs)]
    raise AssertionError("no two batches are alike")


@pytest.mark.parametrize("name", sorted({*CASES} - {"recomputed"}))  # which is of the fused layer
def test_a_replay_on_another_batch_is_its_step(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing that is recorded depends on numbers in host memory: losses and all gradients, in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model, batches = model_and_batches(SequenceDataset.open(data), CASES[name][0], *CASES[name][1], batch_size=7)
    with monkeypatch.context() as patch:
        compute_by_shapes(model, patch)
        (_, _, first), (request, found, second) = two_alike(model, batches)
        own = [(key, weight) for key, weight in model.named_parameters() if not key.startswith("embeddings.")]
        weights = [(weight, torch.full_like(weight, 3.0)) for _, weight in own]  # what was added up before
        recorder = TapeRecorder()
        recording = Recording(model, weights, first, recorder)
        assert all(bool((into == 3.0).all()) for _, into in weights), "recording leaves gradients as they are"
        recording.load(second)
        recording.forward()
        recording.scale.fill_(0.5)
        recording.backward()
    wanted, gradients = differentiated(model, found, request)
    torch.testing.assert_close(recording.total, wanted.total.detach(), rtol=1e-12, atol=0)
    got = {key: into - 3.0 for (key, _), (_, into) in zip(own, weights, strict=True)}
    got |= {key: x for key, x in zip(recording.rows, recording.gradients, strict=True) if x is not None}
    for key, gradient in gradients.items():
        gradient = torch.zeros_like(got[key]) if gradient is None else gradient
        torch.testing.assert_close(2 * got[key][: len(gradient)], gradient, rtol=1e-9, atol=1e-12)


def test_dropout_is_drawn_anew_at_each_replay(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = (*RESEARCH, "NetworkArgs.hidden_dropout=0.3", "NetworkArgs.input_dropout=0.2")
    model, batches = model_and_batches(SequenceDataset.open(data), "retrieval", *bindings, batch_size=7)
    compute_by_shapes(model, monkeypatch)
    (_, _, first), (_, _, second) = two_alike(model, batches)
    weights = [(weight, torch.zeros_like(weight)) for weight in model.backbone.parameters()]
    recording = Recording(model, weights, first, TapeRecorder())
    recording.load(second)
    totals = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        recording.forward()
        totals.append(float(recording.total))
        torch.manual_seed(seed)
        assert totals[-1] == float(model.loss(*in_slots(recording.slots, recording.facts)).total.detach())
    assert totals[0] != totals[1]


@pytest.mark.parametrize("name", [*(pytest.param(name, marks=pytest.mark.slow) for name in list(RUNS)[:2]), "sasrec"])
def test_runs_with_recordings_have_the_losses_of_those_without(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, bindings = RUNS[name]
    bindings = (*bindings, "NetworkArgs.hidden_dropout=0.0", "TrainerArgs.max_train_iters=12")
    found, states = {}, {}
    for kind in ("off", "auto"):
        recorder = TapeRecorder()
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "make_recorder", lambda device: recorder)  # noqa: B023
            with trainer(data, tmp_path / kind, task, *bindings, f"TrainerArgs.cuda_graphs={kind!r}") as run:
                if kind == "auto":
                    compute_by_shapes(run.model, patch)
                run.train()
                found[kind], states[kind] = losses(tmp_path / kind), state_of(run)
        assert (recorder.replays > 12) == (kind == "auto"), "most steps are replayed"
    assert worst(found["auto"], found["off"]) < 1e-5
    for a, b in zip(states["auto"], states["off"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_recorded_is_told_the_same_by_the_host(data: Path, tmp_path: Path) -> None:
    """Operators, kernels and their numbers on a GPU's way, there and back, of two batches in slots of one size."""
    small = (*ML_100K, "TrainerArgs.train_batch_size=8")
    with trainer(data, tmp_path, "retrieval", *small) as run, counted(run) as count:
        batches = [run.model.training_batch(batch) for batch in run.loaders["train"].epoch(0, 0)]
        weights, said = run.parallel.dense.gradients(), []
        first, second = (inputs for _, _, inputs in two_alike(run.model, batches))
        for inputs in (first, first, second):  # at first some things are done that are kept
            values = {name: slot.padding() for name, slot in inputs.slots.items()}
            for name, slot in inputs.slots.items():
                values[name][: len(slot.tensor)].copy_(slot.tensor)
            leaves = [values[name].requires_grad_() for name in values if name.startswith(ROWS)]
            count.said = []
            total = run.model.loss(*in_slots(values, inputs.facts)).total
            torch.autograd.grad(total, [*leaves, *(weight for weight, _ in weights)], allow_unused=True)
            said.append(count.said)
            count.said = None
    assert len(said[1]) > 250 and sum(what == "triton" for what, _ in said[1]) >= 20
    assert said[1] == said[2]


class Silent:
    """A recorder whose replays are one launch each, and do nothing."""

    def __init__(self) -> None:
        self.launch: Callable[[], None] = lambda: None
        self.replays = 0

    def aside(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.replays += 1
            self.launch()

        return replay


def test_a_replayed_step_launches_a_quarter(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 250 launches of the step that ``test_launches`` counts, beside the tables; nothing in it waits."""
    recorder = Silent()
    monkeypatch.setattr(graphs, "make_recorder", lambda device: recorder)
    monkeypatch.setattr(Recording, "_require", lambda *_: None)
    with trainer(data, tmp_path, "retrieval", *ML_100K, AUTO) as run:
        run.model.train()
        for epoch in itertools.count():
            assert epoch < 4
            for batches in run.stepper.steps(run.loaders["train"].epoch(epoch, 0), run.progress):
                loss, replays = run.stepper.graphs, recorder.replays
                assert isinstance(loss, GraphedLoss)
                made = len(loss.recordings)
                with counted(run) as count:
                    recorder.launch = count.kernel
                    run.stepper.take(batches, run.progress)
                if recorder.replays == replays + 2 and len(loss.recordings) == made:
                    break
            if recorder.replays == replays + 2 and len(loss.recordings) == made:
                break
    assert not count.waits and count.lookups == 1
    assert sum(count.launches.values()) <= 55, (sum(count.launches.values()), count.places.most_common(30))


@pytest.mark.parametrize(
    "bindings, reason",
    [
        (("NetworkArgs.backbone='mean'",), "NetworkArgs.backbone = 'mean'; hstu, sasrec, llama can"),
        (("OptimizerArgs.overlap_grad_reduce=True",), "OptimizerArgs.overlap_grad_reduce"),
        (("RetrievalArgs.similarity='mol'",), "RetrievalArgs.mol_dropout"),
        ((), None),
    ],
)
def test_what_is_not_recorded_is_said(
    bindings: tuple[str, ...], reason: str | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, recorder in (("cpu", None), ("gpu", Silent())):
        monkeypatch.setattr(graphs, "make_recorder", lambda device: recorder)  # noqa: B023
        with trainer(data, tmp_path / name, "retrieval", AUTO, *bindings) as run:
            if recorder is None or reason is None:  # on a CPU there is nothing to say
                assert not run.notes and isinstance(run.stepper.graphs, GraphedLoss) == (recorder is not None)
            else:
                assert reason in run.notes[-1] and "\n" not in run.notes[-1]


class Failing(TapeRecorder):
    """A recorder that cannot."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class Wrong(TapeRecorder):
    """A recorder whose replays do nothing."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        super().record(run)
        return lambda: None


@pytest.mark.parametrize(
    "recorder, limits, message",
    [
        (Failing, {}, "none from now on: operation not permitted when stream is capturing"),
        (Wrong, {}, "none from now on: a replay gives another loss, or other gradients"),
        (TapeRecorder, {"MOST_TOKENS": 10}, "batches of more than 10 tokens"),
        (TapeRecorder, {"MOST_GRAPHS": 0}, "0 sizes of batches are recorded"),
    ],
)
def test_a_loss_that_cannot_be_recorded_is_computed(
    recorder: type[TapeRecorder],
    limits: dict[str, int],
    message: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    model, batches = model_and_batches(SequenceDataset.open(data), "ranking", batch_size=7)
    compute_by_shapes(model, monkeypatch)
    for name, value in limits.items():
        monkeypatch.setattr(graphs, name, value)
    weights = [(weight, torch.zeros_like(weight)) for weight in model.backbone.parameters()]
    loss = GraphedLoss(model, weights, recorder())
    with caplog.at_level(logging.WARNING):
        for request, found, _ in two_alike(model, batches) * 2:
            assert loss(found, request).total == model.loss(found, request).total
    assert not loss.recordings and not any(bool(into.any()) for _, into in weights)
    assert [message in record.getMessage() for record in caplog.records] == [True], "said once"
