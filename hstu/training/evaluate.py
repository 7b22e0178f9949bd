"""Scores of a model on a split: the same normalisation and similarity as in training, exact over ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hstu.bar import progress_bar
from hstu.config import Config
from hstu.config.retrieval import SAMPLED_100
from hstu.data.batch import Batch
from hstu.data.loader import BatchLoader
from hstu.data.reader import SequenceDataset
from hstu.data.repeats import MANY_REPEATS
from hstu.data.seen import count_seen_targets, is_among, seen_before
from hstu.data.splits import Split
from hstu.metrics.ranking import Predicted, lower_is_better, ranking_scores
from hstu.metrics.retrieval import per_user_metric, sampled_ranks, target_ranks
from hstu.metrics.standard_errors import by_jackknife, of_mean
from hstu.models import RankingModel, RetrievalModel
from hstu.models.negatives import random_uniform
from hstu.parallel import Mesh
from hstu.training.watchdog import beat

logger = logging.getLogger(__name__)

_LOOKUP_ROWS = 1 << 16  # items looked up at once
_SCORE_ELEMENTS = 1 << 25  # scores held at once
TRAINED = ":trained"
"""Behind the name of a metric: of targets that training shows."""
_LONG = 100  # batches of an evaluation that is worth announcing


class Scorer(Protocol):
    """What scores the whole catalogue for each target: a retrieval model, or a baseline."""

    num_items: int

    def scored(self, batch: Batch) -> tuple[Batch, Callable[[slice], Tensor]]:
        """Return ``batch`` with the labels of this rank, and what scores some of them: [q, items], the caller's own."""


def improves(name: str, value: float | None, best: float | None) -> bool:
    """Return whether ``value`` of metric ``name`` is better than ``best`` (None: anything finite is)."""
    if value is None:
        return False
    if best is None:
        return True
    return value < best if lower_is_better(name) else value > best


@torch.no_grad()
def evaluate(
    model: RankingModel | RetrievalModel | Scorer,
    loader: BatchLoader,
    mesh: Mesh,
    config: Config,
    step: int,
    trained: Tensor | None = None,
) -> dict[str, Any]:
    """Return the evaluation record of ``loader.split``, the same on every rank.

    The record says how it was made: protocol, split, filter_seen, num_candidates, tie_rule, num_users; of how many
    targets the item is one that the user had met before: seen_targets.

    Args:
        model: The model, on every rank, or what else scores items.
        loader: The samples, unshuffled.
        mesh: The ranks.
        config: The run, its ``filter_seen`` decided.
        step: Of the run, for the record.
        trained: Which items training shows, [items] bool: metrics of targets among these stand beside those of all, as
            ``HR@10:trained``, and the others are counted as untrained_targets. None: neither.
    """
    if isinstance(model, nn.Module):
        model.eval()
    if isinstance(model, RankingModel):
        result = _ranking(model, loader, mesh, config)
    else:
        scorer = _ModelScorer(model, loader, mesh) if isinstance(model, RetrievalModel) else model
        result = _retrieval(scorer, loader, mesh, config, trained)
    if isinstance(model, nn.Module):
        model.train()
    # JSON has no nan: a metric that is not defined on these events is null.
    for name in result.keys() & {"metrics", "standard_errors"}:
        result[name] = {k: None if math.isnan(v) else v for k, v in result[name].items()}
    record = {"kind": "eval", "split": loader.split.name, "step": step, "protocol": config.dataset.protocol}
    if config.dataset.protocol == "windows":
        record["window"] = config.dataset.window
    return record | {"tie_rule": "average"} | result


def _batches(loader: BatchLoader, config: Config, mesh: Mesh) -> Iterator[Batch]:
    total = min(loader.steps_per_epoch, config.trainer.max_eval_iters or loader.steps_per_epoch)
    options = dict(desc=loader.split.name, total=total, leave=False, unit="batch", delay=1.0)  # none of a short one
    bar = progress_bar(**options) if mesh.is_main else None
    if mesh.is_main and bar is None and total > _LONG:
        logger.info("scoring %d batches of %s; TrainerArgs.max_eval_iters shortens this", total, loader.split.name)
    with contextlib.nullcontext() if bar is None else bar:
        for batch in itertools.islice(loader.epoch(0), total):
            yield batch.to(mesh.device, non_blocking=True)
            beat()
            mesh.obey_signals()
            if bar is not None:
                bar.update()


