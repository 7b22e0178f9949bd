"""Start from the weights and the optimizer state of another run, whose ids may stand for other values.

Rows of tables, and of dense weights that have one for each id, go to the id of the same original value; an id that the
other run did not know keeps its fresh row. Every other weight is taken as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from hstu.data.vocabulary import BITS, Vocabularies, places_of
from hstu.models import Encoder
from hstu.models.embedding import Table, table_key, table_named
from hstu.ops.row_sets import PARTS
from hstu.parallel import Mesh, Parallelized
from hstu.parallel.dynamic import DynamicTables
from hstu.parallel.row_map import held_rows
from hstu.training.checkpoint_files import CheckpointError, Progress, find_checkpoint, is_complete, read_marker
from hstu.training.optimizer import Optimizer
from hstu.training.saved_tensors import SavedTensors
from hstu.training.vocabularies import Record, kept_vocabularies

_FIELD = "TrainerArgs.init_from"
_REPLICATED = "replicated.weights."


def find_source(init_from: str, run: Path) -> Path:
    """Return the checkpoint that ``init_from`` names: a path to one, or the best one of a run, or else its latest.

    Args:
        init_from: A run directory or a checkpoint.
        run: The run that starts.

    Raises:
        CheckpointError: if there is none, or it is of ``run`` itself.
    """
    path = Path(init_from).resolve()
    if path == run.resolve() or run.resolve() in path.parents:
        raise CheckpointError(f"{_FIELD} = {init_from!r}: is this run itself, which goes on from there by --resume; "
                              "leave it out, or choose another --run-dir")  # fmt: skip
    if is_complete(path):
        return path
    for choice in ("best", "latest"):
        found = find_checkpoint(path / "checkpoints", choice)
        if found is not None:
            return found
    raise CheckpointError(f"{_FIELD} = {init_from!r}: is neither a run directory with a finished checkpoint nor a "
                          "checkpoint; give one, as runs/NAME or runs/NAME/checkpoints/latest")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint to start from.

    Attributes:
        path: Where it is.
        marker: What it says of itself.
        ids: Feature -> id there of each id here, [ids here] int64; -1 where it is not known there.
        known: Feature -> how many ids there are there.
    """

    path: Path
    marker: dict[str, Any]
    ids: dict[str, Tensor]
    known: dict[str, int]

    def rows(self, feature: str, number: int, there: int) -> Tensor:
        """Return the row there of each of ``number`` rows here, [number] int64; -1: none.

        Rows behind those of ids stand for no id, and are matched in their order.

        Args:
            feature: Whose ids have rows.
            number: Rows here.
            there: Rows there.
        """
        ids, known = self.ids[feature][:number], self.known[feature]
        behind = torch.arange(number - len(ids)) + known
        return torch.cat([ids, torch.where(behind < there, behind, -1)])


def open_source(path: Path, mesh: Mesh, identity: dict[str, Any], here: Vocabularies, record: Record) -> Source:
    """Return the checkpoint ``path`` with its ids matched to those of the data set at hand, on every rank.

    Args:
        path: A finished checkpoint.
        mesh: The ranks.
        identity: Of the model that starts, see ``model_identity``.
        here: The vocabularies of its data set.
        record: Which of them it embeds, see ``describe_vocabularies``.

    Raises:
        CheckpointError: if it is of another model, or keeps no vocabularies.
    """
    marker = mesh.on_main(lambda: read_marker(path))
    _require_same_model(path, marker, identity)
    there: Record | None = marker.get("vocabularies")
    if there is None:
        raise CheckpointError(
            f"{_FIELD} = {str(path)!r}: was written by a version that kept no vocabularies; go on with that run for a "
            "step, on its own data set, and start from its next checkpoint"
        )
    embedded = [name for name, entry in record.items() if entry["embedded"]]
    others = sorted({name for name, entry in there.items() if entry["embedded"]} ^ {*embedded})
    if others:
        raise CheckpointError(f"{_FIELD} = {str(path)!r}: is of another model: the features that are embedded here and "
                              f"there differ in {', '.join(map(repr, others))}; use a data set and a config with the "
                              "same")  # fmt: skip
    ids = {}
    for name in embedded:
        size = record[name]["size"]
        ids[name] = mesh.share(lambda name=name: _match(name, there[name], record[name], here, path), size)  # type: ignore[misc]
    return Source(path=path, marker=marker, ids=ids, known={name: there[name]["size"] for name in embedded})


