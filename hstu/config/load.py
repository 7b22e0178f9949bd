"""Gin files and bindings to a checked ``Config``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hstu.config import args
from hstu.config.backbones import CUSTOM_BACKBONES
from hstu.config.base import Args, ConfigError, brief
from hstu.config.features import CUSTOM_ENCODERS
from hstu.config.parse import Binding, read_bindings
from hstu.config.retrieval import CUSTOM_LOSSES
from hstu.config.sizing import SHAPE, UNKNOWN, DataSize, suggest

# A wheel has the configs inside the package; in a clone they stand beside it.
_INSIDE = Path(__file__).resolve().parents[1] / "configs"
CONFIG_DIRECTORY = _INSIDE if _INSIDE.is_dir() else _INSIDE.parents[1] / "configs"

_CLASSES: dict[str, type[Args]] = {
    "TrainerArgs": args.TrainerArgs,
    "DatasetArgs": args.DatasetArgs,
    "NetworkArgs": args.NetworkArgs,
    "OptimizerArgs": args.OptimizerArgs,
    "EmbeddingArgs": args.EmbeddingArgs,
    "DynamicEmbeddingArgs": args.DynamicEmbeddingArgs,
    "FeatureArgs": args.FeatureArgs,
    "ItemTextArgs": args.ItemTextArgs,
    "MemoryArgs": args.MemoryArgs,
    "ContextParallelArgs": args.ContextParallelArgs,
    "TensorModelParallelArgs": args.TensorModelParallelArgs,
    "RankingArgs": args.RankingArgs,
    "RetrievalArgs": args.RetrievalArgs,
}
_SIZED = "RetrievalArgs.sized_by_data"
_MEMBERS = {
    "TrainerArgs": "trainer",
    "DatasetArgs": "dataset",
    "NetworkArgs": "network",
    "OptimizerArgs": "optimizer",
    "EmbeddingArgs": "embedding",
    "DynamicEmbeddingArgs": "dynamic_embedding",
    "FeatureArgs": "feature",
    "ItemTextArgs": "item_text",
    "MemoryArgs": "memory",
    "ContextParallelArgs": "context_parallel",
    "TensorModelParallelArgs": "tensor_model_parallel",
    "RankingArgs": "ranking",
    "RetrievalArgs": "retrieval",
}

# Options of recsys-examples that its gin files carry, and what becomes of them here.
_RENAMED = {"DatasetArgs.max_sequence_length": "max_history_seqlen"}
_IGNORED = {
    "TrainerArgs.ckpt_save_dir": "checkpoints go to <run-dir>/checkpoints; choose it with --run-dir",
    "TrainerArgs.ckpt_load_dir": "load with --checkpoint PATH",
    "NetworkArgs.embedding_backend": "tables are TorchRec's",
    **dict.fromkeys(
        (
            f"DynamicEmbeddingArgs.{name}"
            for name in (
                "item_vocab_gpu_capacity",
                "item_vocab_gpu_capacity_ratio",
                "global_hbm_for_values",
                "caching",
                "feature_names",
                "sharding_type",
            )
        ),
        "DynamicEmbeddingArgs.capacity says how many rows there are, EmbeddingArgs where they lie",
    ),
    "NetworkArgs.disable_contextual_mask": "set NetworkArgs.context_attention instead",
}
_REPLACED_VALUES = {
    ("TrainerArgs.pipeline_type", "prefetch"): "native",
    ("NetworkArgs.kernel_backend", "cutlass"): "auto",
    ("DynamicEmbeddingArgs.evict_strategy", "LRU"): "lru",
    ("DynamicEmbeddingArgs.evict_strategy", "LFU"): "lfu",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A config with the texts that a run directory keeps.

    Attributes:
        config: The checked config.
        given: What the user gave, as gin (files merged, bindings applied).
        notes: One line for each option that was renamed, replaced or has no meaning here.
        imports: Modules that register what the config names.
        bound: What was given, by field, for :meth:`sized_by`.
    """

    config: args.Config
    given: str
    notes: tuple[str, ...]
    imports: tuple[str, ...] = ()
    bound: dict[str, Binding] = dataclasses.field(default_factory=dict, repr=False)

    def sized_by(self, size: DataSize, start: Mapping[str, Any] | None = None) -> LoadedConfig:
        """Return the config of ``RetrievalArgs.sized_by_data`` with what the size of the data decides.

        Args:
            size: The data set.
            start: ``Class.field`` -> value of a run to start from, whose ``SHAPE`` is kept.

        Raises:
            ConfigError: as :func:`load_config`, for values that do not go with those that are set.
        """
        values = _suggestions(self.bound, size, start or {})
        bound = self.bound | values | {_SIZED: Binding(False, _SIZED)}
        listed = ", ".join(f"{key} = {binding.value!r}" for key, binding in values.items())
        counts = f"{size.users:,} users, {size.items:,} items, {size.events:,} events"
        note = f"by the size of the data ({counts}): {listed or 'nothing, all is set'}"
        loaded = _load("retrieval", bound, bound, self.imports)
        return dataclasses.replace(loaded, notes=(*self.notes, note))

    @property
    def operative(self) -> str:
        """Every field of every class with the value that applies, as gin."""
        return _import_lines(self.imports) + operative_gin(self.config)


