"""The base of every config class: typed, frozen, keyword-only, and checked when it is made."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, ClassVar

_LONGEST = 300  # characters of a value in an error message
STEPS = 10**9 - 1
"""The most steps: the names of checkpoints have nine digits."""

UNSET: Any = None
"""Default of a field that takes its value from others in ``resolve``; None stays where the field has no use."""


class ConfigError(ValueError):
    """A config field has a name, type, value or combination that cannot be used.

    Attributes:
        field: ``Class.field`` the message is about, for callers that know where it was set.
        message: What is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}{message}" if message.startswith(":") else f"{field} {message}")
        self.field, self.message = field, message

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, str]]:
        return type(self), (self.field, self.message)  # it travels from rank 0 to the others


def _coerce(annotation: Any, value: Any) -> Any:
    """Return ``value`` as ``annotation``, or raise ``TypeError`` with what was expected."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(option, value)
            except TypeError:
                continue
        raise TypeError(describe(annotation))
    if origin is typing.Literal:
        if value in arguments and isinstance(value, str):
            return value
        raise TypeError(describe(annotation))
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(arguments[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {_coerce(arguments[0], k): _coerce(arguments[1], v) for k, v in value.items()}
    if annotation is type(None) and value is None:
        return None
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer of hundreds of digits
            pass
        raise TypeError("a finite number")
    if annotation in (int, str, bool) and type(value) is annotation:
        return value
    raise TypeError(describe(annotation))


def brief(value: Any) -> str:
    """Return ``repr`` of a value, shortened when it does not fit into a line."""
    try:
        text = repr(value)
    except ValueError:  # the interpreter writes no integer of so many digits
        text = hex(value) if isinstance(value, int) else "numbers of thousands of digits"
    return shortened(text)


def shortened(text: str) -> str:
    """Return the beginning of a text that does not fit into a line."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}... ({len(text):,} characters)"


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers in a field's value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(tuple(value.values()))


def describe(annotation: Any) -> str:
    """Return in words what a field with this annotation may hold."""
    names = {int: "an integer", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    if annotation in names:
        return names[annotation]
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"a list, each item {describe(typing.get_args(annotation)[0])}"
    key, value = typing.get_args(annotation)
    return f"a dict of {describe(key)} to {describe(value)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """Checks field types on construction, then calls ``resolve`` and ``validate``.

    Afterwards a field holds the value that applies, also where it was not set.

    A list becomes a tuple and an integer may stand for a float; nothing else is converted: a string
    in place of a number is an error.

    Attributes:
        limits: The least and the largest value of each number, of lists and dicts of their numbers: wider than what
            anybody needs, and before what hangs or overflows.

    Raises:
        ConfigError: naming the field, the value and what is accepted.
    """

    limits: ClassVar[dict[str, tuple[float, float]]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is UNSET:
                continue
            try:
                object.__setattr__(self, field.name, _coerce(hints[field.name], value))
            except TypeError as expected:
                optional = " or None" if field.default is UNSET and "None" not in str(expected) else ""
                raise self.error(field.name, f"must be {expected}{optional}") from None
        for name, (low, high) in self.limits.items():
            for value in _numbers(getattr(self, name)):
                if not low <= value <= high:
                    raise self.error(name, f"must be at least {low:,} and at most {high:,}")
        self.resolve()
        self.validate()

    def resolve(self) -> None:
        """Give fields that are not set the value that applies; subclasses override."""

    def default(self, **values: Any) -> None:
        """Set those of the fields that are not set."""
        for field, value in values.items():
            if getattr(self, field) == self.__dataclass_fields__[field].default:
                object.__setattr__(self, field, value)

    def validate(self) -> None:
        """Check combinations, and ranges that are no ``limits``; subclasses override."""

    def error(self, field: str, message: str) -> ConfigError:
        """Build the error for ``field``: ``Class.field = value: message``."""
        return ConfigError(f"{type(self).__name__}.{field}", f"= {brief(getattr(self, field))}: {message}")

    def require_positive(self, *fields: str) -> None:
        """Raise unless each of ``fields`` that is set is above zero."""
        for field in fields:
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise self.error(field, "must be above zero")

    def require_range(self, field: str, low: float, high: float) -> None:
        """Raise unless ``low <= field < high``."""
        value = getattr(self, field)
        if value is not None and not low <= value < high:
            raise self.error(field, f"must be at least {low} and below {high}")
