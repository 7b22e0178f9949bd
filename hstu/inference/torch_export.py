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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hstu.data.batch import POOL, keyed_features
from hstu.data.schema import Feature
from hstu.inference import reader
from hstu.inference.opened import Opened
from hstu.inference.prediction_requests import RequestSpec, history_columns, score_names
from hstu.inference.programs import Program, Similarity
from hstu.inference.recommend import item_vectors
from hstu.models import RankingModel, RetrievalModel, build_model
from hstu.models.caching import scores_slates
from hstu.parallel import Mesh
from hstu.training.checkpoint_files import first_line

FORMAT = 2
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
    blocks, columns = opened.model.preprocess.blocks, _columns(opened)
    if blocks is not None and blocks.at_session:
        raise ValueError("DatasetArgs.sessions: where memory stands follows from sessions, which no program is "
                         "told; leave --format torch-export out")  # fmt: skip

    def write() -> None:
        shutil.copy(Path(reader.__file__), folder / "reader.py")
        words = {name: _words(opened, own) for name, own in columns.items() if own["rows"]}
        (folder / "words.json").write_text(json.dumps(words, ensure_ascii=False, default=str), encoding="utf-8")
        about = _about(opened, compiled=compiled) | {"columns": columns}
        (folder / "export.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        _write_programs(opened, folder, compiled=compiled)

    try:
        with torch.no_grad():
            _write_tables(opened, folder / "tables.safetensors", columns, mesh)
            mesh.on_main(write)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror or error}); choose another --output") from error


def _columns(opened: Opened) -> dict[str, dict[str, Any]]:
    """Return what the model reads, in the order of a batch, by the columns of a log, for ``reader.py``.

    Each is ``of`` events or the user. Its ``kind`` is "word", "set", "time", or how many numbers it has. What is asked
    about has it if it is ``given``, and else its ``default``.
    """
    schema, collate, log = opened.dataset.schema, opened.loader.collate, history_columns(RequestSpec(), opened)
    action = schema.action if collate.use_actions else None
    names = [*collate.contexts, schema.item.name, *([action.name] if action else [])]
    names += [*collate.event_features, *collate.user_features]
    found: dict[str, dict[str, Any]] = {}
    for feature in (next(own for own in schema.features if own.name == name) for name in names):
        ids = (feature.vocab_size or 0) if feature.has_ids else 0
        kind: str | int = (feature.width or 1) if not ids else "set" if feature.kind == "multi" else "word"
        own: dict[str, Any] = {
            "feature": feature.name,
            "of": "user" if feature.level == "user" else "event",
            "kind": kind,
        }
        own |= {"given": feature.known_at_request, "default": None, "rows": ids}
        may_lack = feature.level == "event" or opened.config.feature.unknown_rate > 0
        if feature.role == "item":
            found[log.item] = own | {"given": True}
        elif action is not None and feature.role == "action":  # the model looks at none of what is asked about
            found[log.action] = own | {"given": False, "default": _originals(opened, action)[0]}
        else:
            found[feature.name] = own | {"rows": ids + (kind == "word" and may_lack)}
    if schema.time:
        found[log.time] = {"feature": schema.time.name, "of": "event", "kind": "time", "given": True, "rows": 0}
    return found


def _originals(opened: Opened, feature: Feature) -> list[Any]:
    """Return what the ids of a feature stand for; those of a mask are the masks themselves."""
    if feature.action_type == "bitmask":
        return list(range(feature.vocab_size or 0))
    originals: list[Any] = opened.dataset.vocabulary(feature.name).tolist()
    return originals


def _words(opened: Opened, column: dict[str, Any]) -> list[Any]:
    """Return what the rows of a column stand for; None is what is missing or not known."""
    feature = next(own for own in opened.dataset.schema.features if own.name == column["feature"])
    words, met = _originals(opened, feature), _met(opened, feature.name)
    if column["kind"] == "set" and met is not None:
        words = [word if known else None for word, known in zip(words, met, strict=False)]
    return words + [None] * (column["rows"] - len(words))


def _met(opened: Opened, name: str) -> np.ndarray | None:
    """Return which ids of a feature training met, where others are read as missing; None: all of them."""
    collate = opened.loader.collate
    return collate.met.get(name, collate.met_values.get(name))


def _asks_candidates(opened: Opened) -> bool:
    """Whether what is asked about stands as candidates behind the history, rather than as its last event."""
    return opened.config.dataset.max_num_candidates > 0 or _scores_together(opened)


