"""Hooks of mkdocs (see mkdocs.yml): pages made of what stands elsewhere, links out of docs/, and formulas.

README, CONTRIBUTING and CHANGELOG are pages. The configuration page gets a table of each config dataclass, the
commands page the help of each command. A file outside docs/ that a page links to is copied to the site.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import importlib
import inspect
import io
import os
import pkgutil
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any
from unittest import mock

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\(([^)\s#]+)(#[^)\s]*)?\)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
GENERATED = re.compile(r"<!-- (fields|commands) -->.*<!-- /\1 -->", re.DOTALL)  # for those who read the file itself
ROLE = re.compile(r":(?:meth|func|class|attr|mod):(?=<code>)")
FIELD = re.compile(r'(?<!">)<code>(\w+Args)\.(\w+)( = [^<]*)?</code>')


def on_config(config: MkDocsConfig) -> None:
    """Import the package of this clone, installed or not."""
    sys.path.insert(0, str(ROOT))


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that stand outside docs/ and the files that pages link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page_file = waiting.pop()
        for _, target, _ in LINK.findall(page_file.content_string):
            path = _target(page_file.src_uri, target)
            if path is None or not path.is_file() or (uri := _uri(path)) in files.src_uris:
                continue
            files.append(File.generated(config, uri, abs_src_path=str(path)))
            if path.suffix == ".md":
                waiting.append(files.src_uris[uri])
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and let links out of docs/ lead to the copies in the site."""
    here = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        if (path := _target(here, target)) is None:
            return match[0]
        if path.is_dir():
            return text[1:-1]
        return f"{text}({os.path.relpath(_uri(path), Path(here).parent)}{anchor or ''})"

    markdown = LINK.sub(link, markdown)
    return GENERATED.sub(lambda match: {"fields": fields_text, "commands": commands_text}[match[1]](), markdown)


def on_page_content(content: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make MathML of formulas, and links to the configuration page of fields that a page names."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    reference = files.src_uris["configuration.md"].url_relative_to(page.file)

    def field(match: re.Match[str]) -> str:
        owner, name, _ = match.groups()
        known = config_classes()
        if owner not in known or name not in {field.name for field in dataclasses.fields(known[owner])}:
            if page.file.src_uri == PAGES["CHANGELOG.md"]:  # which names what has gone
                return match[0]
            raise PluginError(f"{page.file.src_uri}: there is no field {owner}.{name}")
        return f'<a href="{reference}#{owner}.{name}">{match[0]}</a>'

    return FIELD.sub(field, ROLE.sub("", MATH.sub(formula, content)))


def _target(page: str, link: str) -> Path | None:
    """Return the file that a link of a page leads to; None for another site."""
    if "://" in link or link.startswith("mailto:"):
        return None
    source = next((name for name, generated in PAGES.items() if generated == page), f"docs/{page}")
    return (ROOT / source.removeprefix("docs/source/")).parent.joinpath(link).resolve()


def _uri(path: Path) -> str:
    """Return where a file of the repository stands among the files of the site."""
    name = path.relative_to(ROOT).as_posix()
    return PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"source/{name}")


def config_classes() -> dict[str, type]:
    """Return the config dataclasses by name, in the order in which a reader needs them."""
    from hstu.config import Config

    classes = typing.get_type_hints(Config).values()
    return {cls.__name__: cls for hint in classes for cls in (hint, *typing.get_args(hint)) if inspect.isclass(cls)
            and cls is not type(None) and dataclasses.is_dataclass(cls)}  # fmt: skip


def comments(cls: type) -> dict[str, str]:
    """Return the ``#:`` comment above each field of a class; a field without one has none."""
    found, lines = {}, []
    for line in inspect.getsource(cls).splitlines():
        text = line.strip()
        if text.startswith("#:"):
            lines.append(text[2:].strip())
        elif match := re.match(r"    (\w+): ", line):
            found[match[1]] = " ".join(lines)
            lines = []
        elif text:
            lines = []
    return found


def fields_text() -> str:
    """Return a section for each config class: its docstring, and a table of its fields."""
    from hstu.config.base import describe

    parts = []
    for name, cls in config_classes().items():
        hints, notes = typing.get_type_hints(cls), comments(cls)
        rows = ["| field | value | default | what |", "|---|---|---|---|"]
        for field in dataclasses.fields(cls):
            kind, limits = describe(hints[field.name]), cls.limits.get(field.name)
            cells = [
                kind + (f", {limits[0]:,} to {limits[1]:,}" if limits else ""),
                _default(field),
                notes[field.name],
            ]
            head = f'<span id="{name}.{field.name}">`{field.name}`</span>'
            rows.append(f"| {head} | {' | '.join(_cell(cell) for cell in cells)} |")
        parts.append(f"## {name}\n\n{_markdown(inspect.getdoc(cls) or '')}\n\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _default(field: dataclasses.Field[Any]) -> str:
    from hstu.config.base import UNSET

    if field.default is not dataclasses.MISSING:
        return "follows" if field.default is UNSET and "None" not in str(field.type) else f"`{field.default!r}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "to be set"


def _cell(text: str) -> str:
    return _markdown(text).replace("|", "\\|")


def _markdown(text: str) -> str:
    """Return text of a docstring or comment as Markdown."""
    text = re.sub(r"(?<![`(<])(https?://[^\s)>,;]*[^\s)>,;.:])", r"<\1>", text.replace("``", "`"))
    return re.sub(r"(?<!`)\b\w+Args\.\w+\b(?!`)", lambda match: f"`{match[0]}`", text)


#: Commands whose flags are absl's, which stand in one place for a whole process.
SCRIPTS = {"preprocess": "preprocessing/preprocessor.py", "train": "examples/pretrain_gr_retrieval.py"}


def commands_text() -> str:
    """Return the help of each command."""
    return "\n\n".join(f"## {name}\n\n```text\n{help_of(name)}\n```" for name in command_names())


def command_names() -> list[str]:
    """Return the modules of hstu.cli that are commands."""
    import hstu.cli

    names = [module.name for module in pkgutil.iter_modules(hstu.cli.__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"hstu.cli.{name}"), "main")]


@functools.cache
def help_of(command: str) -> str:
    """Return what --help of a command prints."""
    if command in SCRIPTS:
        words = [sys.executable, str(ROOT / SCRIPTS[command]), "--help"]
        lines = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
        # absl names the module of the flags, and itself.
        kept = [line for line in lines if not line.startswith("/") and "--helpfull" not in line]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    out = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(f"hstu.cli.{command}").main(["--help"])
    return out.getvalue().strip()
