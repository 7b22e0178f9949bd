"""What a run writes, which checkpoint it chooses, when it stops, and what its clock counts."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hstu.config import ConfigError, TrainerArgs, load_config
from hstu.training import assembly, hardware
from hstu.training import trainer as module
from hstu.training.assembly import Assembly
from hstu.training.checkpoint_files import find_checkpoint
from hstu.training.meter import TrainingError, not_finite
from hstu.training.optimizer import Optimizer
from hstu.training.profile import profiler
from hstu.training.step import Stepper
from hstu.training.trainer import Trainer
from tests.samples import make_dataset
from tests.tiny import BINDINGS, write_tiny
from tests.training.runs import losses, records, state_of, trainer
from tests.training.test_checkpoint import fake_scores

EVAL_KEYS = {"kind", "split", "step", "protocol", "filter_seen", "num_candidates", "num_users", "tie_rule", "metrics"}
TEN = ("TrainerArgs.max_train_iters=10", "TrainerArgs.eval_interval=1")


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_records(data: Path, tmp_path: Path, task: str) -> None:
    bindings = ("TrainerArgs.max_train_iters=6", "TrainerArgs.log_interval=4", "TrainerArgs.eval_interval=3")
    with trainer(data, tmp_path, task, *bindings, "TrainerArgs.loggers=('tensorboard',)", picture=True) as run:
        run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["kind"], r.get("split"), r["step"]) for r in lines[:-1]] == [
        ("eval", "valid", 3),
        ("train", None, 4),
        ("train", None, 6),
        ("eval", "valid", 6),
    ]
    keys = {"kind", "step", "epoch", "loss", "lr", "sequences_per_second", "tokens_per_second", "flops_per_second"}
    keys |= {"data_wait_share", "memory_gib", "gradient_norm"}
    for record in lines:
        if record["kind"] == "train":
            assert record.keys() - {"live_negatives"} == keys
            assert record["lr"] == 3e-3 and record["tokens_per_second"] > record["sequences_per_second"] > 0
            assert record["epoch"] == (record["step"] - 1) // 4
            assert 0 < record["data_wait_share"] < 1 and 0.1 < record["memory_gib"] < 10
            assert record["flops_per_second"] > 1e3 * record["tokens_per_second"]
        else:
            assert record.keys() >= EVAL_KEYS
    final = json.loads((tmp_path / "eval.json").read_text())
    assert final == lines[-1] and final["split"] == "test"
    expected: dict[str, Any] = {
        "protocol": "leave_one_out",
        "num_users": 120,
        "tie_rule": "average",
        "filter_seen": None if task == "ranking" else True,
        "num_candidates": 1 if task == "ranking" else 120,
    }
    assert {key: final[key] for key in expected} == expected
    assert final["metrics"].keys() == final["best_possible"].keys() == set(run.config.eval_metrics)
    assert all(value > 0.1 for value in final["best_possible"].values())
    assert (tmp_path / "figures" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_what_only_pleases_the_eye_ends_no_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a version of a library that has other functions: a warning each, and the result is there."""
    monkeypatch.delattr("plotext.clear_figure")
    monkeypatch.delattr("matplotlib.figure.Figure.savefig")
    monkeypatch.delattr("torch.utils.tensorboard.SummaryWriter.add_scalar")
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    bindings = ("TrainerArgs.max_train_iters=2", "TrainerArgs.loggers=('tensorboard',)")
    with trainer(data, tmp_path, "ranking", *bindings, picture=True) as run:
        assert run.train() == json.loads((tmp_path / "eval.json").read_text())
    # Once each: pytest hears a logger twice that did not propagate when the test began.
    warnings = list({r.getMessage(): None for r in caplog.records if r.levelname == "WARNING"})
    assert [text.partition(" (AttributeError: ")[0] for text in warnings] == [
        "no more curves in TensorBoard and W&B",
        "no sketch of the curves",
        f"{tmp_path / 'figures' / 'curves.png'} was not drawn",
    ]
    assert all("\n" not in text for text in warnings)


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_a_run_over_a_window_of_time(data: Path, tmp_path: Path, task: str) -> None:
    about = ("DatasetArgs.protocol='windows'", "DatasetArgs.num_windows=4", "DatasetArgs.window=1")
    with trainer(data, tmp_path, task, *about, "DatasetArgs.train_stride=4", "TrainerArgs.max_train_iters=3") as run:
        run.train()
    final = json.loads((tmp_path / "eval.json").read_text())
    assert (final["protocol"], final["window"]) == ("windows", 1) and "best_possible" not in final
    assert final["num_targets"] >= final["num_users"] > 0