def _require_same_model(path: Path, marker: dict[str, Any], identity: dict[str, Any]) -> None:
    both_dynamic = all(model.get("DynamicEmbeddingArgs.capacity") for model in (marker["model"], identity))
    multiclass = identity.get("RankingArgs.num_tasks") == 1 and identity["RankingArgs.prediction_head_arch"][-1] > 1
    for name, value in identity.items():
        other = marker["model"].get(name)
        if name.startswith("OptimizerArgs."):
            continue  # whose state begins anew
        if name.startswith("DynamicEmbeddingArgs.") and not (both_dynamic and name.endswith(".evict_strategy")):
            continue  # rows are matched, and scores go with them
        if name == "RankingArgs.prediction_head_arch" and multiclass and other is not None:
            value, other = value[:-1], other[:-1]  # classes are matched
        if other != value:
            raise CheckpointError(f"{_FIELD} = {str(path)!r}: is of another model: {name} is {other!r} there and "
                                  f"{value!r} here; use the same")  # fmt: skip


def _match(name: str, there: dict[str, Any], own: dict[str, Any], here: Vocabularies, path: Path) -> Tensor:
    """Return the id there of each id here, [ids here] int64; -1 where it is not known there."""
    size, known = own["size"], there["size"]
    same, masks = own["identity"] == there["identity"], [_is_mask(entry) for entry in (own, there)]
    if masks[0] != masks[1]:
        raise CheckpointError(f"{_FIELD} = {str(path)!r}: is of another model: of {name!r}, ids are bit masks either "
                              "here or there, but not in both; use the same --action_type")  # fmt: skip
    if all(masks) and None not in (own["identity"], there["identity"]) and not same:
        raise CheckpointError(f"{_FIELD} = {str(path)!r}: is of another model: {name!r} has {there['identity']} there "
                              f"and {own['identity']} here; use the same ones in the same order")  # fmt: skip
    if same or all(masks):  # which stand for themselves
        ids = torch.arange(size)
        return torch.where(ids < known, ids, -1)
    identities = {name: there["identity"]}
    kept = next((found for home in path.parents if (found := kept_vocabularies(home, identities)) is not None), None)
    if kept is None:
        raise CheckpointError(f"{_FIELD} = {str(path)!r}: the vocabulary of {name!r} that it was trained on is not in "
                              "its run directory any more; give the path of the whole run directory")  # fmt: skip
    values, old = (pl.Series(pl.from_arrow(v.originals(name))) for v in (here, kept))
    return torch.from_numpy(places_of(values, old).fill_null(-1).to_numpy().copy())


def _is_mask(entry: dict[str, Any]) -> bool:
    return entry["identity"] is None or entry["identity"].startswith(BITS)


