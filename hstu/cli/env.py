"""`python -m hstu.cli.env`: versions, devices, and whether they fit together. Exit code 0 if so, 1 if not."""

from __future__ import annotations

import sys
from typing import Any

from hstu import environment
from hstu.cli.flags import Parser
from hstu.environment import Misfit
from hstu.quiet import silence_known_notices

LIBRARIES = ("fbgemm_gpu", "torchrec", "megatron.core", "gin", "polars")


def misfits(record: dict[str, Any]) -> list[Misfit]:
    """Everything that does not fit on this machine, given `environment.describe()`."""
    devices = record["devices"]
    found = environment.version_misfits(record["versions"], cuda=devices["cuda"], num_gpus=len(devices["gpus"]))
    found += environment.requirement_misfits(environment.PACKAGES)
    silence_known_notices()
    # A package that is missing is reported once, as missing.
    present = {name for name, version in record["versions"].items() if version}
    names = {"fbgemm_gpu": "fbgemm-gpu", "megatron.core": "megatron-core", "gin": "gin-config"}
    return found + environment.import_misfits(m for m in LIBRARIES if names.get(m, m) in present)


def report(record: dict[str, Any], found: list[Misfit]) -> str:
    """The text that the command prints."""
    devices = record["devices"]
    build = f"CUDA {devices['cuda']} build" if devices["cuda"] else "CPU build"
    lines = ["versions", f"  {'python':15} {record['python']}"]
    for name, version in record["versions"].items():
        note = f"   ({build})" if name == "torch" and version else ""
        if name == "fbgemm-gpu" and version and version.endswith("+cpu"):
            note = "   (stand-in: the code is fbgemm-gpu-cpu)"
        lines.append(f"  {name:15} {version or '-'}{note}")
    flags = " ".join(devices["cpu_flags"]) or "none of AVX2, AVX-512, AMX"
    lines += ["devices", f"  {'cpu':15} {devices['cpu']}, {devices['cpu_count']} cores, {flags}"]
    lines.append(f"  {'memory':15} {devices['memory_gib']} GiB, {devices['memory_free_gib']} GiB of it free")
    for gpu in devices["gpus"]:
        text = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        lines.append(f"  {'gpu':15} {text}")
    if not devices["gpus"]:
        why = "" if devices["cuda"] else " that this CPU build of torch could see"
        lines.append(f"  {'gpu':15} none{why}")
    if not found:
        return "\n".join([*lines, "fit", "  these versions fit together"])
    lines.append("misfits")
    for misfit in found:
        lines += [f"  {misfit.what}", f"    remedy: {misfit.remedy}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the report; 0 if everything fits, 1 if not."""
    Parser(prog="python -m hstu.cli.env", description=__doc__).parse_args(argv)
    try:
        record = environment.describe()
    except ImportError as error:
        print(f"{error}. Install the pinned versions first: make venv, or see docs/install.md", file=sys.stderr)
        return 1
    found = misfits(record)
    print(report(record, found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
