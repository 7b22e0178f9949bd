"""Flags spelled with hyphens or underscores, each given once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from hstu.registry import import_by_name


def underscore_flags(argv: list[str]) -> list[str]:
    """Return ``argv`` with ``--some-flag=x`` spelled ``--some_flag=x``; values and what follows ``--`` stay."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_underscore(word) for word in argv[:end]] + argv[end:]


def _underscore(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def refuse_repeats(values: flags.FlagValues, beside: str) -> None:
    """Let each absl flag of the module that defined the flag ``beside`` be given once, unless it collects."""
    for flag in values.flags_by_module_dict()[values.find_module_defining_flag(beside) or ""]:
        flag.allow_overwrite = isinstance(flag, flags.MultiFlag)


def show_in_help(values: flags.FlagValues, module: str, about: str | None) -> None:
    """Let --help of the running script show ``about`` and the absl flags of ``module``."""
    sys.modules["__main__"].__doc__ = about
    for flag in values.flags_by_module_dict().get(module, ()):
        values.register_key_flag_for_module(sys.argv[0], flag)


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Define ``--import``, whose modules register parts of a user's own."""
    help_text = "module that registers a backbone, a loss or a reader of your own; repeatable"
    parser.add_argument("--import", action="append", default=[], dest="imports", metavar="MODULE", help=help_text)


def import_modules(modules: Sequence[str]) -> None:
    """Import the modules of ``--import``.

    Raises:
        ValueError: in one line, if one cannot be imported.
    """
    for module in modules:
        import_by_name(module)


class _Once(argparse.Action):
    """Stores a value; the flag given again is a mistake, whichever value was meant."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given = namespace.__dict__.setdefault("given", set())
        if option_string is not None and self.dest in given:
            parser.error(f"argument {option_string}: is given twice; give it once")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A parser that refuses a flag given twice, unless it collects (``action="append"``)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found = super().parse_args(args, namespace)
        found.__dict__.pop("given", None)
        return found