def _ranking(model: RankingModel, loader: BatchLoader, mesh: Mesh, config: Config) -> dict[str, Any]:
    parts: list[tuple[Tensor, ...]] = []
    for batch in _batches(loader, config, mesh):
        request = model.scoring_request(batch)
        targets, users = model.targets(request.batch), _of_labels(request.batch, request.batch.users)
        labels = torch.stack([task.labels(targets) for task in model.tasks], 1)
        parts.append((model.predictions(request), labels, users))
    predicted, labelled, owners = (
        mesh.tokens.gather(torch.cat(part)).cpu().numpy() for part in zip(*parts, strict=True)
    )
    # One order whatever rank scored what, so that sums round alike.
    order = np.lexsort((*labelled.T, owners))
    predicted, labelled, owners = predicted[order], labelled[order], owners[order]
    ends, tasks = np.cumsum([task.outputs for task in model.tasks]), []
    for task, values, wanted in zip(model.tasks, np.split(predicted, ends[:-1], 1), labelled.T, strict=True):
        known = ~np.isnan(wanted)
        wanted = wanted[known] if task.kind == "regression" else wanted[known].astype(np.int64)
        tasks.append(
            Predicted(name=task.name, kind=task.kind, values=values[known], labels=wanted, users=owners[known])
        )
    scores = ranking_scores(config.eval_metrics, tasks)
    errors = {}
    if loader.split.name == "test":
        errors["standard_errors"] = by_jackknife(lambda kept: _metrics_of(config, tasks, owners[kept]), owners)
    return errors | {
        "filter_seen": None,
        "num_candidates": 1,
        "num_users": int(np.unique(owners).size),
        "num_targets": int(owners.size),
        "metrics": scores.metrics,
        "left_out": scores.left_out,
    }


def _metrics_of(config: Config, tasks: list[Predicted], users: np.ndarray) -> dict[str, float]:
    """Return the metrics of some users alone."""
    some = []
    for task in tasks:
        kept = np.isin(task.users, users)
        values, labels, owners = task.values[kept], task.labels[kept], task.users[kept]
        some.append(dataclasses.replace(task, values=values, labels=labels, users=owners))
    return ranking_scores(config.eval_metrics, some).metrics


def decide_filter_seen(config: Config, dataset: SequenceDataset, valid: Split) -> tuple[bool, str]:
    """Return whether seen items leave the ranking, and why, in words that follow ``RetrievalArgs.filter_seen = ..``.

    Where users come back to what they know, a model that may not return it answers another question.
    """
    assert config.retrieval is not None
    if config.retrieval.filter_seen is not None:
        return config.retrieval.filter_seen, "as configured"
    seen = count_seen_targets(dataset, valid)
    few = seen <= MANY_REPEATS * len(valid)
    counts = f"{seen:,} of {len(valid):,} validation targets are items that their user has met before"
    return few, f"{counts}, {'at most' if few else 'more than'} {MANY_REPEATS:.0%}"


def _retrieval(
    scorer: Scorer, loader: BatchLoader, mesh: Mesh, config: Config, trained: Tensor | None
) -> dict[str, Any]:
    assert config.retrieval is not None and config.retrieval.filter_seen is not None, "see decide_filter_seen"
    parts = zip(*_ranked(scorer, loader, mesh, config), strict=True)
    users, targets, seen, ranks, sampled = (mesh.tokens.gather(torch.cat(part)).cpu() for part in parts)
    count, metrics, untrained = ranks.numel(), {}, {}
    for name in config.eval_metrics:
        metrics[name] = per_user_metric(name, sampled if name.endswith(SAMPLED_100) else ranks)
    if trained is not None:
        known = trained[targets]
        metrics |= {name + TRAINED: values[known] for name, values in metrics.items()}
        untrained["untrained_targets"] = count - int(known.sum())
    errors = {}
    if loader.split.name == "test":
        of_users = {name: users[known] if trained is not None and name.endswith(TRAINED) else users for name in metrics}
        errors["standard_errors"] = {
            name: of_mean(values.double().numpy(), of_users[name].numpy()) for name, values in metrics.items()
        }
    return (
        untrained
        | errors
        | {
            "filter_seen": config.retrieval.filter_seen,
            "num_candidates": scorer.num_items,
            "num_users": users.unique().numel(),
            "num_targets": count,
            "seen_targets": int(seen.sum()),
            "metrics": {name: _mean(values) for name, values in metrics.items()},
        }
    )