def test_a_metric_without_a_known_best(data: Path, tmp_path: Path) -> None:
    with trainer(
        data, tmp_path, "ranking", "TrainerArgs.max_train_iters=1", "RankingArgs.eval_metrics=('AUC','LOGLOSS')"
    ) as run:
        run.train()
    best = json.loads((tmp_path / "eval.json").read_text())["best_possible"]
    assert best["LOGLOSS"] is None and best["AUC"] > 0.5


@pytest.mark.parametrize(("metric", "choose"), [("AUC", 4), ("LOGLOSS", 7)])
def test_validation_chooses_and_test_is_scored_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str, choose: int
) -> None:
    scores = dict.fromkeys(range(1, 11), 0.5) | {4: 0.8, 7: 0.3}
    asked = fake_scores(monkeypatch, scores, metric)
    seen: list[torch.Tensor] = []
    evaluate = assembly.evaluate

    def watch(model: Any, loader: Any, *args: Any) -> dict[str, Any]:
        weights = next(model.backbone.parameters()).detach().clone()
        seen.append(weights)
        return evaluate(model, loader, *args)

    monkeypatch.setattr(assembly, "evaluate", watch)
    with trainer(data, tmp_path, "ranking", *TEN, f"RankingArgs.eval_metrics=('{metric}',)") as run:
        record = run.train()
    assert record is not None and record["step"] == choose
    assert [split for split, _ in asked].count("test") == 1 and asked[-1] == ("test", choose)
    assert torch.equal(seen[-1], seen[choose - 1]), "the weights of the chosen step"
    assert not torch.equal(seen[-1], seen[-2])


