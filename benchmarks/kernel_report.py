"""Compile every shipped attention kernel for GPUs that need not be there, and say what the compiler made.

    python benchmarks/kernel_report.py [--arch 80 90] [--widths 32 64 128 256] [--out report.json]

Per kernel, head width and option set: registers a thread, spilled bytes, shared memory, tensor-core
instructions (HGMMA is wgmma on sm_90, HMMA mma.sync on sm_80). This says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hstu.ops.attention.triton import tiles
from hstu.ops.attention.triton.backward import attention_backward_columns, attention_backward_rows
from hstu.ops.attention.triton.config import MAX_REGISTERS, Kernel, TileConfig, is_rich, padded_width, tile_config
from hstu.ops.attention.triton.forward import attention_forward

KERNELS: dict[Kernel, Any] = {
    "forward": attention_forward,
    "backward_columns": attention_backward_columns,
    "backward_rows": attention_backward_rows,
}
OPTIONS = {
    "causal": tiles.CAUSAL.value,
    "bias": tiles.CAUSAL.value | tiles.POSITION.value | tiles.TIME.value,
    "candidates": tiles.CAUSAL.value | tiles.CANDIDATES.value | tiles.CONTEXT.value,
    "all": (1 << 10) - 1,
}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Report:
    kernel: str
    options: str
    dtype: str
    arch: int
    width: int
    tile: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    hgmma: int
    hmma: int


def signature(kernel: Any, dtype: str) -> dict[str, str]:
    """Types of a kernel's arguments, as a call with tensors of ``dtype`` has them."""
    types = {"alpha": "fp32", "scale": "fp32"}
    types |= dict.fromkeys(("Q", "K", "V", "OUT", "DO", "DK", "DV_OUT"), f"*{dtype}")
    types |= dict.fromkeys(("POSITION_TABLE", "TIME_TABLE"), "*fp32")
    types |= dict.fromkeys(("D_POSITION", "D_TIME"), "*fp32")
    types["DQ"] = "*fp32" if kernel is attention_backward_columns else f"*{dtype}"
    types |= {"UNIT": "*fp64", "SEGMENT": "*i32", "IS_MEMORY": "*u8", "THRESHOLDS": "*i32"}
    types |= dict.fromkeys(("OFFSETS", "ORDER", "NUM_CONTEXT", "NUM_CANDIDATES", "READERS", "KEYS"), "*i64")
    result = {}
    for parameter in kernel.params:
        result[parameter.name] = "constexpr" if parameter.is_constexpr else types.get(parameter.name, "i32")
    return result


def compile_kernel(
    name: Kernel,
    width: int,
    options: str,
    arch: int,
    *,
    dtype: str = "bf16",
    config: TileConfig | None = None,
) -> Report:
    """Compile one kernel ahead of time and read the result."""
    kernel = KERNELS[name]
    padded = padded_width(width)
    flags = OPTIONS[options]
    element_size = 4 if dtype == "fp32" else 2
    config = config or tile_config(
        name, padded, element_size, uneven=width != padded, rich=is_rich(flags), hopper=arch >= 90
    )
    constants: dict[str, Any] = {
        "FLAGS": flags,
        "DQK": width,
        "DV": width,
        "BLOCK_DQK": padded,
        "BLOCK_DV": padded,
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "FAST": dtype == "bf16",
        "PRECISION": "ieee",
        "NEED_POSITION": bool(flags & tiles.POSITION.value),
        "NEED_TIME": bool(flags & tiles.TIME.value),
        "ATOMIC_DQ": config.atomic_dq,
        "FIXED": False,
    }
    types = signature(kernel, dtype)
    # Rows of 16-byte multiples: what the allocator and widths that are multiples of 8 give.
    aligned = [
        place
        for place, (argument, kind) in enumerate(types.items())
        if kind.startswith("*") or (width % 16 == 0 and argument.endswith(("_token", "_head")))
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={argument: constants[argument] for argument, kind in types.items() if kind == "constexpr"},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps, "num_stages": config.stages, "maxnreg": MAX_REGISTERS},
    )
    registers, spilled, sass = read_cubin(compiled.asm["cubin"])
    return Report(
        kernel=name,
        options=options,
        dtype=dtype,
        arch=arch,
        width=width,
        tile=f"{config.rows}x{config.columns}",
        warps=config.warps,
        stages=config.stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        hgmma=len(re.findall(r"\bHGMMA", sass)),
        hmma=len(re.findall(r"\bHMMA", sass)),
    )


def read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """Registers a thread, bytes of local memory (spills) and the disassembly."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage, sass = (
            subprocess.run([tools / "cuobjdump", flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]) + int(found[3]), sass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 32, 50, 64, 128, 256])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jobs = [
        (kernel, width, options, arch)
        for arch in arguments.arch
        for kernel in arguments.kernels
        for width in arguments.widths
        for options in arguments.options
    ]
    print(
        f"{'kernel':17} {'options':10} {'arch':>4} {'width':>5} {'tile':>7} {'warps':>5} {'stages':>6} "
        f"{'regs':>4} {'spill':>5} {'shared':>7} {'HGMMA':>5} {'HMMA':>5}"
    )
    reports = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for report in pool.map(lambda job: compile_kernel(*job, dtype=arguments.dtype), jobs):
            reports.append(report)
            print(
                f"{report.kernel:17} {report.options:10} {report.arch:4} {report.width:5} {report.tile:>7} "
                f"{report.warps:5} {report.stages:6} {report.registers:4} {report.spilled_bytes:5} "
                f"{report.shared_bytes:7} {report.hgmma:5} {report.hmma:5}",
                flush=True,
            )
    if arguments.out:
        content = {"triton": triton.__version__, "rows": [asdict(report) for report in reports]}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    bad = [r for r in reports if r.spilled_bytes or r.shared_bytes > SHARED_LIMIT.get(r.arch, 1 << 30)]
    if bad:
        sys.exit(f"{len(bad)} configurations spill registers or exceed the shared memory")


if __name__ == "__main__":
    main()
