"""A trained model as programs of ``torch.export``, mapped tables and words, for a reader without this package."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from hstu.data.batch import POOL, Batch, keyed_features
from hstu.inference import reader
from hstu.inference.opened import Opened
from hstu.inference.prediction_requests import RequestSpec, history_columns, score_names
from hstu.inference.recommend import item_vectors
from hstu.layers.similarity import MixtureOfLogits
from hstu.models import RankingModel, RetrievalModel, build_model
from hstu.models.caching import scores_slates
from hstu.parallel import Mesh
from hstu.training.checkpoint_files import first_line

FORMAT = 1
ITEMS = "__items"  # what the items are scored by, among the tables
_ROWS = 1 << 16  # looked up at once


def require_compiler() -> None:
    """Raise ``ValueError`` if there is no C++ compiler."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        raise ValueError(f"--compile: needs a C++ compiler, and there is no {compiler!r}; install one, name it in the "
                         "variable CXX, or leave --compile out")  # fmt: skip


def write_torch_export(opened: Opened, folder: Path, mesh: Mesh, *, compiled: bool) -> None:
    """Write into ``folder`` all that ``reader.py``, which is written beside it, needs to answer; all ranks call it.

    Raises:
        ValueError: for a model that ``torch.export`` cannot write a program of, and for a full disk.
    """
    features = _features(opened)

    def write() -> None:
        shutil.copy(Path(reader.__file__), folder / "reader.py")
        (folder / "vocabulary").mkdir()
        for number, feature in enumerate(features.values()):
            if feature["rows"]:
                feature["words"] = f"vocabulary/{number}.json"
                words = json.dumps(_words(opened, feature["name"], feature["kind"]), ensure_ascii=False, default=str)
                (folder / feature["words"]).write_text(words, encoding="utf-8")
        about = _about(opened) | {"features": features}
        (folder / "export.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _write_programs(opened, folder, compiled=compiled)

    try:
        with torch.no_grad():
            _write_tables(opened, folder / "tables.safetensors", features, mesh)
            mesh.on_main(write)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror or error}); choose another --output") from error


def _features(opened: Opened) -> dict[str, dict[str, Any]]:
    """Return what the model reads, in the order of a batch, by the columns of a log, for ``reader.py``."""
    schema, collate, columns = opened.dataset.schema, opened.loader.collate, history_columns(RequestSpec(), opened)
    action = schema.action if collate.use_actions else None
    names = [*collate.contexts, schema.item.name, *([action.name] if action else [])]
    names += [*collate.event_features, *collate.user_features]
    found = {}
    for feature in (next(own for own in schema.features if own.name == name) for name in names):
        column, asked = feature.name, "given" if feature.known_at_request else "missing"
        may_lack = feature.level == "event" or opened.config.feature.unknown_rate > 0
        if feature.role == "item":
            column, asked, may_lack = columns.item, "given", False
        elif feature.role == "action":
            column, asked = columns.action, "absent" if _asks_candidates(opened) else "first"
        size = (feature.vocab_size or 0) if feature.has_ids else 0
        unknown = size if size and may_lack and feature.kind != "multi" else None
        found[column] = {
            "name": feature.name,
            "level": "user" if feature.level == "user" else "event",
            "kind": feature.kind or "categorical",
            "asked": asked,
            "unknown": unknown,
            "rows": size + (unknown is not None),
            "width": feature.width or 1,
            "words": None,
        }
    return found


def _words(opened: Opened, name: str, kind: str) -> list[Any]:
    """Return what the ids of a feature stand for, of members that no set of training has None; of a mask the masks."""
    action = opened.dataset.schema.action
    if action is not None and name == action.name and action.action_type == "bitmask":
        return list(range(action.vocab_size or 0))
    words: list[Any] = opened.dataset.vocabulary(name).tolist()
    if kind == "multi" and (met := opened.assembly.met.get(name)) is not None:
        return [word if known else None for word, known in zip(words, met, strict=False)]
    return words


def _asks_candidates(opened: Opened) -> bool:
    """Whether what is asked about stands as candidates behind the history, rather than as its last event."""
    return opened.config.dataset.max_num_candidates > 0 or _scores_together(opened)


def _scores_together(opened: Opened) -> bool:
    return isinstance(opened.model, RankingModel) and scores_slates(opened.model)


