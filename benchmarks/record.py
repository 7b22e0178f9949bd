"""What a benchmark on a CPU leaves in results/: where and when it ran, and what it found."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch


def processor() -> str:
    """Name of the processor, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()


def write_record(path: Path, *, threads: int, **found: Any) -> None:
    """Write ``found`` to ``path``, after the machine that it was found on."""
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | found, indent=1) + "\n")


def memory_growth(work: Callable[[], object]) -> float:
    """MiB that this process needs at its peak, in ``work``, beyond what it has before."""
    before = psutil.Process().memory_info().rss
    work()
    # Not getrusage, whose peak a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return max(0, peak - before) / 2**20


def growth_of(script: str, side: str, **flags: int) -> float:
    """``memory_growth`` as ``script --peak-of side`` prints it, in a process of its own."""
    command = [sys.executable, script, "--peak-of", side, *(f"--{name}={value}" for name, value in flags.items())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
