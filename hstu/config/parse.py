"""Gin text to values: gin reads the language; every error says file, line and remedy."""

from __future__ import annotations

import difflib
import io
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gin import config_parser

from hstu.config.base import ConfigError, brief, shortened
from hstu.registry import import_by_name

_DEEPEST = 50  # includes in one another
BINDINGS_FLAG = "--gin-bindings"


@dataclass(frozen=True)
class Binding:
    """A value, and the file and line (or the flag) that set it."""

    value: Any
    where: str


@dataclass(frozen=True)
class _Macro:
    name: str


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        raise SyntaxError(f"references such as @{scoped_configurable_name} mean nothing here")

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


def read_bindings(
    paths: Sequence[Path], bindings: Sequence[str], classes: Sequence[str], include_from: Path
) -> tuple[dict[str, Binding], tuple[str, ...]]:
    """Read gin files, then ``bindings``; the last one to set a field wins.

    Args:
        paths: Gin files.
        bindings: Lines such as ``TrainerArgs.seed=1``.
        classes: Names that a field may belong to.
        include_from: Where included files are looked for, after the including file's and the working directory.

    Returns:
        ``Class.field`` -> binding, in the order in which they were set last; and the modules that were imported.

    Raises:
        ConfigError: in one line.
    """
    fields: dict[str, Binding] = {}
    imports: dict[str, None] = {}
    macros: dict[str, Binding] = {}
    statements = [s for path in paths for s in _expanded(_read(path), path, include_from, (path,))]
    statements += [s for text in bindings for s in _expanded(text, None, include_from, ())]
    for statement, where in statements:
        if isinstance(statement, config_parser.BindingStatement):
            key = _key(statement, where, classes)
            target = fields if "." in key else macros
            target.pop(key, None)
            target[key] = Binding(statement.value, where)
        elif isinstance(statement, config_parser.ImportStatement):
            imports[statement.module] = None
            try:
                import_by_name(statement.module)
            except ValueError as error:
                raise ConfigError(where, f": {error}") from error
        elif not isinstance(statement, config_parser.BlockDeclaration):
            raise ConfigError(where, ": only fields, macros, includes and imports mean something here")
    used: set[str] = set()
    fields = {key: Binding(_resolved(key, b.value, b, macros, used), b.where) for key, b in fields.items()}
    for name, macro in macros.items():
        if name not in used:
            raise ConfigError(name, f"= {brief(macro.value)}: names no class and nothing uses %{name}; "
                              f"write Class.{name} (set in {macro.where})")  # fmt: skip
    return fields, tuple(imports)


def _key(statement: config_parser.BindingStatement, where: str, classes: Sequence[str]) -> str:
    """Return ``Class.field``, or the name of a macro."""
    owner, name = statement.selector, statement.arg_name
    if statement.scope:
        raise ConfigError(f"{statement.scope}/{owner}", f": scopes mean nothing here (set in {where})")
    if not name:
        return str(owner)
    if owner not in classes:
        close = difflib.get_close_matches(owner, classes, n=1)
        hint = f"did you mean {close[0]}?" if close else f"classes: {', '.join(classes)}"
        raise ConfigError(f"{owner}.{name}", f"= {brief(statement.value)}: no such class; {hint} (set in {where})")
    return f"{owner}.{name}"


def _resolved(key: str, value: Any, binding: Binding, macros: dict[str, Binding], used: set[str]) -> Any:
    """Return ``value`` with macros replaced by what they stand for."""
    if isinstance(value, _Macro):
        if value.name not in macros or isinstance(macros[value.name].value, _Macro):
            raise ConfigError(key, f"= %{value.name}: no line sets {value.name} to a value (set in {binding.where})")
        used.add(value.name)
        return macros[value.name].value
    if isinstance(value, (list, tuple)):
        return type(value)(_resolved(key, item, binding, macros, used) for item in value)
    if isinstance(value, dict):
        return {k: _resolved(key, item, binding, macros, used) for k, item in value.items()}
    return value


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f": cannot be read as text ({error})") from None


def _expanded(text: str, path: Path | None, include_from: Path, within: tuple[Path, ...]) -> Iterator[tuple[Any, str]]:
    """Yield the statements of ``text``, which stands in ``path``, with those of included files in place."""
    for statement, where in _statements(text, path):
        if not isinstance(statement, config_parser.IncludeStatement):
            yield statement, where
            continue
        folders = [path.parent] if path is not None else []
        places = [folder / statement.filename for folder in (*folders, Path.cwd(), include_from)]
        found = next((place.resolve() for place in places if place.is_file()), None)
        if found is None:
            tried = ", ".join(dict.fromkeys(str(place) for place in places))
            raise ConfigError(where, f": include {statement.filename!r}: no such file; tried {tried}")
        if found in within:
            raise ConfigError(where, f": include {statement.filename!r}: includes itself")
        if len(within) >= _DEEPEST:
            raise ConfigError(where, f": include {statement.filename!r}: stands in {_DEEPEST} files that include one "
                              "another; put them into fewer")  # fmt: skip
        yield from _expanded(_read(found), found, include_from, (*within, found))


def _statements(text: str, path: Path | None) -> Iterator[tuple[Any, str]]:
    """Yield the statements of ``text`` and where each stands."""
    reader = io.StringIO(text)
    lines_read = 0

    def next_line() -> str:
        nonlocal lines_read
        lines_read += 1
        return reader.readline()

    try:
        for statement in config_parser.ConfigParser(SimpleNamespace(readline=next_line), _Delegate()):
            yield statement, BINDINGS_FLAG if path is None else f"{path}:{statement.location.line_num}"
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or lines_read
        where = f"{BINDINGS_FLAG} {brief(text)}" if path is None else f"{path}:{line}"
        raise ConfigError(where, f": {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, (RecursionError, MemoryError)):
        return "brackets stand too deep in one another"
    message = str(getattr(error, "msg", None) or error.args[0])
    if isinstance(error, tokenize.TokenError):
        return "a bracket or quote is not closed"
    first, _, token = message.partition("Failed to parse token ")
    if token:
        return f"cannot read the value {shortened(token)}; strings stand in quotes: Class.field = 'text'"
    return f"{first.strip().splitlines()[0].rstrip('.')}; a line looks like Class.field = value"
