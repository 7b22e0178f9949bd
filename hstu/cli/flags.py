"""Flags spelled with hyphens or underscores."""

from __future__ import annotations


def underscore_flags(argv: list[str]) -> list[str]:
    """Return ``argv`` with ``--some-flag=x`` spelled ``--some_flag=x``; values and what follows ``--`` stay."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_underscore(word) for word in argv[:end]] + argv[end:]


def _underscore(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"