class _Initializer:
    """Fills a model and its optimizers from ``source``.

    Args:
        source: The checkpoint.
        parallel: The model.
        optimizer: Both optimizers.
        identity: Of the model, see ``model_identity``.
    """

    def __init__(self, source: Source, parallel: Parallelized, optimizer: Optimizer, identity: dict[str, Any]) -> None:
        self.source, self.parallel, self.optimizer = source, parallel, optimizer
        self.saved = SavedTensors(source.path)
        self.dense_kind, self.table_kind = _kinds(identity)
        self.old_dense_kind, self.old_table_kind = _kinds(source.marker["model"])
        #: Of tables whose rows go to the ids that training meets: the row there of each row here, and counts.
        self._dynamic: dict[str, Tensor] = {}
        self._held: dict[str, dict[str, int]] = {}
        model: Encoder = parallel.model
        #: Dense weight -> feature whose ids its rows stand for.
        self.row_weights = dict(model.row_weights)
        self.class_features = model.class_features
        self.row_weights |= {_REPLICATED + table.key: table.name for table in parallel.tables.replicated.tables}

    def run(self) -> Progress:
        """Take everything that is known there; returns a start whose optimizers have taken the steps that count."""
        self._require_same_classes()
        self._dense_weights()
        for name, weight, moments in self._sharded():
            self._table(name, weight, moments)
        self.parallel.tables.forget_cached_rows()
        steps = Progress(**self.source.marker["progress"])
        progress = Progress(
            dense_steps=steps.dense_steps if self.dense_kind == self.old_dense_kind else 0,
            table_steps=steps.table_steps if self.table_kind == self.old_table_kind else 0,
        )
        self.parallel.tables.set_step(progress.table_steps)
        self._dense_moments(progress.dense_steps)
        return progress

    def _require_same_classes(self) -> None:
        """Raise ``CheckpointError`` for other classes of a softmax beside other tasks: its outputs are not matched."""
        for name in self.class_features:
            ids = self.source.ids[name]
            if not torch.equal(ids, torch.arange(self.source.known[name])):
                raise CheckpointError(f"{_FIELD} = {str(self.source.path)!r}: the values of {name!r}, which a task of "
                                      "several predicts, are others here or in another order; use a data set with the "
                                      "same, or predict it alone")  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Return what was carried over, as JSON values."""
        source = self.source
        rows = {}
        for name, ids in source.ids.items():
            kept = int((ids >= 0).sum())
            rows[name] = {"kept": kept, "new": len(ids) - kept, "left_out": source.known[name] - kept}
            rows[name] |= self._held.get(name, {})
        kinds = {
            "dense weights": (self.old_dense_kind, self.dense_kind),
            "tables": (self.old_table_kind, self.table_kind),
        }
        anew = [f"{what} ({old} there, {new} here)" for what, (old, new) in kinds.items() if old != new]
        return {
            "checkpoint": str(source.path),
            "checkpoint_step": source.marker["progress"]["step"],
            "rows": rows,
            "optimizer_state_anew": anew,
        }

    @torch.no_grad()
    def _dense_weights(self) -> None:
        taken = {}
        for name, value in self.parallel.dense.state().items():
            feature, key = self.row_weights.get(name), f"dense/{name}"
            if feature is not None:
                if name.startswith(_REPLICATED):
                    key = self._weight_there(feature)
                taken[name] = value.to("cpu", copy=True)
                self.saved.copy_rows(key, self._origin(feature, len(value), key), taken[name])
                continue
            if self.saved.shapes.get(key) != tuple(value.shape):
                raise CheckpointError(f"{_FIELD} = {str(self.source.path)!r}: is of another model: weight {name} has "
                                      f"shape {self.saved.shapes.get(key)} there and {tuple(value.shape)} here; use "
                                      "the same config")  # fmt: skip
            taken[name] = self.saved.whole(key)
        self.parallel.dense.load(taken)

    @torch.no_grad()
    def _dense_moments(self, steps: int) -> None:
        if self.dense_kind != self.old_dense_kind:
            return
        state = self.optimizer.state()
        for full, value in state.items():
            name, _, moment = full.rpartition(".")
            feature, key = self.row_weights.get(name), f"optimizer/{full}"
            if feature is not None and name.startswith(_REPLICATED):
                key = self._moments_there(feature, self.dense_kind).get(moment, key)
            if key not in self.saved.shapes:  # of an optimizer without momentum
                continue
            state[full] = value.to("cpu", copy=True) if feature is not None else self.saved.whole(key)
            if feature is not None:
                self.saved.copy_rows(key, self._origin(feature, len(value), key), state[full])
        self.optimizer.load(state, steps)

    @torch.no_grad()
    def _table(self, name: str, weight: Any, moments: dict[str, Any]) -> None:
        """Fill the shards of a sharded table that this rank holds, and of what its optimizer keeps."""
        key = self._weight_there(name)
        origin = self._origin(name, weight.size(0), key)
        self._fill(weight, key, origin)
        if self.table_kind != self.old_table_kind:
            return
        there = self._moments_there(name, self.table_kind)
        for full, value in moments.items():
            moment = _moment(full.removeprefix(f"{table_key(name)}."), self.table_kind)
            if moment in there:
                self._fill(value, there[moment], origin)

    def _fill(self, value: Any, key: str, origin: Tensor) -> None:
        for shard in value.local_shards():
            first, *column = shard.metadata.shard_offsets
            rows = origin[first : first + shard.metadata.shard_sizes[0]]
            self.saved.copy_rows(key, rows, shard.tensor, *column)

    def _sharded(self) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Yield name, weight and moments of each sharded table here."""
        for collection in self.parallel.tables.collections.values():
            moments = collection.fused_optimizer.state_dict()["state"]
            for full, weight in collection.state_dict().items():
                yield table_named(full), weight, moments.get(full, {})

    def _origin(self, feature: str, rows: int, key: str) -> Tensor:
        """Return the row there of each of ``rows`` rows here, [rows] int64; -1: none."""
        there, tables = self.saved.shapes[key][0], self.parallel.tables
        is_table = key == self._weight_there(feature)
        own = next((t for t in tables.maps if t.name == feature), None) if isinstance(tables, DynamicTables) else None
        was_dynamic = f"row_maps/{feature}/clock" in self.saved.shapes
        if not is_table or not (was_dynamic or own):
            return self.source.rows(feature, rows, there)
        if feature not in self._dynamic:
            self._dynamic[feature] = self._dynamic_origin(feature, rows, there, own, was_dynamic)
        return self._dynamic[feature]

    def _dynamic_origin(self, feature: str, rows: int, there: int, own: Table | None, was_dynamic: bool) -> Tensor:
        """Return what ``_origin`` does where rows went to the ids that training met, here or there."""
        known, ids = self.source.known[feature], self.source.ids[feature]
        old, old_rows = torch.arange(there), torch.arange(there)
        scores, clock = torch.zeros(there, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        if was_dynamic:
            begin = f"row_maps/{feature}/"
            state = {key.removeprefix(begin): key for key in self.saved.shapes if key.startswith(begin)}
            wanted = {name: key for name, key in state.items() if name.endswith(("/ids", "/scores"))}
            held = held_rows({name: self.saved.whole(key) for name, key in wanted.items()}, there)
            (old, old_rows, scores), clock = held, self.saved.whole(state["clock"])
        # The id behind the last one, if there is a row for it, stands for unknown values.
        here_of = torch.full((max(known, there) + 1,), -1)
        here_of[known] = len(ids)
        here_of[ids[ids >= 0]] = (ids >= 0).nonzero().squeeze(1)
        new = here_of[old]
        some = (new >= 0) & ((new < rows) | torch.tensor(own is not None))
        new, old_rows, scores = new[some], old_rows[some], scores[some]
        origin, at = torch.full((rows,), -1), new
        if own is not None:
            assert isinstance(self.parallel.tables, DynamicTables)
            if not was_dynamic and len(new) > own.rows - PARTS:
                raise CheckpointError(
                    f"{_FIELD} = {str(self.source.path)!r}: {feature!r} has {len(new):,} rows there to be kept, and "
                    f"DynamicEmbeddingArgs.capacity gives {own.rows:,} here: which to keep is not known; raise it"
                )
            at = self.parallel.tables.restore(own, new, scores, clock)
        origin[at[at >= 0]] = old_rows[at >= 0]
        if own is not None and was_dynamic:  # rows of those without one
            origin[-PARTS:] = torch.arange(there - PARTS, there)
        kept = int(((at >= 0) & (new < len(ids))).sum())
        self._held[feature] = {"kept": kept, "left_out": int((old < known).sum()) - kept}
        return origin

    def _weight_there(self, table: str) -> str:
        """Return the name of the weight of ``table`` in the checkpoint, sharded or whole."""
        sharded = (key for key in self.saved.shapes if key.startswith("tables/"))
        end = f"/embeddings.{table_key(table)}.weight"
        return next((key for key in sharded if key.endswith(end)), f"dense/{_REPLICATED}{table_key(table)}")

    def _moments_there(self, table: str, kind: str) -> dict[str, str]:
        """Return moment -> its name in the checkpoint, of a table that was trained by an optimizer of ``kind``."""
        weight = self._weight_there(table)
        is_sharded = weight.startswith("tables/")
        if kind != (self.old_table_kind if is_sharded else self.old_dense_kind):
            return {}
        begin = f"optimizer/{_REPLICATED}{table_key(table)}."
        if is_sharded:
            begin = f"tables_optimizer/{weight.removeprefix('tables/')}/{table_key(table)}."
        keys = [key for key in self.saved.shapes if key.startswith(begin)]
        return {_moment(key.removeprefix(begin), kind): key for key in keys}


def initialize(
    source: Source, parallel: Parallelized, optimizer: Optimizer, identity: dict[str, Any]
) -> tuple[Progress, dict[str, Any]]:
    """Fill a model and its optimizers from ``source``.

    Args:
        source: The checkpoint.
        parallel: The model.
        optimizer: Both optimizers.
        identity: Of the model, see ``model_identity``.

    Returns:
        A start whose optimizers have taken the steps that count, and what was carried over, as JSON values.
    """
    initializer = _Initializer(source, parallel, optimizer, identity)
    return initializer.run(), initializer.record()


def in_words(record: dict[str, Any]) -> str:
    """Return what ``initialize`` says was carried over, a line for each table."""
    lines = [f"starts from {record['checkpoint']}, step {record['checkpoint_step']}; rows by original ids:"]
    for name, rows in record["rows"].items():
        lines.append(f"  {name:24} {rows['kept']:>12,} kept {rows['new']:>12,} new {rows['left_out']:>12,} left out")
    return "\n".join(lines + [f"  the optimizer is another one, its state begins anew: {x}"
                              for x in record["optimizer_state_anew"]])  # fmt: skip


def _kinds(identity: dict[str, Any]) -> tuple[str, str]:
    """Return by what dense weights and tables are stepped; Adam's state does not depend on its weight decay."""
    dense: str = identity["OptimizerArgs.optimizer_str"]
    return "adam" if dense == "adamw" else dense, identity["OptimizerArgs.sparse_optimizer_str"]


def _moment(name: str, kind: str) -> str:
    """Return the name that torch has for a moment; FBGEMM calls the first one of Adam like those of others."""
    return "exp_avg" if (name, kind) == ("momentum1", "adam") else name