def find_config(name: str) -> Path:
    """Return the gin file ``name``: a path, or a name in the working directory or in ``configs/``.

    Raises:
        ConfigError: if there is none, listing the shipped ones.
    """
    for candidate in (Path(name), CONFIG_DIRECTORY / name, CONFIG_DIRECTORY / f"{name}.gin"):
        if candidate.is_file():
            return candidate.resolve()
    shipped = ", ".join(sorted(p.name for p in CONFIG_DIRECTORY.glob("*.gin")))
    raise ConfigError("--gin-config-file", f"= {name!r}: no such file; shipped configs: {shipped}")


def load_config(
    task: Literal["ranking", "retrieval"], files: Sequence[str] = (), bindings: Sequence[str] = ()
) -> LoadedConfig:
    """Read gin files, then bindings (which win), and build the config of ``task``.

    Args:
        task: Which entrypoint asks; the other task's args may be present and are noted as unused.
        files: Paths, or names under ``configs/``.
        bindings: Lines such as ``TrainerArgs.max_train_iters=100``.

    Raises:
        ConfigError: in one line that names the field, its value, what is accepted, and where it was set.
    """
    bound, imports = read_bindings([find_config(f) for f in files], bindings, tuple(_CLASSES), CONFIG_DIRECTORY)
    return _load(task, bound, _apply_reference_names(bound, notes := list[str]()), imports, notes)


def _load(
    task: Literal["ranking", "retrieval"],
    as_given: dict[str, Binding],
    bound: dict[str, Binding],
    imports: Sequence[str],
    notes: Sequence[str] = (),
) -> LoadedConfig:
    notes, built = list(notes), bound
    if task == "retrieval" and _SIZED in bound and bound[_SIZED].value is True:  # checked before its data are at hand
        built = bound | _suggestions(bound, UNKNOWN, {})
    try:
        config = _build(task, built, notes)
    except ConfigError as error:
        if error.field not in built:
            raise
        raise ConfigError(error.field, f"{error.message} (set in {built[error.field].where})") from None
    modules = tuple(dict.fromkeys([*imports, *_registering(config)]))
    given = _import_lines(modules) + _given(as_given)
    return LoadedConfig(config=config, given=given, notes=tuple(notes), imports=modules, bound=bound)


def _suggestions(bound: dict[str, Binding], size: DataSize, start: Mapping[str, Any]) -> dict[str, Binding]:
    """Return what the run to start from, and else the size of the data, decides of the fields that are not set."""
    start = {key: start[key] for key in SHAPE if key in start and key not in bound}
    values = suggest(size, start | {key: binding.value for key, binding in bound.items()}) | start
    return {key: Binding(value, f"what {_SIZED} chose") for key, value in values.items()}


def _registering(config: args.Config) -> list[str]:
    """Return the modules that registered what ``config`` names: whoever opens the run needs them too."""
    parts = [CUSTOM_BACKBONES.get(config.network.backbone)]
    parts += [CUSTOM_LOSSES.get(config.retrieval.loss)] if config.retrieval is not None else []
    parts += [CUSTOM_ENCODERS.get(name) for name in config.feature.encoders.values()]
    return [part.module for part in parts if part is not None and part.module is not None]


def _import_lines(modules: tuple[str, ...]) -> str:
    return "".join(f"import {module}\n" for module in modules) + ("\n" if modules else "")


def task_of(files: Sequence[str], bindings: Sequence[str] = ()) -> Literal["ranking", "retrieval"]:
    """Return the task whose args gin files and bindings set, included files too; retrieval needs none.

    Raises:
        ConfigError: if those of both are set, and for gin that cannot be read.
    """
    bound, _ = read_bindings([find_config(f) for f in files], bindings, tuple(_CLASSES), CONFIG_DIRECTORY)
    found = {key.split(".")[0] for key in bound} & {"RankingArgs", "RetrievalArgs"}
    if len(found) == 2:
        raise ConfigError("--task", "is required: RankingArgs and RetrievalArgs are both set")
    return "ranking" if "RankingArgs" in found else "retrieval"