def _about(opened: Opened) -> dict[str, Any]:
    config, schema, preprocess = opened.config, opened.dataset.schema, opened.model.preprocess
    blocks, columns = preprocess.blocks, history_columns(RequestSpec(), opened)
    return opened.about | {
        "format": FORMAT,
        "torch": torch.__version__,
        "item": columns.item,
        "time": columns.time if schema.time else None,
        "scores": list(score_names(opened)),
        "filter_seen": config.retrieval is not None and bool(config.retrieval.filter_seen),
        "start": config.dataset.history_start,
        "end": config.dataset.history_end,
        "max_history": config.dataset.max_history_seqlen,
        "asked_are_candidates": _asks_candidates(opened),
        "together": _scores_together(opened),
        "context_tokens": len(preprocess.contexts) + (blocks.num_tokens if blocks else 0),
        "tokens_per_event": preprocess.tokens_per_event,
    }


def _write_tables(opened: Opened, path: Path, features: dict[str, dict[str, Any]], mesh: Mesh) -> None:
    """Write the rows of each feature's ids, items as the one vector of each, and what items are scored by."""
    opened.model.eval()
    parts = {
        name: _parts(opened, own["name"], own["rows"], own["unknown"]) for name, own in features.items() if own["rows"]
    }
    sizes = {name: own["rows"] for name, own in features.items() if own["rows"]}
    if isinstance(opened.model, RetrievalModel):
        parts[ITEMS] = (vectors for _, vectors in item_vectors(opened.model, opened.loader, mesh))
        sizes[ITEMS] = opened.model.num_items
    header, end, first = {}, 0, {}
    for name in parts:
        first[name] = next(parts[name])
        shape = [sizes[name], first[name].shape[1]]
        begin, end = end, end + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned

    def write(content: bytes) -> None:
        with path.open("ab") as file:
            file.write(content)

    mesh.on_main(partial(write, len(text).to_bytes(8, "little") + text))
    for name in parts:
        for rows in chain([first[name]], parts[name]):
            mesh.on_main(partial(write, rows.float().cpu().contiguous().numpy().tobytes()))


def _parts(opened: Opened, name: str, rows: int, unknown: int | None) -> Iterator[Tensor]:
    """Yield the vectors of all ids of a feature, [n, width]; those that training never met have that of the unknown."""
    met = opened.assembly.met.get(name)
    for first in range(0, rows, _ROWS):
        ids = np.arange(first, min(first + _ROWS, rows))
        if met is not None and unknown is not None:
            ids = np.where(met[ids], ids, unknown)
        yield _look_up(opened, name, torch.from_numpy(ids).to(opened.assembly.mesh.device))


def _look_up(opened: Opened, name: str, ids: Tensor) -> Tensor:
    """Return the vectors of ``ids`` [n] of a feature, [n, width]."""
    model, loader, nobody = opened.model, opened.loader, np.empty(0, np.int64)
    batch = loader.collate(loader.dataset, loader.split, nobody, nobody, 0)
    names = [*batch.features.keys(), *([POOL] if isinstance(model, RetrievalModel) else [])]
    sizes = [ids.numel() * (own == name) for own in names]
    features = keyed_features(names, ids, torch.tensor(sizes, device=ids.device)[:, None], sizes)
    if model.item_encoder is None:
        return model.embeddings(features)[name]
    features = model.item_encoder.beside(features, 0)
    return model.item_encoder.merged(model.embeddings(features), features)[name]


