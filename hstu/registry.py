"""Parts of a user's own, under names: backbones, losses, encoders, readers. Whoever owns a kind keeps its registry."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Registered:
    """A part under a name.

    Attributes:
        make: What was registered.
        module: Where, to be imported again by whoever opens the run; None if no import finds it.
        traits: What was said of it.
    """

    make: Callable[..., Any]
    module: str | None
    traits: dict[str, Any]


class Registry:
    """Parts of one kind.

    Args:
        kind: What messages call one.
        taken: Names of those that are shipped.
    """

    def __init__(self, kind: str, taken: Iterable[str]) -> None:
        self.kind, self.taken = kind, frozenset(taken)
        self._parts: dict[str, Registered] = {}

    def add(self, name: str, **traits: Any) -> Callable[[T], T]:
        """Return a decorator that registers what it is put on; a cell of a notebook may run again.

        Raises:
            ValueError: for a name that is no word, is taken, or is another module's.
        """
        if not name.isidentifier():
            raise ValueError(f"{self.kind} {name!r}: a name is made of letters, digits and underscores")
        if name in self.taken:
            raise ValueError(f"{self.kind} {name!r}: is the name of a shipped one; choose another")

        def register(make: T) -> T:
            if not callable(make):
                raise ValueError(f"{self.kind} {name!r}: is a {type(make).__name__}, which cannot be called")
            module, known = getattr(make, "__module__", "__main__"), self._parts.get(name)
            if known is not None and known.make.__module__ != module:
                raise ValueError(
                    f"{self.kind} {name!r}: is registered by {known.make.__module__} too; choose another name"
                )
            self._parts[name] = Registered(make, None if module == "__main__" else module, traits)
            return make

        return register

    def get(self, name: str) -> Registered | None:
        """Return the part that goes by ``name``, if one does."""
        return self._parts.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the registered ones."""
        return tuple(sorted(self._parts))


def import_by_name(module: str) -> None:
    """Import a module, which may lie in the working directory, for what it registers.

    Raises:
        ValueError: in one line, if there is none or it fails.
    """
    try:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}.") or os.getcwd() in sys.path:
                raise
            sys.path.append(os.getcwd())  # behind everything that is installed
            importlib.invalidate_caches()
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = "" if error.name != module else f"; it is looked for in {os.getcwd()} and where Python looks"
        raise ValueError(f"import {module}: {error}{where}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"import {module}: failed with {type(error).__name__}: {reason}") from error