def _given(bound: dict[str, Binding]) -> str:
    groups = [[f"{key} = {b.value!r}" for key, b in bound.items() if key.split(".")[0] == name] for name in _CLASSES]
    return "\n\n".join("\n".join(lines) for lines in groups if lines) + "\n"


def _apply_reference_names(bound: dict[str, Binding], notes: list[str]) -> dict[str, Binding]:
    """Translate the reference system's options, adding a line to ``notes`` for each."""
    bound = _apply_capacity(bound, notes)
    result: dict[str, Binding] = {}
    for key, binding in bound.items():
        value, owner = binding.value, key.split(".")[0]
        if key in _IGNORED:
            notes.append(f"{key} = {value!r} has no effect here: {_IGNORED[key]}")
            continue
        if key in _RENAMED:
            notes.append(f"{key} is read as {owner}.{_RENAMED[key]}")
            key = f"{owner}.{_RENAMED[key]}"
        elif isinstance(value, str) and (key, value) in _REPLACED_VALUES:
            binding = Binding(_REPLACED_VALUES[key, value], binding.where)
            notes.append(f"{key} = {value!r} is not available; {binding.value!r} is used")
        result[key] = binding  # of an old and a new name, the one that was set last wins
    return result


def _apply_capacity(bound: dict[str, Binding], notes: list[str]) -> dict[str, Binding]:
    """Translate the reference system's pair of a dynamic table's name and rows."""
    rows, table = (f"DynamicEmbeddingArgs.{name}" for name in ("item_vocab_size_or_capacity", "table_name"))
    pair = [bound[key] for key in (rows, table) if key in bound]
    if not pair:
        return bound
    if len(pair) < 2:
        raise ConfigError(rows if rows in bound else table, f"= {pair[0].value!r}: {rows} and {table} go together; use "
                          f"DynamicEmbeddingArgs.capacity = {{'table': rows}} (set in {pair[0].where})")  # fmt: skip
    capacity = {pair[1].value: pair[0].value}
    notes.append(f"{rows} and {table} are read as DynamicEmbeddingArgs.capacity = {capacity!r}")
    rest = {key: binding for key, binding in bound.items() if key not in (rows, table)}
    return rest | {"DynamicEmbeddingArgs.capacity": Binding(capacity, pair[0].where)}


def _build(task: str, bound: dict[str, Binding], notes: list[str]) -> args.Config:
    values: dict[str, dict[str, Any]] = {name: {} for name in _CLASSES}
    for key, binding in bound.items():
        owner, _, name = key.partition(".")
        values[owner][name] = binding.value
    other = "RetrievalArgs" if task == "ranking" else "RankingArgs"
    if values[other]:
        notes.append(f"{other} is not used by the {task} task")
    if task == "retrieval" and "RetrievalArgs.loss" in bound and bound["RetrievalArgs.loss"].value == "full_softmax":
        for key in ("RetrievalArgs.num_negatives", "RetrievalArgs.sampling_strategy"):
            if key in bound:
                notes.append(f"{key} has no effect: the full softmax takes every item")
    built = {_MEMBERS[name]: _construct(name, values[name]) for name in _CLASSES if name != other}
    return args.Config(**built)  # type: ignore[arg-type]


def _construct(name: str, fields: dict[str, Any]) -> Args:
    cls = _CLASSES[name]
    known = {field.name: field for field in dataclasses.fields(cls)}
    for unknown in fields.keys() - known.keys():
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"fields: {', '.join(known)}"
        raise ConfigError(f"{name}.{unknown}", f"= {brief(fields[unknown])}: no such field; {hint}")
    for field in known.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in fields:
            raise ConfigError(f"{name}.{field.name}", "is required and is not set")
    return cls(**fields)


def read_settings(path: Path) -> dict[str, str]:
    """Return ``Class.field`` -> value, as text, of a gin file, whoever its version of this library was."""
    lines = (line.partition(" = ") for line in path.read_text().splitlines())
    return {name: value for name, equals, value in lines if equals and "." in name}


def operative_gin(config: args.Config) -> str:
    """Return every field of every class with the value that applies, as gin."""
    lines = []
    for name, member in _MEMBERS.items():
        owner = getattr(config, member)
        if owner is not None:
            lines += [f"{name}.{f.name} = {getattr(owner, f.name)!r}" for f in dataclasses.fields(owner)] + [""]
    return "\n".join(lines)
