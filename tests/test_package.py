"""The wheel, installed where there is no clone: commands, configs by name, types, and the version."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import hstu
from tests.launch import ENVIRONMENT, ROOT

COMMANDS = ("hstu-preprocess", "hstu-train-ranking", "hstu-train-retrieval")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(command, cwd=source, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_what_the_wheel_holds(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"hstu/configs/{path.name}" for path in (ROOT / "configs").glob("*.gin")}
    assert shipped <= names and len(shipped) > 20 and "hstu/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hstu").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}, "all of the package and nothing else"
    assert f"hstu-{hstu.__version__}-py3-none-any.whl" == wheel.name


@pytest.mark.slow
def test_the_wheel_works_where_there_is_no_clone(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, on top of the libraries of this one."""
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    (site,) = (place / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    others = [path for path in sys.path if path.endswith("site-packages")]
    # This environment may hold an editable install of the clone, whose finder is left out with the .pth files.
    (site / "libraries.pth").write_text("".join(f"import sys; sys.path.append({path!r})\n" for path in others))
    (entries,) = site.glob("hstu-*.dist-info/entry_points.txt")
    scripts = dict(re.findall(r"^(\S+) = (\S+)$", entries.read_text(), re.MULTILINE))
    assert set(scripts) == set(COMMANDS)
    for name, target in scripts.items():  # what an installer makes of it
        module, function = target.split(":")
        (place / "bin" / name).write_text(f"#!{place}/bin/python\nimport sys\nfrom {module} import {function}\n"
                                          f"sys.exit({function}())\n")  # fmt: skip
        (place / "bin" / name).chmod(0o755)

    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}

    def call(*words: str, code: int = 0) -> str:
        command = [str(place / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{words}: {done.stdout[-1000:]} {done.stderr[-2000:]}"
        return done.stdout

    where = call("python", "-c", "import hstu, hstu.config as c; print(hstu.__file__, c.find_config('custom_ranking'))")
    assert [Path(path).is_relative_to(site.resolve()) for path in where.split()] == [True, True]
    help_text = call("hstu-preprocess", "--help", code=1)  # absl's
    assert "--dataset_name" in help_text and "hstu-preprocess --dataset_name NAME" in help_text
    call("hstu-preprocess", "--dataset_name", "synthetic", "--num_users", "60")
    short = ("--gin-bindings", "TrainerArgs.max_train_iters=2", "--gin-bindings", "TrainerArgs.train_batch_size=16")
    for task in ("ranking", "retrieval"):
        call(f"hstu-train-{task}", "--gin-config-file", f"synthetic_{task}.gin", "--run-dir", task, *short)
    call("python", "-m", "hstu.cli.predict", "--run-dir", "retrieval", "--output", "p.parquet")
    assert (tmp_path / "p.parquet").is_file() and "retrieval" in call("python", "-m", "hstu.cli.scores", "retrieval")


def test_the_version_is_one(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "hstu.__version__"
    assert set(project["project"]["scripts"]) == set(COMMANDS)
    assert re.fullmatch(r"\d+\.\d+\.\d+", hstu.__version__)
    if os.path.exists(ROOT / "hstu.egg-info"):
        assert importlib.metadata.version("hstu") == hstu.__version__


def test_every_supported_python_is_tried() -> None:
    """The workflow runs on each Python that pyproject.toml allows, and what it runs are targets that there are."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"]).groups()  # type: ignore[union-attr]
    text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    assert re.search(r"python: \[(.*)\]", text).group(1) == ", ".join(f'"3.{n}"' for n in range(int(low), int(high)))  # type: ignore[union-attr]
    for path in re.findall(r"(?:requirements|tests|examples|hstu)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_a_whole_environment_has_the_same_extras_wherever_one_is_made() -> None:
    """The image for CUDA, the document that promises it, the workflow; the image for CPUs has the pinned versions."""
    places = ("docker/cuda.Dockerfile", "docs/install.md", ".github/workflows/tests.yml")
    found = {extras for path in places for extras in re.findall(r"\[([a-z,]*\bdev)\]", (ROOT / path).read_text())}
    assert len(found) == 1, found
    pinned = (ROOT / "requirements" / "dev.in").read_text() + (ROOT / "requirements" / "cpu.in").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.match(r"[\w-]+", line)[0] for name in found.pop().split(",") for line in extras[name]}  # type: ignore[index]
    assert names <= set(re.findall(r"^([\w-]+)", pinned, re.MULTILINE))
    assert "make venv" in (ROOT / "docker" / "cpu.Dockerfile").read_text()
