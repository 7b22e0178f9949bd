"""Training of retrieval on a CPU, end to end: ours against a padded trainer of the same model, in one run.

    python benchmarks/retrieval_speed.py [--threads 2] [--rounds 3] [--data tmp_data/ml-100k]

The models are published configurations of HSTU: that of ML-1M (length 200, width 50, 2 blocks, 1 head, 128 uniform
negatives, batch 128) on MovieLens 100K, and that of Amazon Books (length 50, width 64, 4 blocks, 4 heads, 512
negatives) on a generated log of mean length 9 with 12,000 items; also the former model on the latter log. Ours reads
its batches inside the measured time; the padded side (``padded.py``) gets them ready-made. Both take an AdamW step on
dense weights; of the item table ours moves the rows that were looked up, the padded side all. First the loss and the
gradient of the item table are compared at the same weights and negatives. Tokens are events; ``ratio`` is of tokens
per second, rounds taken alternately; ``torch`` is ours without the loops that numba compiles. Prints a table and
writes benchmarks/results/retrieval_speed.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from padded import PaddedRetrieval
from record import write_record
from torch import Tensor

from hstu.config import Config, load_config
from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, write_dataset
from hstu.data.batch import Batch
from hstu.data.loader import BatchLoader
from hstu.data.schema import count_statistics
from hstu.models import RetrievalModel, build_model
from hstu.ops.loops import torch_only
from hstu.parallel import Mesh
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer

CONFIGS = {"small": "ml_1m_hstu_retrieval.gin", "books": "amazon_books_hstu_retrieval.gin"}
EXTRA = 10  # places of a padded sequence beyond the history, as published


def write_short(folder: Path, users: int = 22_000, items: int = 12_000, mean: float = 9.0) -> None:
    """Write a log in which a user has at least 5 events, about ``mean`` of them, and items are Zipf-distributed."""
    rng = np.random.default_rng(0)
    lengths = 4 + rng.geometric(1 / (mean - 4), users).clip(max=48)
    total = int(lengths.sum())
    weights = 1 / np.arange(1, items + 1)
    clock = rng.integers(1, 10**6, total).cumsum()
    features = (
        Feature(name="user", role="user", vocab_size=users),
        Feature(name="item", role="item", vocab_size=items),
        Feature(name="time", role="time"),
    )
    write_dataset(
        EncodedDataset(
            schema=Schema(name="short", features=features, counts=count_statistics(lengths, items)),
            lengths=lengths,
            contexts={},
            events={"item": rng.choice(items, total, p=weights / weights.sum()), "time": clock},
            vocabularies={"user": pa.array(np.arange(users)), "item": pa.array(np.arange(items))},
        ),
        folder,
    )


def load(model: str, length: int) -> Config:
    """A published configuration for samples of up to ``length`` events."""
    lines = [f"DatasetArgs.max_history_seqlen={length}", "TrainerArgs.max_epochs=1000000", "TrainerArgs.loggers=()"]
    return load_config("retrieval", [CONFIGS[model]], lines).config


def padded_inputs(batch: Batch, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Item ids and times [B, N], lengths [B]."""
    lengths = batch.lengths(batch.item)
    valid = torch.arange(length) < lengths[:, None]
    ids, times = (torch.zeros(valid.shape, dtype=torch.int64) for _ in range(2))
    ids[valid], times[valid] = batch.ids(batch.item), batch.timestamps
    return ids, times, lengths


def check(config: Config, schema: Schema, batch: Batch, length: int) -> dict[str, float]:
    """Assert that both sides have one loss and one gradient at the same weights and negatives, without dropout."""
    config = replace(config, network=replace(config.network, hidden_dropout=0.0, input_dropout=0.0))
    model = build_model(config, schema)
    assert isinstance(model, RetrievalModel)
    pool = model.sampler.pool(batch.labels, batch.step)
    columns = model.sampler.columns(model.keys(batch), pool.numel())
    assert columns is not None
    padded = PaddedRetrieval(model, length)
    theirs = padded(*padded_inputs(batch, length), pool[columns])
    ours = model(batch).total
    (ours / batch.labels.numel()).backward()
    (theirs / batch.labels.numel()).backward()
    gradient, expected = model.embeddings.weights[model.item].grad, padded.items.weight.grad
    assert gradient is not None and expected is not None
    loss_error = abs(float(ours.detach() / theirs.detach()) - 1)
    gradient_error = float((gradient - expected).abs().max() / expected.abs().max())
    assert loss_error < 1e-5 and gradient_error < 1e-3, f"the two sides differ: {loss_error:.1e}, {gradient_error:.1e}"
    return {"loss_error": loss_error, "item_gradient_error": gradient_error}


