"""Flags spelled with hyphens or underscores."""

from __future__ import annotations


def underscore_flags(argv: list[str]) -> list[str]:
    """Return ``argv`` with ``--some-flag=x`` spelled ``--some_flag=x``; values and what follows ``--`` stay."""
    out, rest = argv, []
    if "--" in argv:
        out, rest = argv[: argv.index("--")], argv[argv.index("--") :]
    fixed = []
    for word in out:
        name, equals, value = word.partition("=")
        fixed.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word)
    return fixed + rest