def test_early_stopping(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {1: 0.1, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.3, 6: 0.9}
    fake_scores(monkeypatch, scores)
    bindings = (*TEN, "TrainerArgs.early_stopping_patience=3")
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        record = run.train()
    assert record is not None and (run.progress.step, record["step"]) == (5, 2), "a tie is no better score"
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        run.resume(find_checkpoint(tmp_path / "checkpoints", "latest"))  # type: ignore[arg-type]
        run.train()
    assert run.progress.step == 5, "it stays stopped"
    assert [r["split"] for r in records(tmp_path, "eval")].count("test") == 1


def test_a_finished_run_is_only_scored_again(data: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=3") as run:
            latest = find_checkpoint(tmp_path / "checkpoints", "latest")
            if latest is not None:
                run.resume(latest)
            run.train()
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    assert [r["split"] for r in records(tmp_path, "eval")] == ["valid", "test"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(data: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 9.0}\n{"kind": "tra')
    with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=2") as run:
        run.train()
    assert [r["step"] for r in records(tmp_path)] == [1, 2] and records(tmp_path)[0]["loss"] < 9


def moved(run: Trainer, steps: int = 3) -> tuple[float, float]:
    """Return how far the first dense weight and the item table move."""

    def state() -> tuple[torch.Tensor, torch.Tensor]:
        (tables,) = run.parallel.tables.collections.values()
        item = next(w for name, w in tables.state_dict().items() if "item_id" in name)
        return next(run.model.backbone.parameters()).detach().clone(), item.local_shards()[0].tensor.clone()

    before = state()
    for batch in list(run.loaders["train"].epoch(0))[:steps]:
        run.stepper.take([batch], run.progress)
    dense, table = ((a - b).abs().max().item() for a, b in zip(state(), before, strict=True))
    return dense, table


def test_sparse_and_dense_rates_are_separate(data: Path, tmp_path: Path) -> None:
    rates = {"dense": (1e-2, 1e-5), "sparse": (1e-5, 1e-2)}
    for dense_rate, sparse_rate in rates.values():
        bindings = (f"OptimizerArgs.learning_rate={dense_rate}", f"OptimizerArgs.sparse_learning_rate={sparse_rate}")
        with trainer(data, tmp_path, "ranking", *bindings) as run:
            dense, table = moved(run)
        # Adam moves a weight by about its rate in each of the 3 steps.
        assert dense == pytest.approx(3 * dense_rate, rel=0.5) and table == pytest.approx(3 * sparse_rate, rel=0.5)
    with trainer(data, tmp_path, "ranking", "OptimizerArgs.learning_rate=1e-2") as run:
        assert moved(run)[1] == pytest.approx(3e-2, rel=0.5), "one rate for both when only one is given"


def test_gradients_of_tables_are_clipped_by_an_option_of_their_own(data: Path, tmp_path: Path) -> None:
    found = {}
    for limit in (0.0, 1e-7, 1e3):
        bindings = ("OptimizerArgs.optimizer_str='sgd'", f"OptimizerArgs.sparse_max_gradient={limit}")
        with trainer(data, tmp_path, "ranking", *bindings) as run:
            found[limit] = moved(run, 1)
    assert found[1e-7][0] == found[0.0][0] > 0, "dense weights are not clipped by it"
    assert 0 < found[1e-7][1] < found[0.0][1] / 10 and found[1e3] == found[0.0]


@pytest.mark.parametrize("bad", [{3}, {3, 4}, set(range(3, 15))])
def test_a_skipped_step_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    take, broken_users = Stepper.take, {}

    def breaking(self: Stepper, batches: Any, progress: Any) -> float:
        step, loss, before = progress.step + 1, self.model.loss, state_of(run)
        if step in bad:
            broken_users[step] = batches[0].users
            self.model.loss = lambda *args: replace(loss(*args), total=loss(*args).total * torch.nan)
        rate = take(self, batches, progress)
        self.model.loss = loss
        same = all(torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True))
        assert same == (step in bad)
        return rate

    monkeypatch.setattr(Stepper, "take", breaking)
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    hopeless = len(bad) > 10
    bindings = (f"TrainerArgs.max_train_iters={20 if hopeless else 8}", "TrainerArgs.log_interval=2")
    with trainer(data, tmp_path, "ranking", *bindings, "TrainerArgs.nonfinite_loss='skip'") as run:
        if hopeless:
            with pytest.raises(TrainingError, match="the loss is not finite at step 13: lower"):
                run.train()
            return
        run.train()
    assert (run.progress.step, run.progress.dense_steps) == (8, 8 - len(bad)) == (8, run.progress.table_steps)
    lines = [(r["step"], r.get("skipped_steps", 0)) for r in records(tmp_path)]
    assert lines == ([(2, 0), (6, 2), (8, 0)] if bad == {3, 4} else [(2, 0), (4, 1), (6, 0), (8, 0)])
    original = run.dataset.vocabulary(run.dataset.schema.user.name)[broken_users[3]]
    assert f"users of the batch: {', '.join(map(str, original[:10]))} and 22 more in train.log" in caplog.text


def test_the_schedule_reaches_both_optimizers(data: Path, tmp_path: Path) -> None:
    bindings = ("OptimizerArgs.warmup_steps=1000", "OptimizerArgs.learning_rate=1e-2")
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        dense, table = moved(run, 1)
    assert dense == pytest.approx(1e-5, rel=0.3) and table == pytest.approx(1e-5, rel=0.3)


def test_the_norm_of_the_dense_gradient_is_on_record(data: Path, tmp_path: Path) -> None:
    """A step of SGD tells it; a clipped one is of another size, and the record is the same."""
    sgd = ("OptimizerArgs.optimizer_str='sgd'", "OptimizerArgs.learning_rate=0.5", "TrainerArgs.max_train_iters=1")
    norms = []
    for clip in (0.0, 1e-3):
        path = tmp_path / str(clip)
        with trainer(data, path, "ranking", *sgd, f"OptimizerArgs.clip_grad={clip}") as run:
            before = [p.detach().clone() for p in run.parallel.dense.ddp.parameters()]
            run.stepper.take(next(run.stepper.steps(run.loaders["train"].epoch(0), run.progress)), run.progress)
            after = run.parallel.dense.ddp.parameters()
            moved = math.hypot(*(float((a - b).detach().norm()) for a, b in zip(after, before, strict=True)))
            norms.append(run.meter.read(1)["gradient_norm"])
            assert moved / 0.5 == pytest.approx(clip or norms[0], rel=1e-3)
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 1e-2


def test_no_hidden_decay_or_clipping(data: Path, tmp_path: Path) -> None:
    def knobs(optimizer: Optimizer) -> tuple[set[float], float]:
        return {group["weight_decay"] for group in optimizer.dense.param_groups}, optimizer.engine.config.clip_grad

    with trainer(data, tmp_path, "ranking") as run:
        assert knobs(run.optimizer) == ({0.0}, 0.0)
    with trainer(data, tmp_path, "ranking", "OptimizerArgs.weight_decay=0.2", "OptimizerArgs.clip_grad=3.0") as run:
        assert knobs(run.optimizer) == ({0.2}, 3.0)


def test_the_clock_leaves_out_evaluations_saves_and_the_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands still but for what is counted here: a second for each step, more for what is no step."""
    now = [0.0]

    def taking(seconds: float, function: Any) -> Any:
        def slowly(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return function(*args, **kwargs)

        return slowly

    monkeypatch.setattr("hstu.training.meter.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Stepper, "take", taking(1, Stepper.take))
    monkeypatch.setattr(Assembly, "score", taking(100, Assembly.score))
    monkeypatch.setattr(module.Checkpointer, "save", taking(1000, module.Checkpointer.save))
    monkeypatch.setattr(module, "make_logger", taking(10000, module.make_logger))
    bindings = ("TrainerArgs.max_train_iters=4", "TrainerArgs.eval_interval=1", "TrainerArgs.log_interval=2")
    with trainer(data, tmp_path, "ranking", *bindings, "TrainerArgs.ckpt_save_interval=1") as run:
        run.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["sequences_per_second"] for record in lines if record["kind"] == "train"] == [32, 28]
    assert now[0] > 14000


def test_a_resumed_line_counts_only_its_own_time(data: Path, tmp_path: Path) -> None:
    with trainer(data, tmp_path, "ranking") as run:
        run.meter.restore([10.0, 0.0, 4.0, 1e6, 1e6])
        record = run.meter.read(5)
    assert record["loss"] == 2.5 and record["sequences_per_second"] == 0


@pytest.mark.parametrize(("start", "end"), [(2, 4), (0, 1)])
def test_a_window_of_steps_is_profiled(data: Path, tmp_path: Path, start: int, end: int) -> None:
    window = (f"TrainerArgs.profile_step_start={start}", f"TrainerArgs.profile_step_end={end}")
    bindings = ("TrainerArgs.profile=True", "TrainerArgs.max_train_iters=6", *window)
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        run.train()
    events = json.loads((tmp_path / "profile" / "rank0.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{step}" for step in range(start, end)}


def test_a_window_that_is_past_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = TrainerArgs(train_batch_size=1, eval_batch_size=1, profile=True, profile_step_start=3, profile_step_end=9)
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    with profiler(args, tmp_path, 4, 0) as profile:
        profile.step()
    assert "profile_step_start = 3 is past, the run goes on from step 4" in caplog.text


def test_anomaly_detection_is_off(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    take = Stepper.take
    monkeypatch.setattr(Stepper, "take", lambda *a: (seen.append(torch.is_anomaly_enabled()), take(*a))[1])
    with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=2") as run:
        run.train()
    assert seen == [False, False]


@pytest.mark.parametrize("where", ["loss", "step"])
def test_a_broken_state_is_not_saved(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Whether the loss shows it at once, or only the weights do, after the step."""
    step = Optimizer.step

    def breaking(self: Optimizer) -> None:
        step(self)
        if run.progress.step == 4:
            with torch.no_grad():
                next(run.model.backbone.parameters()).fill_(float("nan"))

    monkeypatch.setattr(Optimizer, "step", breaking)
    interval = 2 if where == "loss" else 1
    bindings = (
        "TrainerArgs.max_train_iters=9",
        f"TrainerArgs.ckpt_save_interval={interval}",
        "TrainerArgs.log_interval=3",
    )
    error = pytest.raises(TrainingError, match=r"not finite at step \d: lower OptimizerArgs.learning_rate")
    with trainer(data, tmp_path, "ranking", *bindings) as run, error:
        run.train()
    assert run.progress.step == 5
    with trainer(data, tmp_path, "ranking", *bindings) as run:
        run.resume(find_checkpoint(tmp_path / "checkpoints", "latest"))  # type: ignore[arg-type]
        assert run.progress.step == 4 and all(p.isfinite().all() for p in run.model.parameters())


def test_training_without_negatives_stops(tmp_path: Path) -> None:
    """One label a batch, whose only candidate is itself."""
    data = write_tiny(tmp_path / "synthetic", num_users=20, min_seqlen=4, max_seqlen=4)
    bindings = ("TrainerArgs.train_batch_size=1", "RetrievalArgs.num_negatives=-1", "TrainerArgs.log_interval=4")
    error = pytest.raises(TrainingError, match=r"0\.00 negatives per label at step 4: raise TrainerArgs.train_batch")
    with trainer(data, tmp_path / "run", "retrieval", *bindings) as run, error:
        run.train()


def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    limits = ("TrainerArgs.max_train_iters=2", "NetworkArgs.hidden_dropout=0.0")
    for name, dtype, flags in (
        ("plain", "float32", {"avx2"}),
        ("without", "bfloat16", {"avx2"}),
        ("with", "bfloat16", {"avx2", "avx512_bf16"}),
        ("arm", "bfloat16", {"asimd", "bf16"}),
        ("unknown", "bfloat16", set()),
    ):
        monkeypatch.setattr(hardware, "cpu_flags", lambda flags=flags: flags)
        with trainer(data, tmp_path / name, "ranking", *limits, f"NetworkArgs.dtype_str='{dtype}'") as run:
            found[name] = run.model.autocast_dtype, run.config.network.dtype_str, len(run.notes)
            if name in ("plain", "without"):
                run.train()
    assert found["without"] == (None, "float32", 1) and found["plain"] == (None, "float32", 0)
    assert [found[name] for name in ("with", "arm", "unknown")] == [(torch.bfloat16, "bfloat16", 0)] * 3
    assert losses(tmp_path / "plain") == losses(tmp_path / "without")
    on_a_gpu = hardware.on_device(run.config, torch.device("cuda"))
    assert on_a_gpu == (run.config, ()) and run.config.network.dtype_str == "bfloat16"


def test_an_undefined_validation_score_is_not_called_the_best(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("hstu"), "propagate", True)
    caplog.set_level(logging.INFO, "hstu")
    score = Assembly.score
    monkeypatch.setattr(Assembly, "score", lambda *given: score(*given) | {"metrics": {"AUC": None}})
    with trainer(data, tmp_path, "ranking", "TrainerArgs.max_train_iters=2") as run:
        run.train()
    assert (
        "validation AUC is undefined, so that there is no best step; the test score of the last one, 2:" in caplog.text
    )
    assert "best validation" not in caplog.text


def test_one_item_is_nothing_to_choose_from(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "one", [3, 4, 5], num_items=1).path
    one = trainer(data, tmp_path / "run", "retrieval", "DatasetArgs.contextual_feature_names=()")
    with pytest.raises(ConfigError, match="= 'synthetic': has one item, so that there is nothing to choose"), one:
        pass


@pytest.mark.parametrize(
    ("bindings", "dense_steps", "remedy"),
    [
        (
            (),
            0,
            "no learning rate is the reason; lower NetworkArgs.embedding_initializer_std or raise RetrievalArgs.temp",
        ),
        ((), 5, "at step 6: lower OptimizerArgs.learning_rate = 0.003 or set clip_grad"),
        (
            ("OptimizerArgs.sparse_learning_rate=7",),
            5,
            "at step 6: lower OptimizerArgs.sparse_learning_rate = 7 (and Opt",
        ),
    ],
)
def test_the_remedy_for_a_loss_that_is_not_finite_is_one(
    bindings: tuple[str, ...], dense_steps: int, remedy: str
) -> None:
    config = load_config("retrieval", [], [*BINDINGS["retrieval"], *bindings]).config
    assert remedy in str(not_finite("the loss", 6, config, dense_steps))
