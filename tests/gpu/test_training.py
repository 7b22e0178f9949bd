"""Steps of the trainer on a GPU: the losses of plain PyTorch on a CPU, nothing that waits, and two devices."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hstu.config import Config
from hstu.data import SequenceDataset
from hstu.data.loader import BatchLoader
from hstu.data.seen import met_categories, trained_items
from hstu.data.splits import leave_one_out
from hstu.models import build_model, make_collator
from hstu.models.negatives import count_items
from hstu.parallel import Mesh
from hstu.training.graphs import GraphedLoss
from hstu.training.step import Stepper
from tests.launch import ROOT, run, torchrun_command
from tests.parallel.cases import CASES, PIPELINED, SPLITS, WAITLESS, config_of
from tests.parallel.worker import train, train_plain
from tests.samples import declared_features, make_dataset
from tests.tiny import write_tiny
from tests.toy_text import WORDS, save_model, text_dataset
from tests.training.runs import trainer


def has_tables() -> bool:
    """Whether FBGEMM's CUDA kernels are installed."""
    import fbgemm_gpu  # noqa: F401

    try:
        torch.ops.fbgemm.asynchronous_complete_cumsum(torch.ones(2, dtype=torch.int64, device="cuda"))
    except (NotImplementedError, RuntimeError):
        return False
    return True


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.is_available() and not has_tables(), reason="FBGEMM has no CUDA kernels here"),
]
STEPS = 4
FEATURES = (
    "context-ranking-candidates",
    "context-retrieval-research",
    "context-retrieval-llama-memory",
    "context-retrieval-declared",
    "context-retrieval-permuted",
    "context-retrieval-bert",
    "context-retrieval-recomputed",
    "tensor-ranking-concat",
)
CHOSEN = {name: CASES[name] for name in CASES} | {name: SPLITS[name] for name in FEATURES}
CACHED = replace(
    CASES["retrieval-adam-auto"], name="cached", bindings=(*PIPELINED, *CASES["retrieval-adam-auto"].bindings)
)
CHOSEN |= {"cached": CACHED}
RANDOM = ("tensor-ranking-concat",)  # dropout draws other numbers on another device


def spread(names: Any, what: str, parts: int) -> list[Any]:
    """Return parameters that some workers of pytest-xdist share."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"{what}{i % parts}")) for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gpu")
    write_tiny(root / "even" / "synthetic", num_users=200)
    write_tiny(root / "short" / "synthetic", num_users=65)
    lengths = np.random.default_rng(0).integers(2, 16, size=80)
    make_dataset(root / "declared" / "synthetic", lengths.tolist(), num_actions=2, declared=declared_features())
    text_dataset(root / "text" / "synthetic", lengths.tolist(), num_actions=2)
    return {name: root / name / "synthetic" for name in ("even", "short", "declared", "text")}


def first_loss(config: Config, dataset: SequenceDataset, mesh: Mesh) -> float:
    """Return the loss of the plain model on the CPU, of the first batch of the trainer's."""
    from hstu.training.assembly import Assembly

    assembly = Assembly(config, dataset, mesh)
    model = build_model(config, dataset.schema, allocate_tables=True)
    loader = assembly.loaders["train"]
    if model.item_encoder is not None:
        model.item_encoder.read(dataset, met_categories(dataset, trained_items(dataset, loader.split, loader.collate)))
        theirs = assembly.model.item_encoder and assembly.model.item_encoder.text
        if theirs is not None and theirs.vectors is not None:  # which a frozen model has made of the texts
            model.item_encoder.text.give(theirs.vectors, theirs.mean.cpu(), theirs.deviation.cpu())
    if config.retrieval is not None:
        model.sampler.set_counts(count_items(dataset, loader.split))  # type: ignore[union-attr]
    batch = next(iter(loader.epoch(0, 0)))
    loss = model(batch)
    return float(loss.total) / loss.count


@pytest.mark.parametrize("name", spread(CHOSEN, "losses", 9))
def test_losses_of_the_first_steps(
    name: str, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CHOSEN[name], steps=STEPS)
    if case.data == "text":  # whose model is a folder where the run is started
        pytest.importorskip("transformers")
        save_model(tmp_path / "bert", WORDS)
        monkeypatch.chdir(tmp_path)
    config, dataset = config_of(case, 1), SequenceDataset.open(data[case.data])
    with Mesh.create() as mesh:
        assert mesh.device.type == "cuda"
        result = train(config, dataset, mesh)
        found = result["losses"]
        if case.plain_steps and case.name not in FEATURES:
            wanted = train_plain(config, dataset, STEPS)
        else:
            wanted = [] if "dynamic" in name or name in RANDOM else [first_loss(config, dataset, mesh)]
    assert ("cache_hit_rate" in result["counters"]) == ("uvm_caching" in str(case.bindings))
    assert len(found) == STEPS and all(np.isfinite(found))
    assert found[: len(wanted)] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("name", spread(WAITLESS, "waits", 6))