def _mean(values: Tensor) -> float:
    """Return the mean, rounded once, so that no order of samples matters."""
    return math.fsum(values.tolist()) / values.numel() if values.numel() else float("nan")


def _ranked(
    scorer: Scorer, loader: BatchLoader, mesh: Mesh, config: Config
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Yield of targets of this rank [Q] each: user, item, whether the user has met it, rank, rank among 100 items."""
    assert config.retrieval is not None
    sampling = any(name.endswith(SAMPLED_100) for name in config.eval_metrics)
    elements = _SCORE_ELEMENTS // 8 if sampling else _SCORE_ELEMENTS  # random numbers take more than scores
    block = max(1, elements // scorer.num_items)
    assert not loader.shuffle, "the first epoch of an unshuffled split numbers samples by their rows"
    for batch in _batches(loader, config, mesh):
        batch, score = scorer.scored(batch)
        samples, users = _of_labels(batch, batch.sample_ids), _of_labels(batch, batch.users)
        for start in range(0, max(1, batch.labels.numel()), block):  # a rank without samples joins the others too
            rows = slice(start, start + block)
            targets, seen = batch.labels[rows], seen_before(loader.dataset, loader.split, samples[rows])
            scores = score(rows)
            sampled = _sampled(scores, targets, samples[rows], seen, config.trainer.seed) if sampling else None
            ranks = target_ranks(scores, targets, seen if config.retrieval.filter_seen else None)
            sampled = ranks if sampled is None else sampled.where(ranks.isfinite(), ranks)
            yield users[rows], targets, is_among(targets, seen), ranks, sampled
            beat()


def _sampled(scores: Tensor, targets: Tensor, samples: Tensor, seen: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """Return ranks among 100 items that nobody's rank or batch decides, [Q] float64."""
    priorities = random_uniform(samples, scores.shape[1], seed)
    return sampled_ranks(scores, targets, seen, priorities, 100)


class _ModelScorer:
    """A retrieval model and the vectors of its catalogue."""

    def __init__(self, model: RetrievalModel, loader: BatchLoader, mesh: Mesh) -> None:
        self.model, self.num_items = model, model.num_items
        self.catalogue = _catalogue(model, loader, mesh)

    def scored(self, batch: Batch) -> tuple[Batch, Callable[[slice], Tensor]]:
        request = self.model.scoring_request(batch)
        queries = self.model.queries(request)
        return request.batch, lambda rows: self.model.scores(queries[rows], self.catalogue)


def _catalogue(model: RetrievalModel, loader: BatchLoader, mesh: Mesh) -> Tensor:
    """Look up every item, as many times on every rank: [items, D] float32."""
    empty = loader.collate(loader.dataset, loader.split, np.empty(0, np.int64), np.empty(0, np.int64), 0)
    empty = empty.to(mesh.device)
    ids = torch.arange(model.num_items, device=mesh.device)
    chunks = []
    for chunk in ids.split(_LOOKUP_ROWS):
        chunks.append(model.catalogue_vectors(empty, chunk))
        beat()
    return torch.cat(chunks)


def _of_labels(batch: Batch, values: Tensor) -> Tensor:
    """Return the value [B] of the sample that each label belongs to, [L]."""
    sample = torch.repeat_interleave(batch.lengths(batch.item))
    return values[sample[batch.label_events]]


def best_possible(
    record: dict[str, Any], planted: dict[str, dict[str, float]] | None
) -> dict[str, float | None] | None:
    """Return the planted data's best scores under the keys of the record's metrics, if they are known.

    They are those of the last events of each user, so that no other protocol compares with them.
    """
    if planted is None or record["protocol"] != "leave_one_out":
        return None
    known = planted.get(record["split"], {})
    return {name: known.get(name) for name in record["metrics"]}