class Ours:
    """The trainer's own steps; a round is some whole epochs of batches, read as they are needed."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps, self.epoch = trainer, steps, 0

    def round(self) -> int:
        """Take the steps; returns the events seen."""
        events = 0
        loader: BatchLoader = self.trainer.loaders["train"]
        for number, batch in enumerate(loader.epoch(self.epoch)):
            self.trainer.stepper.take([batch], self.trainer.progress)
            events += batch.num_events
            if number + 1 == self.steps:
                break
        self.epoch += 1
        return events


class TorchOnly(Ours):
    """The same steps by torch's operators, without the loops that numba compiles."""

    def round(self) -> int:
        with torch_only():
            return super().round()


class Padded:
    """The padded model under torch's AdamW, with a gradient of the whole table; batches are ready-made."""

    def __init__(self, config: Config, schema: Schema, batches: list[Batch], length: int) -> None:
        model = build_model(config, schema)
        assert isinstance(model, RetrievalModel) and config.retrieval is not None
        self.model, self.items, self.count = (
            PaddedRetrieval(model, length),
            model.num_items,
            config.retrieval.num_negatives,
        )
        args = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), args.learning_rate, (args.adam_beta1, args.adam_beta2), weight_decay=0.0
        )
        self.inputs = [padded_inputs(batch, length) for batch in batches]

    def round(self) -> int:
        """Take one step for each batch; returns the events seen."""
        events = 0
        for ids, times, lengths in self.inputs:
            labels = int((lengths - 1).sum())
            self.optimizer.zero_grad()
            loss = self.model(ids, times, lengths, torch.randint(self.items, (labels, self.count))) / labels
            loss.backward()
            self.optimizer.step()
            events += int(lengths.sum())
        return events


def tokens_per_second(sides: dict[str, Ours | Padded], rounds: int) -> dict[str, dict[str, float]]:
    """Medians over rounds, by elapsed and by processor time; the first round is not counted."""
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            begin = time.perf_counter(), time.process_time()
            events = side.round()
            if number:
                spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
                rates[name].append((events / spent[0], events / spent[1]))
    medians = {name: [statistics.median(kind) for kind in zip(*record, strict=True)] for name, record in rates.items()}
    return {name: {"elapsed": round(e), "processor": round(c)} for name, (e, c) in medians.items()}


def measure(data: Path, model: str, length: int, mesh: Mesh, args: argparse.Namespace) -> dict:
    config, dataset, places = load(model, length), SequenceDataset.open(data), length + EXTRA + 1
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(config, dataset, mesh, RunDirectory(Path(run)))
        batches = _first(trainer.loaders["train"].epoch(0), args.padded_steps)
        errors = check(config, dataset.schema, batches[0], places)
        sides = {
            "ours": Ours(trainer, args.steps),
            "torch": TorchOnly(trainer, args.steps),
            "padded": Padded(config, dataset.schema, batches, places),
        }
        rates = tokens_per_second(sides, args.rounds)
    row = {"data": data.name, "config": CONFIGS[model], "length": length, "places": places, "users": dataset.num_users}
    row |= {"items": dataset.schema.item.vocab_size, "mean_length": round(dataset.num_events / dataset.num_users, 1)}
    row |= {"tokens_per_second": rates} | errors
    for name, side in (("ratio", "ours"), ("ratio_of_torch", "torch")):
        row[name] = {kind: round(rates[side][kind] / rates["padded"][kind], 1) for kind in rates[side]}
    speeds = "   ".join(f"{side} {rate['elapsed']:7,} tokens/s" for side, rate in rates.items())
    ratios = f"{row['ratio']['elapsed']:5.1f} elapsed, {row['ratio']['processor']:5.1f} processor time"
    print(f"{data.name:8} {model:6} {speeds}   ratio {ratios}   same loss to {errors['loss_error']:.0e}", flush=True)
    return row


def _first(batches: Iterator[Batch], count: int) -> list[Batch]:
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("tmp_data/ml-100k"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="steps of a round, ours")
    parser.add_argument("--padded-steps", type=int, default=2, help="steps of a round, padded")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval_speed.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    with Mesh.create() as mesh, tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short"
        write_short(short)
        problems = [(args.data, "small", 200), (short, "books", 50), (short, "small", 50)]
        rows = [measure(*problem, mesh, args) for problem in problems]
    write_record(
        args.out,
        threads=args.threads,
        load_before=round(load_before, 2),
        rounds=args.rounds,
        steps_of_a_round={"ours": args.steps, "padded": args.padded_steps},
        rows=rows,
    )


if __name__ == "__main__":
    main()
