"""Print a constraint for each dependency of pyproject.toml: the lowest version that it allows."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
    name, lowest = re.match(r"([\w-]+)>=([\d.]+)", line).groups()
    print(f"{name}=={lowest}")
