"""Print a constraint for each dependency of pyproject.toml: the lowest version that it allows."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
    if line.startswith(f"{project['name']}["):  # an extra that is made of others
        continue
    found = re.match(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", line)
    if not found:
        raise SystemExit(f"pyproject.toml: {line!r} says no lowest version: write NAME>=VERSION")
    print("==".join(found.groups()))
