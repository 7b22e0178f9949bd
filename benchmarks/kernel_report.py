"""Compile every shipped attention kernel for GPUs that need not be there, and say what the compiler made.

    python benchmarks/kernel_report.py [--arch 80 90 100] [--widths 32 64 128 256] [--out report.json]

Per kernel, head width and option set: registers a thread, spilled bytes, shared memory, tensor-core instructions
(HGMMA is wgmma on sm_90, HMMA mma.sync on sm_80), loads by descriptor (TMA), and of the hottest loop, that of tiles
without a mask, the instructions of a warp in one turn, and of all warps for 64 scores. This is no measurement of
speed; it explains one, and guides work where there is no device.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from null_driver import null_driver

from hstu.ops import Layout, Mask, RelativeBias
from hstu.ops.attention.triton import config, hstu, launch
from hstu.ops.attention.triton.config import Kernel, TileConfig

KERNELS: tuple[Kernel, ...] = ("forward", "columns", "rows")
OPTIONS = ("causal", "bias", "candidates", "all")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    tma: int
    loop: int  # instructions of a warp in one turn of the hottest loop
    loop_a_part: float  # of all warps, for 64 scores


def arguments_of(options: str, width: int, dtype: torch.dtype, heads: int = 4) -> tuple[list[torch.Tensor], dict]:
    """A small problem with these options: q, k, v and both tables, and the other arguments."""
    length, samples = 256, 2
    total = length * samples
    some = torch.ones(samples, dtype=torch.int64)
    rich = options == "all"
    marked = dict(num_context=some, num_candidates=some) if options in ("candidates", "all") else {}
    layout = Layout(
        torch.arange(samples + 1) * length,
        segments=torch.zeros(total, dtype=torch.int32) if rich else None,
        is_memory=torch.zeros(total, dtype=torch.bool) if rich else None,
        timestamps=torch.arange(total),
        **marked,
    )
    mask = Mask(context="full", max_attn_len=64, candidate_group_size=2) if rich else Mask()
    tensors = [torch.zeros(total, heads, width, dtype=dtype, requires_grad=True) for _ in "qkv"]
    tables = [torch.zeros(n, requires_grad=True) for n in (2 * length - 1, 129)]
    bias = RelativeBias(position=tables[0], time=tables[1]) if options in ("bias", "all") else None
    return [*tensors, *tables], dict(layout=layout, mask=mask, bias=bias, scaling_seqlen=1.0)


def compile_kernel(
    name: Kernel, width: int, options: str, arch: int, *, dtype: str = "bf16", tile: TileConfig | None = None
) -> Report:
    """Compile one kernel ahead of time, with its default tile or ``tile``, and read the result."""
    tensors, arguments = arguments_of(options, width, DTYPES[dtype])
    chosen: dict[str, TileConfig] = {}
    default = config.tile_config

    def pick(kernel: Kernel, *place: object, **options: object) -> TileConfig:
        chosen[kernel] = tile if tile is not None and kernel == name else default(kernel, *place, **options)
        return chosen[kernel]

    with null_driver(arch) as compiled, mock.patch.object(launch, "tile_config", pick), torch.no_grad():
        q, k, v = tensors[:3]
        bias = arguments["bias"] or RelativeBias()
        tables, into = (bias.position, bias.time), tuple(torch.empty_like(x) for x in (q, k, v))
        attention = hstu.TritonAttention(
            arguments["layout"], arguments["mask"], scaling_seqlen=1.0, alpha=1.0, bias=bias, keys=arguments["layout"]
        )
        if name == "forward":
            attention.forward(q, k, v, *tables)
        elif name == "columns":
            attention.columns(v, (q, k, v), tables, into[1:])
        else:
            attention.rows(v, (q, k, v), tables, into[0], tuple(t is not None for t in tables))
    files = next(f for f in compiled if any(key.startswith("attention_") for key in f))
    own = chosen[name]
    registers, spilled, sass = read_cubin(Path(next(p for key, p in files.items() if key.endswith(".cubin"))))
    ptx = Path(next(p for key, p in files.items() if key.endswith(".ptx"))).read_text()
    metadata = json.loads(Path(next(p for key, p in files.items() if key.endswith(".json"))).read_text())
    loop = hottest_loop(sass)
    return Report(
        kernel=name,
        options=options,
        dtype=dtype,
        arch=arch,
        width=width,
        tile=f"{own.rows}x{own.columns}",
        warps=own.warps,
        stages=own.stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=metadata["shared"],
        hgmma=len(re.findall(r"\bHGMMA", sass)),
        hmma=len(re.findall(r"\bHMMA", sass)),
        tma=ptx.count("cp.async.bulk.tensor"),
        loop=loop,
        loop_a_part=round(loop * own.warps * 64 / (own.rows * own.columns), 1),
    )


def read_cubin(path: Path) -> tuple[int, int, str]:
    """Registers a thread, bytes of local memory (spills) and the disassembly."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        own = os.path.join(folder, "kernel.cubin")
        Path(own).write_bytes(path.read_bytes())
        usage, sass = (
            subprocess.run([tools / "cuobjdump", flag, own], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:\d+\s+LOCAL:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]) + int(found[3]), sass


def hottest_loop(sass: str) -> int:
    """Instructions of the shortest loop that multiplies on tensor cores: that of tiles without a mask."""
    instructions: list[str] = []
    place: dict[int, int] = {}
    for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass):
        place[int(address, 16)] = len(instructions)
        instructions.append(text)
    sizes = []
    for at, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        first = place.get(int(target[1], 16), at + 1) if target else at + 1
        if first <= at and any("MMA" in own for own in instructions[first : at + 1]):
            sizes.append(at + 1 - first)
    return min(sizes, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--widths", type=int, nargs="+", default=[25, 32, 50, 64, 128, 256])
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--tile", type=int, nargs=4, help="rows columns warps stages, in place of the default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tile = TileConfig(*arguments.tile) if arguments.tile else None
    jobs = [
        (kernel, width, options, arch)
        for arch in arguments.arch
        for kernel in arguments.kernels
        for width in arguments.widths
        for options in arguments.options
    ]
    names = "kernel options arch width tile warps stages registers spilled_bytes shared_bytes hgmma hmma tma"
    columns = [*names.split(), "loop", "loop_a_part"]
    print(*(f"{c.removesuffix('_bytes'):>10}" for c in columns))
    reports = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for made in [pool.submit(compile_kernel, *job, dtype=arguments.dtype, tile=tile) for job in jobs]:
            reports.append(made.result())
            print(*(f"{getattr(reports[-1], c)!s:>10}" for c in columns), flush=True)
    if arguments.out:
        content = {"triton": triton.__version__, "rows": [asdict(report) for report in reports]}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    bad = [r for r in reports if r.spilled_bytes or r.shared_bytes > SHARED_LIMIT.get(r.arch, 1 << 30)]
    if bad:
        sys.exit(f"{len(bad)} configurations spill registers or exceed the shared memory")


if __name__ == "__main__":
    main()