def test_no_step_waits_for_the_device(
    name: str, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fourth step on, when every kernel is compiled; all places that wait are named at once."""
    case, waits, take = WAITLESS[name], [], Stepper.take

    def tell(message: Any, *_: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            stack = traceback.extract_stack()[:-1]
            waits.append(" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack[:-9:-1]))

    def watched(self: Stepper, batches: Any, progress: Any) -> float:
        if progress.step < 3:
            return take(self, batches, progress)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = tell
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return take(self, batches, progress)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Stepper, "take", watched)
    limits = ("TrainerArgs.max_train_iters=6", "TrainerArgs.log_interval=50", "TrainerArgs.eval_interval=50")
    with trainer(data[case.data], tmp_path, case.task, *case.bindings, *limits) as run_:
        run_.train()
        assert run_.progress.dense_steps == 6
    assert not waits, "\n".join(dict.fromkeys(waits))


@pytest.mark.xdist_group("losses0")
def test_pinned_batches_arrive_unchanged(data: dict[str, Path]) -> None:
    dataset, case = SequenceDataset.open(data["declared"]), CHOSEN["ranking-adam-declared"]
    config = config_of(case, 1)
    loader = BatchLoader(
        dataset=dataset,
        split=leave_one_out(dataset.lengths)["train"],
        collate=make_collator(config, dataset.schema),
        batch_size=8,
        seed=1,
        shuffle=True,
        num_workers=2,
    )
    for plain, pinned in zip(loader.epoch(0), replace(loader, pin_memory=True).epoch(0), strict=True):
        assert pinned.labels.is_pinned() and pinned.features.values().is_pinned()
        arrived = pinned.to(torch.device("cuda"), non_blocking=True)
        torch.cuda.synchronize()
        assert torch.equal(arrived.features.values().cpu(), plain.features.values())
        assert all(
            torch.equal(arrived.numbers[name].cpu().nan_to_num(), x.nan_to_num()) for name, x in plain.numbers.items()
        )


@pytest.fixture
def two_devices() -> Iterator[None]:
    if torch.cuda.device_count() < 2:
        pytest.skip("there are not two CUDA devices")
    yield


@pytest.mark.usefixtures("two_devices")
@pytest.mark.xdist_group("ranks")
def test_two_devices_have_the_losses_of_one(data: dict[str, Path], tmp_path: Path) -> None:
    names = ["ranking-adam-row", "retrieval-adam-in-batch", "ranking-adam-dynamic", "context-retrieval-research"]
    found = {}
    for ranks in (1, 2):
        paths = tmp_path / f"request{ranks}.json", tmp_path / f"result{ranks}.json"
        request = {"cases": [(name, None) for name in names], "data": str(data["even"].parents[1])}
        paths[0].write_text(json.dumps(request))
        script = ROOT / "tests" / "parallel" / "worker.py"
        done = run(torchrun_command(ranks, script, *map(str, paths)), cwd=tmp_path)
        assert done.code == 0, done.err[-3000:]
        found[ranks] = json.loads(paths[1].read_text())
    for name in names:
        one, two = (found[ranks][name]["losses"] for ranks in (1, 2))
        assert two == pytest.approx(one, rel=2e-2), name


GRAPHED = {
    "ranking": ("ranking", SPLITS["context-ranking-candidates"].bindings),
    "research": ("retrieval", ("NetworkArgs.preset='research'", "NetworkArgs.bias_query_time='next'")),
    "in-batch": ("retrieval", ("RetrievalArgs.num_negatives=-1", "RetrievalArgs.sampling_strategy='in_batch'")),
    "sasrec": ("retrieval", ("NetworkArgs.backbone='sasrec'", "TrainerArgs.pipeline_type='native'")),
    "llama-bce": ("retrieval", CASES["retrieval-sgd-llama-bce"].bindings),
    "bfloat16": ("retrieval", ("NetworkArgs.dtype_str='bfloat16'", "TrainerArgs.gradient_accumulation_steps=2")),
}


@pytest.mark.parametrize("name", spread(GRAPHED, "graphs", 3))
def test_runs_with_cuda_graphs_have_the_losses_of_those_without(
    name: str, data: dict[str, Path], tmp_path: Path
) -> None:
    """And steps that are replayed wait for nothing: the third epoch, when all sizes of batches were met before."""
    task, bindings = GRAPHED[name]
    found = {}
    for kind in ("off", "auto"):
        options = (*bindings, "NetworkArgs.hidden_dropout=0.0", f"TrainerArgs.cuda_graphs={kind!r}")
        with trainer(data["even"], tmp_path / kind, task, *options, "TrainerArgs.max_epochs=4") as run_:
            run_.model.train()
            found[kind] = []
            for epoch in range(3):
                torch.cuda.set_sync_debug_mode("error" if epoch == 2 and kind == "auto" else "default")
                try:
                    for batches in run_.stepper.steps(run_.loaders["train"].epoch(0, 0), run_.progress):
                        run_.stepper.take(batches, run_.progress)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                found[kind].append(run_.meter.read(run_.progress.step)["loss"])
            if kind == "auto":
                loss = run_.stepper.graphs
                assert isinstance(loss, GraphedLoss) and loss.recordings and not loss._told
    assert found["auto"] == pytest.approx(found["off"], rel=1e-2 if name == "bfloat16" else 1e-3)


def test_dropout_of_cuda_graphs_is_drawn_anew(data: dict[str, Path], tmp_path: Path) -> None:
    """The same batch, no weight of which moves: each step has another loss, of about the same size."""
    still = ("OptimizerArgs.learning_rate=1e-30", "NetworkArgs.hidden_dropout=0.5", "NetworkArgs.preset='research'")
    with trainer(data["even"], tmp_path, "retrieval", *still, "TrainerArgs.cuda_graphs='auto'") as run_:
        run_.model.train()
        (batches, *_), losses = [*run_.stepper.steps(run_.loaders["train"].epoch(0, 0), run_.progress)], []
        for _ in range(6):
            run_.stepper.take(batches, run_.progress)
            losses.append(run_.meter.read(run_.progress.step)["loss"])
        loss = run_.stepper.graphs
        assert isinstance(loss, GraphedLoss) and len(loss.recordings) == 1 and not loss._told
    assert len(set(losses)) == 6 and max(losses) < 1.5 * min(losses)
