"""Gin files and bindings to a checked ``Config``: the only place that imports gin."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import gin
from gin import config_parser

from hstu.config import args
from hstu.config.base import Args, ConfigError

CONFIG_DIRECTORY = Path(__file__).resolve().parents[2] / "configs"

_CLASSES: dict[str, type[Args]] = {
    "TrainerArgs": args.TrainerArgs,
    "DatasetArgs": args.DatasetArgs,
    "NetworkArgs": args.NetworkArgs,
    "OptimizerArgs": args.OptimizerArgs,
    "EmbeddingArgs": args.EmbeddingArgs,
    "TensorModelParallelArgs": args.TensorModelParallelArgs,
    "RankingArgs": args.RankingArgs,
    "RetrievalArgs": args.RetrievalArgs,
}
_MEMBERS = {
    "TrainerArgs": "trainer",
    "DatasetArgs": "dataset",
    "NetworkArgs": "network",
    "OptimizerArgs": "optimizer",
    "EmbeddingArgs": "embedding",
    "TensorModelParallelArgs": "tensor_model_parallel",
    "RankingArgs": "ranking",
    "RetrievalArgs": "retrieval",
}

# Options of recsys-examples that its gin files carry, and what becomes of them here.
_RENAMED = {"DatasetArgs.max_sequence_length": "max_history_seqlen"}
_IGNORED = {
    "TrainerArgs.pipeline_type": "batches are not pipelined; losses are the same",
    "TrainerArgs.ckpt_save_dir": "checkpoints go to <run-dir>/checkpoints; choose it with --run-dir",
    "TrainerArgs.ckpt_load_dir": "load with --checkpoint PATH",
    "TrainerArgs.enable_balanced_shuffler": "batches are dealt to ranks by count",
    "NetworkArgs.recompute_input_layernorm": "nothing is recomputed; results are the same",
    "NetworkArgs.recompute_input_silu": "nothing is recomputed; results are the same",
    "NetworkArgs.embedding_backend": "tables are TorchRec's",
    "NetworkArgs.disable_contextual_mask": "set NetworkArgs.context_attention instead",
}
_REPLACED_VALUES = {("NetworkArgs.kernel_backend", "cutlass"): "auto"}


def _register(name: str) -> Any:
    def collect(**fields: Any) -> dict[str, Any]:
        return fields

    return gin.external_configurable(collect, name=name, module="hstu")


_COLLECT = {name: _register(name) for name in _CLASSES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedConfig:
    """A config with the texts that a run directory keeps.

    Attributes:
        config: The checked config.
        given: What the user gave, as gin (files merged, bindings applied).
        operative: Every field of every class with the value that applies, as gin.
        notes: One line for each option that was renamed, replaced or has no meaning here.
    """

    config: args.Config
    given: str
    operative: str
    notes: tuple[str, ...]


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
    gin.clear_config()
    locations = _parse([find_config(f) for f in files], list(bindings))
    try:
        given = gin.config_str()
        values = {name: collect() for name, collect in _COLLECT.items()}
    except Exception as error:
        raise ConfigError("gin", f": {_first_line(error)}") from error
    finally:
        gin.clear_config()
    try:
        notes = _apply_reference_names(values, locations)
        config = _build(task, values, notes)
    except ConfigError as error:
        where = locations.get(error.field)
        raise ConfigError(str(error), f"(set in {where})") from None if where else error
    return LoadedConfig(config=config, given=given, operative=_operative(config), notes=tuple(notes))


def _parse(paths: list[Path], bindings: list[str]) -> dict[str, str]:
    """Parse everything into gin's state; return ``Class.field`` -> where it was set last."""
    locations: dict[str, str] = {}
    gin.config._LOCATION_PREFIXES[:] = ["", str(CONFIG_DIRECTORY), *{str(p.parent) for p in paths}]
    sources: list[Path | str] = [*paths, *bindings]
    for source in sources:
        try:
            if isinstance(source, Path):
                gin.parse_config_file(str(source), skip_unknown=False)
            else:
                gin.parse_config(source)
            locations.update(_locations(source))
        except Exception as error:
            where = source if isinstance(source, Path) else f"--gin-bindings {source!r}"
            raise ConfigError(str(where), f": {_explain(error)}") from None
    return locations


def _locations(source: Path | str) -> dict[str, str]:
    text = source.read_text() if isinstance(source, Path) else source
    found: dict[str, str] = {}
    for statement in config_parser.ConfigParser(text, gin.config.ParserDelegate()):
        if isinstance(statement, config_parser.BindingStatement) and statement.arg_name:
            where = f"{source}:{statement.location.line_num}" if isinstance(source, Path) else "--gin-bindings"
            found[f"{statement.selector.split('.')[-1]}.{statement.arg_name}"] = where
        elif isinstance(statement, config_parser.IncludeStatement) and isinstance(source, Path):
            for folder in (Path(), CONFIG_DIRECTORY, source.parent):
                if (folder / statement.filename).is_file():
                    found |= _locations(folder / statement.filename)
                    break
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].strip()


def _explain(error: BaseException) -> str:
    text = _first_line(error)
    if "No configurable matching" in text or "Couldn't find" in text:
        return f"{text} Known classes: {', '.join(_CLASSES)}."
    return text


def _apply_reference_names(values: dict[str, dict[str, Any]], locations: dict[str, str]) -> list[str]:
    """Translate the reference system's options in place; return a line for each."""
    notes = []
    for owner, fields in values.items():
        for name in list(fields):
            key = f"{owner}.{name}"
            if key in _RENAMED:
                new = _RENAMED[key]
                old = fields.pop(name)
                if new in fields:
                    notes.append(f"{key} = {old!r} is the old name of {owner}.{new}, which is also set and wins")
                    continue
                fields[new] = old
                locations[f"{owner}.{new}"] = locations.get(key, "")
                notes.append(f"{key} is read as {owner}.{new}")
            elif key in _IGNORED:
                notes.append(f"{key} = {fields.pop(name)!r} has no effect here: {_IGNORED[key]}")
            elif isinstance(fields[name], str) and (key, fields[name]) in _REPLACED_VALUES:
                new = _REPLACED_VALUES[key, fields[name]]
                notes.append(f"{key} = {fields[name]!r} is not available; {new!r} is used")
                fields[name] = new
    return notes


def _build(task: str, values: dict[str, dict[str, Any]], notes: list[str]) -> args.Config:
    other = "RetrievalArgs" if task == "ranking" else "RankingArgs"
    if values[other]:
        notes.append(f"{other} is not used by the {task} task")
    built = {_MEMBERS[name]: _construct(name, values[name]) for name in _CLASSES if name != other}
    return args.Config(**built)  # type: ignore[arg-type]


def _construct(name: str, fields: dict[str, Any]) -> Args:
    cls = _CLASSES[name]
    known = {field.name: field for field in dataclasses.fields(cls)}
    for unknown in fields.keys() - known.keys():
        close = difflib.get_close_matches(unknown, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"fields: {', '.join(known)}"
        raise ConfigError(f"{name}.{unknown}", f"= {fields[unknown]!r}: no such field; {hint}")
    for field in known.values():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in fields:
            raise ConfigError(f"{name}.{field.name}", "is required and is not set")
    return cls(**fields)


def _operative(config: args.Config) -> str:
    lines = []
    for name, member in _MEMBERS.items():
        owner = getattr(config, member)
        if owner is not None:
            lines += [f"{name}.{f.name} = {getattr(owner, f.name)!r}" for f in dataclasses.fields(owner)] + [""]
    return "\n".join(lines)
