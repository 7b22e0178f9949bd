"""What is installed and what it runs on: versions, devices, and whether the versions go together."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# torch release: the FBGEMM and TorchRec releases built for it (FBGEMM's own compatibility table).
FBGEMM_FOR_TORCH = {"2.10": "1.5", "2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}
TRITON_FOR_TORCH = {"2.11": "3.6", "2.13": "3.7"}  # what the CUDA wheels of torch pin
MEGATRON = "0.16"

PACKAGES = (
    "torch",
    "triton",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "megatron-core",
    "gin-config",
    "absl-py",
    "numpy",
    "polars",
    "pyarrow",
    "pandas",
    "tensorboard",
    "matplotlib",
)
OPTIONAL = frozenset({"triton", "fbgemm-gpu-cpu"})
_CPUINFO = Path("/proc/cpuinfo")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True)
class Misfit:
    """One thing that does not fit, and what to do about it."""

    what: str
    remedy: str


def versions() -> dict[str, str | None]:
    """Installed version of every package in `PACKAGES`; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_flags() -> set[str]:
    """What the processor says that it can do; empty where the system does not tell."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    told = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in ("flags", "Features"))
    return {flag for line in told for flag in line.split()}


def devices() -> dict[str, Any]:
    """The processor (with the flags that matter to matrix products), the memory in GiB, and the GPUs."""
    import psutil
    import torch

    flags, model = cpu_flags(), platform.processor() or platform.machine()
    for line in _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = round(gpu.total_memory / 2**30, 1)
        gpus.append({"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": memory})
    memory = psutil.virtual_memory()
    return {
        "cpu": model,
        "cpu_count": usable,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_free_gib": round(memory.available / 2**30, 1),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def describe() -> dict[str, Any]:
    """Everything above as one JSON-able record, for the run directory."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "devices": devices(),
    }


def _minor(version: str) -> str:
    """`"2.13.0+cpu"` -> `"2.13"`."""
    return ".".join(str(part) for part in Version(version).release[:2])


def _is_shim(version: str) -> bool:
    """Whether this fbgemm-gpu is the metadata-only stand-in beside the CPU build."""
    return Version(version).local == "cpu"


def version_misfits(found: Mapping[str, str | None], *, cuda: str | None, num_gpus: int) -> list[Misfit]:
    """What does not go together among installed versions.

    Args:
        found: version by package, as `versions()` gives it.
        cuda: the CUDA version that torch was built with; None for a CPU build.
        num_gpus: number of CUDA devices that torch sees.
    """
    misfits = [
        Misfit(f"{name} is not installed", "make venv, or see docs/install.md")
        for name in PACKAGES
        if found.get(name) is None and name not in OPTIONAL
    ]
    torch, torchrec, triton = found.get("torch"), found.get("torchrec"), found.get("triton")
    megatron = found.get("megatron-core")
    if megatron and _minor(megatron) != MEGATRON:
        misfits.append(
            Misfit(f"megatron-core {megatron} is not {MEGATRON}.x", f"pip install 'megatron-core=={MEGATRON}.*'")
        )
    if torch is None:
        return misfits
    partner = FBGEMM_FOR_TORCH.get(_minor(torch))
    if partner is None:
        known = ", ".join(FBGEMM_FOR_TORCH)
        misfits.append(Misfit(f"torch {torch} is not one of {known}", "pip install torch==2.13.0"))
        return misfits
    misfits += _fbgemm_misfits(found, torch, partner, cuda=cuda, num_gpus=num_gpus)
    if torchrec and _minor(torchrec) != partner:
        misfits.append(
            Misfit(
                f"torchrec {torchrec} is not {partner}.x, as torch {torch} needs",
                f"pip install 'torchrec=={partner}.*'",
            )
        )
    wanted = TRITON_FOR_TORCH.get(_minor(torch))
    if triton and wanted and _minor(triton) != wanted:
        misfits.append(
            Misfit(
                f"triton {triton} is not {wanted}.x, as torch {torch} needs",
                f"pip install 'triton=={wanted}.*'",
            )
        )
    return misfits


def _fbgemm_misfits(
    found: Mapping[str, str | None], torch: str, partner: str, *, cuda: str | None, num_gpus: int
) -> list[Misfit]:
    """FBGEMM comes as two distributions, for CPU and for CUDA, that install the same module."""
    named, cpu = found.get("fbgemm-gpu"), found.get("fbgemm-gpu-cpu")
    if named is None:
        return []  # reported as not installed
    misfits = list[Misfit]()
    shim = _is_shim(named)
    install_cuda, install_cpu = (
        f"pip install 'fbgemm-gpu=={partner}.*'",
        f"pip install 'fbgemm-gpu-cpu=={partner}.*'",
    )
    if shim and cpu is None:
        misfits.append(Misfit("fbgemm-gpu is the stand-in for a CPU build that is not installed", install_cpu))
    if not shim and cpu is not None:
        remedy = f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu; {install_cuda}"
        misfits.append(Misfit("the CUDA and the CPU build of FBGEMM overwrite each other's files", remedy))
    if not shim and cuda is None:
        remedy = "make venv (CPU), or a CUDA build of torch (docs/install.md)"
        misfits.append(Misfit(f"fbgemm-gpu {named} is a CUDA build, but torch {torch} is a CPU build", remedy))
    if shim and cuda is not None and num_gpus:
        remedy = f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu; {install_cuda}"
        misfits.append(Misfit("torch sees a GPU, but FBGEMM is a CPU build: tables cannot be on the GPU", remedy))
    for name, version in (("fbgemm-gpu", named), ("fbgemm-gpu-cpu", cpu)):
        if version and _minor(version) != partner:
            remedy = install_cpu if shim else install_cuda
            misfits.append(Misfit(f"{name} {version} is not {partner}.x, as torch {torch} needs", remedy))
    return misfits


def requirement_misfits(roots: Iterable[str], path: Sequence[str] | None = None) -> list[Misfit]:
    """Requirements of `roots`, and of what they require, that are missing or of another version.

    Args:
        roots: names of distributions to start from; absent ones are passed over, also as requirements.
        path: where to look for distributions; None for this interpreter's own path.
    """
    installed: dict[str, importlib.metadata.Distribution] = {}
    for found in importlib.metadata.distributions(path=list(sys.path if path is None else path)):
        installed.setdefault(canonicalize_name(found.metadata["Name"]), found)
    known = {canonicalize_name(root) for root in roots}
    misfits, seen, waiting = list[Misfit](), set[str](), sorted(known)
    while waiting:
        name = waiting.pop()
        if name in seen or name not in installed:
            continue
        seen.add(name)
        for line in installed[name].requires or ():
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue  # pip refuses such metadata at installation
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            target = canonicalize_name(requirement.name)
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            if target not in installed:
                if target in known:
                    continue
                misfits.append(Misfit(f"{name} requires {requirement.name}, which is not installed", remedy))
            elif not requirement.specifier.contains(installed[target].version, prereleases=True):
                have = f"{requirement.name}{requirement.specifier}, found {installed[target].version}"
                misfits.append(Misfit(f"{name} requires {have}", remedy))
            waiting.append(target)
    return misfits


def import_misfits(modules: Iterable[str]) -> list[Misfit]:
    """Modules that do not import, each with the first line of the error."""
    misfits = []
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken binary can raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            misfits.append(Misfit(f"import {name} fails: {reason}", "make clean venv, or see docs/install.md"))
    return misfits