def _scores_together(opened: Opened) -> bool:
    return isinstance(opened.model, RankingModel) and scores_slates(opened.model)


def _about(opened: Opened, *, compiled: bool) -> dict[str, Any]:
    config, log = opened.config, history_columns(RequestSpec(), opened)
    names = ("dense", "similarity") if isinstance(opened.model, RetrievalModel) else ("dense",)
    return opened.about | {
        "format": FORMAT,
        "torch": torch.__version__,
        "programs": {name: f"{name}.aoti.pt2" if compiled else f"{name}.pt2" for name in names},
        "compiled": compiled,
        "item": log.item,
        "time": log.time if opened.dataset.schema.time else None,
        "scores": list(score_names(opened)),
        "filter_seen": config.retrieval is not None and bool(config.retrieval.filter_seen),
        "start": config.dataset.history_start,
        "stop": config.dataset.history_end,
        "most": config.dataset.max_history_seqlen,
        "together": _scores_together(opened),
    }


def _write_tables(opened: Opened, path: Path, columns: dict[str, dict[str, Any]], mesh: Mesh) -> None:
    """Write the rows of each column's ids, items as the one vector of each, and what items are scored by."""
    opened.model.eval()
    parts = {name: _parts(opened, own["feature"], own["rows"]) for name, own in columns.items() if own["rows"]}
    sizes = {name: own["rows"] for name, own in columns.items() if own["rows"]}
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


def _parts(opened: Opened, name: str, rows: int) -> Iterator[Tensor]:
    """Yield the vectors of all ids of a feature, [n, width]; those that training never met have that of the unknown."""
    met = _met(opened, name)
    for first in range(0, rows, _ROWS):
        ids = np.arange(first, min(first + _ROWS, rows))
        if met is not None and rows == len(met):
            ids = np.where(met[ids], ids, rows - 1)
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
    model, packing = _plain_model(opened), _Packing(folder)
    programs: dict[str, tuple[nn.Module, dict[str, Any], dict[str, Any]]] = {}
    few, many = (packing.example(sizes) for sizes in ((1,), (3, 2, 4)))
    dense = Program(model, packing.about["columns"], asks_candidates=_asks_candidates(opened))
    programs["dense"] = dense, many, few
    if isinstance(model, RetrievalModel):
        vectors, queries = packing.tables[ITEMS], dense(**few)
        both = {"queries": queries.repeat(3, 1), "items": vectors[:5]}
        programs["similarity"] = Similarity(model), both, {"queries": queries, "items": vectors[:1]}
    for name, (module, example, other) in programs.items():
        what = f"NetworkArgs.backbone = {opened.config.network.backbone!r}: torch.export cannot write"
        dynamic = {key: torch.utils._pytree.tree_map(lambda _: {0: torch.export.Dim.DYNAMIC}, own)
                   if key != "tables" else dict.fromkeys(own) for key, own in example.items()}  # fmt: skip
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


class _Packing(reader.Model):
    """The reader before there are programs: it makes their example inputs."""

    def load(self, path: str) -> None:
        """Nothing is there to load."""

    def example(self, sizes: tuple[int, ...]) -> dict[str, Any]:
        """Return the inputs of histories of so many events, made of the first values of each column."""
        packed = [self._packed(size) for size in sizes]
        first = np.cumsum([0, *(own["lengths"].item() for own in packed)])
        found = {name: torch.cat([own[name] for own in packed]) for name in ("lengths", "candidates")}
        for name in ("past", "asked"):
            found[name] = torch.cat([own[name] + int(start) for own, start in zip(packed, first, strict=False)])
        columns = {name: [torch.cat(parts) for parts in zip(*(own["columns"][name] for own in packed), strict=True)]
                   for name in self.about["columns"]}  # fmt: skip
        longest = torch.arange(int(found["lengths"].max()))
        return {"tables": self.tables, "columns": columns, "longest": longest} | found

    def _packed(self, size: int) -> dict[str, Any]:
        history = {}
        for name, own in self.about["columns"].items():
            values = [self._value(name, own["kind"], number) for number in range(size)]
            history[name] = values if own["of"] == "event" else values[-1]
        return self.pack(history, {self.about["item"]: self.words[self.about["item"]][:1]})

    def _value(self, name: str, kind: str | int, number: int) -> Any:
        if not isinstance(kind, str):
            return [float(number)] * kind
        words = [word for word in self.words.get(name, ()) if word is not None]
        return number if kind == "time" else words[: 1 + number % 3] if kind == "set" else words[number % len(words)]