class Program(nn.Module):
    """A model over rows that are looked up already, one output for each event that is asked about.

    Args:
        model: The model.
        names: Columns of a log -> features.
    """

    def __init__(self, model: RankingModel | RetrievalModel, names: dict[str, str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def _named(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.names[column]: own for column, own in inputs.items()}

    def forward(
        self,
        rows: dict[str, Tensor],
        lengths: dict[str, Tensor],
        sets: dict[str, Tensor],
        numbers: dict[str, Tensor],
        asked: Tensor,
        times: Tensor,
        candidates: Tensor,
        places: Tensor,
    ) -> Tensor:
        """Return what scores items, or predictions, [L, ..].

        Args:
            rows: [n, width] float32 of the ids of each feature.
            lengths: Ids of each sample, [B] int64.
            sets: Ids of each event where they are sets, [E] int64.
            numbers: As in ``Batch``.
            asked: [L] int64, the events whose rows answer.
            times: [E] int64 seconds.
            candidates: Of each sample, [B] int64.
            places: 0, 1, 2 .. at least as many as the tokens of the longest sample: of them only the number counts.
        """
        model, rows = self.model, self._named(rows)
        model.preprocess.max_tokens = places.shape[0]
        batch = Batch(
            features=cast(Any, _Rows(rows, self._named(lengths))),
            item=model.feature_tokens.item,
            label_events=asked,
            labels=asked,
            num_candidates=candidates,
            timestamps=times,
            users=candidates,
            sample_ids=candidates,
            step=0,
            numbers=self._named(numbers),
            set_lengths=self._named(sets),
        )
        request = model.scoring_request(batch)
        hidden = model.encode(rows, request)
        if isinstance(model, RankingModel):
            return model.predictions_of(hidden)
        return model.query_vectors(hidden)


class _Rows:
    """What a model asks of a keyed jagged tensor whose values are looked up already."""

    def __init__(self, rows: dict[str, Tensor], lengths: dict[str, Tensor]) -> None:
        self._rows, self._lengths = rows, lengths

    def keys(self) -> list[str]:
        return [*self._rows]

    def length_per_key(self) -> list[int]:
        return [own.shape[0] for own in self._rows.values()]

    def __getitem__(self, name: str) -> _Rows:
        return _Rows({name: self._rows[name]}, {name: self._lengths[name]})

    def lengths(self) -> Tensor:
        (own,) = self._lengths.values()
        return own


class Similarity(nn.Module):
    """The scores of queries [Q, ..] against items [n, ..], [Q, n]."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.similarity = model.similarity

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        """Score all of them at once."""
        if isinstance(self.similarity, MixtureOfLogits):
            return self.similarity.mix(queries, items[None])[0]
        return self.similarity.scores(queries, items)


def _plain_model(opened: Opened) -> RankingModel | RetrievalModel:
    """Return the model on the CPU without tables, whose items come with the one vector of each."""
    network = replace(opened.config.network, kernel_backend="auto")
    model = build_model(replace(opened.config, network=network), opened.dataset.schema, allocate_tables=False)
    trained = {name: value.cpu() for name, value in opened.model.state_dict().items()}
    wanted = model.state_dict().keys()
    model.load_state_dict({name: trained[name] for name in wanted})
    model.item_encoder = None
    model.values = lambda batch, stream, pool=None: model.feature_tokens.values(batch, stream)  # type: ignore[method-assign]
    return model.eval().requires_grad_(False)


def _write_programs(opened: Opened, folder: Path, *, compiled: bool) -> None:
    model, packing = _plain_model(opened), reader.Model(folder)
    programs: dict[str, tuple[nn.Module, dict[str, Any], dict[str, Any]]] = {}
    few, many = (_example(packing, sizes) for sizes in ((1,), (3, 2, 4)))
    names = {column: feature["name"] for column, feature in packing.features.items()}
    programs["dense"] = Program(model, names), many, few
    if isinstance(model, RetrievalModel):
        vectors = torch.from_numpy(packing.tables[ITEMS][:5].copy())
        queries = programs["dense"][0](**few)
        both = {"queries": queries.repeat(3, 1), "items": vectors}
        programs["similarity"] = Similarity(model), both, {"queries": queries, "items": vectors[:2]}
    for name, (module, example, other) in programs.items():
        what = f"NetworkArgs.backbone = {opened.config.network.backbone!r}: torch.export cannot write"
        dynamic = torch.utils._pytree.tree_map(lambda _: {0: torch.export.Dim.DYNAMIC}, example)
        try:
            program = torch.export.export(module, (), example, dynamic_shapes=dynamic)
            answer, expected = program.module()(**other), module(**other)
        except Exception as error:
            raise ValueError(
                f"{what} a program of it ({first_line(error)}); leave --format torch-export out"
            ) from error
        if not torch.allclose(answer.double(), expected.double(), rtol=1e-3, atol=1e-4):
            raise ValueError(f"{what} a program that answers for other lengths; leave --format torch-export out")
        torch.export.save(program, folder / f"{name}.pt2")
        if compiled:
            _compile(program, folder / f"{name}.aoti.pt2")


def _compile(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:
        raise ValueError(f"--compile: {path.name} cannot be compiled ({first_line(error)}); leave it out") from error


def _example(packing: Any, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Return the inputs of histories of so many events, made of the first values of each feature."""
    about, ids = packing.about, packing.ids

    def value(name: str, number: int) -> Any:
        feature, words = about["features"][name], [*ids.get(name, ())]
        if not words:
            return [float(number)] * feature["width"]
        return words[: 1 + number % 3] if feature["kind"] == "multi" else words[number % len(words)]

    samples = []
    for size in sizes:
        history = {about["time"]: [*range(size)]} if about["time"] else {}
        for name, feature in about["features"].items():
            is_event = feature["level"] == "event"
            history[name] = [value(name, number) for number in range(size)] if is_event else value(name, size)
        samples.append((history, {about["item"]: [value(about["item"], 0)]}))
    inputs: dict[str, Any] = packing.pack(samples, None)
    return inputs
