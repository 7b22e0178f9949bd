"""The shape of the code: floors, who may import which library, and what importing the package costs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

COMPILED_LOOPS = r"hstu\.ops\.(\w+\.)*numba\w*$"
# library: the modules that may import it, as a regular expression over full module names.
MAY_IMPORT = {
    "torchrec": r"hstu\.(data\.batch|parallel|metrics\.topk|training)(\.|$)",
    "fbgemm_gpu": r"hstu\.(data\.batch|parallel|metrics\.topk|training)(\.|$)",
    "megatron": r"hstu\.(parallel|training\.optimizer)(\.|$)",
    "triton": r"hstu\.ops\.(\w+\.)*triton\w*(\.|$)",
    "gin": r"hstu\.config(\.|$)",
    "absl": r"hstu\.cli\.",
    "transformers": r"hstu\.layers\.(huggingface|text_model)$",
    "numba": COMPILED_LOOPS,
    "llvmlite": COMPILED_LOOPS,
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"), r"hstu\.serving(\.|$)"),
}
OPS_MAY_IMPORT = {"torch", "triton"}
COMPILED_LOOPS_MAY_IMPORT = {"numba", "llvmlite", "numpy"}


def library_violations(package_root: Path) -> list[str]:
    """Every import in `package_root`/hstu that the two tables above forbid."""
    code = (
        "import json, sys, grimp\n"
        "graph = grimp.build_graph('hstu', include_external_packages=True,\n"
        "    exclude_type_checking_imports=True, cache_dir=None)\n"
        "json.dump([[m, sorted(graph.find_modules_directly_imported_by(m))]\n"
        "           for m in sorted(graph.modules) if m.split('.')[0] == 'hstu'], sys.stdout)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=package_root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    violations = []
    for module, imported in json.loads(done.stdout):
        for target in imported:
            library = target.split(".")[0]
            in_ops = re.match(r"hstu\.ops(\.|$)", module)
            ops_may = COMPILED_LOOPS_MAY_IMPORT if re.match(COMPILED_LOOPS, module) else OPS_MAY_IMPORT
            foreign = library not in sys.stdlib_module_names and library != "hstu"
            allowed = MAY_IMPORT.get(library)
            if (allowed and not re.match(allowed, module)) or (in_ops and foreign and library not in ops_may):
                violations.append(f"{module} imports {library}")
    return violations


def floor_violations(package_root: Path) -> str:
    """The report of the floors contract in pyproject.toml; empty when it is kept."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import importlinter.cli, sys; sys.exit(importlinter.cli.lint_imports(no_cache=True))",
        ],
        cwd=package_root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A copy of the package in which a test can plant a fault."""
    shutil.copytree(ROOT / "hstu", tmp_path / "hstu", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(root: Path, module: str, code: str) -> None:
    """Write `code` at the end of `module`, making the packages above it where they are missing."""
    path = root.joinpath(*module.split("."))
    for package in reversed([p for p in path.parents if p.is_relative_to(root / "hstu")]):
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    with path.open("a") as file:
        file.write(f"\n{code}\n")


def test_floors():
    assert floor_violations(ROOT) == ""


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("hstu.quiet", "import hstu.cli"),  # upwards
        ("hstu.models.planted", "from hstu.metrics import planted"),  # within a floor
        ("hstu.attic", "x = 1"),  # a room without a floor
    ],
)
def test_floors_catch(planted: Path, module: str, code: str):
    plant(planted, "hstu.metrics.planted", "x = 1")
    plant(planted, module, code)
    assert "BROKEN" in floor_violations(planted)


def test_libraries():
    assert library_violations(ROOT) == []


@pytest.mark.parametrize(
    ("module", "code", "library"),
    [
        ("hstu.models.planted", "import torchrec", "torchrec"),
        ("hstu.layers.planted", "def f():\n    from fbgemm_gpu import x", "fbgemm_gpu"),
        ("hstu.training.planted", "from megatron.core import parallel_state", "megatron"),
        ("hstu.ops.attention.planted", "import triton.language as tl", "triton"),
        ("hstu.ops.attention.planted", "import numpy", "numpy"),
        ("hstu.ops.attention.planted", "from numba import njit", "numba"),
        ("hstu.ops.attention.numba_planted", "import torch", "torch"),
        ("hstu.cli.planted", "import gin", "gin"),
        ("hstu.training.planted", "from absl import flags", "absl"),
        ("hstu.cli.planted", "def f():\n    import fastapi", "fastapi"),
    ],
)
def test_libraries_catch(planted: Path, module: str, code: str, library: str):
    plant(planted, module, code)
    assert f"{module} imports {library}" in library_violations(planted)


def run(code: str) -> str:
    """What a fresh interpreter prints when it runs `code`, on both streams."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_import_hstu_is_silent_and_cheap():
    heavy = {"torch", "numpy", "torchrec", "megatron", "gin", "triton", "polars"}
    assert run(f"import sys, hstu; assert not {heavy!r} & set(sys.modules)") == ""


def test_preprocessing_does_not_import_torch():
    """It costs seconds and 400 MiB, which a small job would notice."""
    assert run("import sys, hstu.cli.preprocess; assert 'torch' not in sys.modules") == ""


def test_ops_import_without_torchrec_and_megatron():
    absent = ("numba", "torchrec", "fbgemm_gpu", "megatron", "gin", "polars", "pandas")
    code = f"""
import sys
for name in {absent!r}:
    sys.modules[name] = None  # importing it now raises ModuleNotFoundError
import hstu.ops
assert "triton" not in sys.modules or sys.modules["triton"] is None, "triton is imported before it is needed"
"""
    assert run(code) == ""
