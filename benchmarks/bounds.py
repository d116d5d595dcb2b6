"""Predicts, without a GPU, which of CUDA and Triton is the faster where both serve a kind of calls, from what their kernels are
compiled to: the basis of the order in nvfp4_kernels/ops/_dispatch.py until somebody measures (`nvfp4 tune`).

    python benchmarks/bounds.py                     writes benchmarks/results/bounds.json
    python benchmarks/bounds.py --op quantize       a part of it, only printed

A bound is a sum over launches: LAUNCH, and the longer of the time in which the bytes go through memory and that in which the
busiest multiprocessor issues the hot path's instructions (sass.py), each through a pipe of so many lanes a clock. Nothing in
it waits: no latency, no bank conflict, no two pipes in each other's way; partial sums stay in the L2 cache. Bounds within CLOSE
of each other decide nothing. The counts agree with those made by hand for quantize/triton.py (14 instructions a value on
sm_90, 7 on sm_100; 49 of a pair with noise) and, of the main loop, with resources.json's slots_a_weight.

Not here: NVFP4 times NVFP4, where correctness decides first (matmul/native.py), kinds that CUDA serves by kernels that read
their forms when they run (quantize_any), and mixer_scan, whose CUDA kernel leaves few sequences to Triton by itself.
"""

import argparse
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.cuda_resources import ROOT, built, launched_with
from benchmarks.resources import compile_for, tool
from benchmarks.sass import WANTED, issued
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.ops import _cuda, _device, _dispatch, _triton, _tuned

RESULTS = Path(__file__).parent / "results" / "bounds.json"
LAUNCH = 2.5  # microseconds from one launch of a stream to the next
CLOSE = 0.15  # of the shorter bound: within it nothing is said


class Gpu(NamedTuple):
    """clock: GHz, sustained; memory: TB/s of a copy. lanes: of each pipe, a clock and multiprocessor (CUDA C++ Programming
    Guide, "Arithmetic Instructions"); of "memory" for wavefronts of 128 bytes. Products on tensor cores count by their issue
    alone: their own time limits none of these calls."""

    name: str
    target: str
    processors: int
    clock: float
    memory: float
    lanes: dict[str, int]


def _lanes(fp32: int, integer: int, mad: int) -> dict[str, int]:
    return dict(issue=128, fp32=fp32, fp16=128, integer=integer, mad=mad, slow=16, memory=32, tensor=128)


GPUS = {
    80: Gpu("A100", "80", 108, 1.41, 1.7, _lanes(64, 64, 64)),
    90: Gpu("H200", "90a", 132, 1.755, 4.3, _lanes(128, 64, 64)),
    100: Gpu("B200", "100a", 148, 1.85, 7.9, _lanes(128, 64, 64)),
    103: Gpu("B300", "103a", 148, 1.85, 7.9, _lanes(128, 64, 64)),
    120: Gpu("RTX 5090", "120f", 170, 2.41, 1.6, _lanes(128, 128, 64)),
}


class Case(NamedTuple):
    """A call that stands for its kind. native, triton: the arguments of `run`. bytes: that a launch moves, by the beginning of
    the kernel's name, the last that fits. work: values that the main loops go through in all (`unit`)."""

    op: str
    sizes: str
    native: tuple
    triton: tuple
    bytes: dict[str, float]
    work: float


def empty(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def quantize(rows: int, cols: int, row: QuantSpec | None, col: QuantSpec | None, sizes: str) -> Case:
    call = empty(rows, cols), row, col, empty(2, dtype=torch.int64)
    x, forms = 2 * rows * cols, [spec for spec in (row, col) if spec is not None]
    written = x + rows * cols * sum(0.5625 if spec.format == "nvfp4" else 1 + 1 / 32 for spec in forms)
    return Case("quantize", f"{sizes}, {rows}x{cols}", call, call, {"": x, "quantize_": written}, rows * cols)


def state_update(batch: int, dtype: torch.dtype, noisy: bool) -> Case:
    heads, head_dim, groups, state = 64, 64, 8, 128
    kept, x, dt = (
        empty(batch, heads, head_dim, state, dtype=dtype),
        empty(batch, 1, heads, head_dim),
        empty(batch, 1, heads),
    )
    B, per_head = empty(batch, 1, groups, state), empty(heads, dtype=torch.float32)
    options = None, None, empty(2, dtype=torch.int64) if noisy else None, True, 0.0, torch.inf
    call = kept, x, dt, per_head, B, B, per_head, x, per_head, *options
    moved = 2 * kept.numel() * kept.element_size() + 6 * x.numel()
    return Case("state_update", f"Nano, {batch} sequences", call, call, {"": moved}, 0)


def weight_only(rows: int, n: int, k: int) -> Case:
    codes, scales = empty(n, k // 2, dtype=torch.uint8), empty(n, k // 16, dtype=torch.float8_e4m3fn)
    packed = empty(n // 16, k // 64, 32, 4, dtype=torch.int32), empty(n // 16, k // 64, 16, 4, dtype=torch.uint8)
    a, g, rest = empty(rows, k), empty(dtype=torch.float32), (None, torch.bfloat16, None, False)
    native, triton = PackedNVFP4Tensor(*packed, g, (n, k)), NVFP4Tensor(codes, scales, g, (n, k))
    moved = {"": n * k * 0.5625 + 2 * rows * (n + k), "finish": 2 * rows * n}
    return Case("matmul", f"{rows}x{n}x{k}", (a, native, *rest), (a, triton, *rest), moved, n * k)


def cases() -> Iterator[Case]:
    plain, noisy, tiled = QuantSpec(), QuantSpec("1x16", "stochastic"), QuantSpec("16x16")
    turned, gradient = QuantSpec(hadamard=DEFAULT_SIGNS), QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)
    yield quantize(8192, 4096, plain, None, "rows")
    yield quantize(8192, 4096, tiled, tiled, "weight")
    yield quantize(8192, 4096, QuantSpec("1x32"), QuantSpec("1x32"), "MXFP8")
    yield quantize(8192, 4096, plain, turned, "activation")
    yield quantize(8192, 4096, noisy, gradient, "gradient")
    for batch in (8, 256):
        yield state_update(batch, torch.float32, False)
        yield state_update(batch, torch.float16, True)
        yield state_update(batch, torch.bfloat16, True)
    yield weight_only(8, 4096, 14336)


def unit(kernel: str, constants: dict) -> float:
    """How much of a case's work a turn of a kernel's main loop does; 0 where it turns once."""
    if kernel.startswith(("quantize_", "amax_transforms")) and not constants:
        return 64 * 64
    if kernel.startswith("weight_only"):
        return 128 * 128
    if kernel.startswith("amax_values"):
        return 8192
    if kernel in ("finish_kernel", "update_kernel") or not constants:
        return 0
    shape = {"values_kernel": ("LINES", "LENGTH"), "decoded_kernel": ("BLOCK_N", "BLOCK_K")}.get(
        kernel, ("ROWS", "COLS")
    )
    return constants[shape[0]] * constants[shape[1]]


# What marks the hot path of kernels that read their options when they run: (wanted, shunned).
MARKS = {
    # the transform of columns and no rows', and no division: that is for groups alone
    "amax_transforms": ("LDSM", r"I2F\.U32"),
    "quantize_kernel": (WANTED, None),
    "quantize_": (WANTED, r"I2F\.U32"),
    "turned_kernel": ("LDG", None),
    "state_update": (WANTED + "|MUFU", None),
}


class Launch(NamedTuple):
    kernel: str
    blocks: int
    warps: int
    constants: dict
    sass: str
    registers: int
    shared: int


@contextlib.contextmanager
def on(arch: int) -> Iterator[None]:
    """Tensors of the meta device stand for tensors of a chip."""
    with (
        _device.assumed(divmod(arch, 10)),
        mock.patch.object(_device, "multiprocessors", lambda device: GPUS[arch].processors),
    ):
        yield


def read(cubin: Path) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Of each kernel the code, and its registers and shared memory."""
    usage, sass = tool("cuobjdump", "--dump-resource-usage", str(cubin)), tool("nvdisasm", "-c", str(cubin))
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
    taken = re.findall(r"Function (\w+):\s*REG:(\d+).*?SHARED:(\d+)", usage)
    return code, {kernel: (int(registers), int(shared)) for kernel, registers, shared in taken}


def cuda(case: Case, arch: int, compiled: dict) -> list[Launch]:
    """What CUDA launches. compiled: by op and architecture, what `read` gave."""
    found = []
    model = lambda op, kernel, grid, threads, shared, parameters: found.append((kernel, grid, threads))  # noqa: E731
    with mock.patch.object(_cuda, "_model", model), on(arch):
        _dispatch.implementation(case.op, "native").run(*case.native)
    if (case.op, arch) not in compiled:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            built(ROOT / "csrc" / case.op / "cuda.cu", GPUS[arch].target, cubin)
            compiled[case.op, arch] = read(cubin)
    code, taken = compiled[case.op, arch]
    return [
        Launch(
            kernel,
            grid[0] * grid[1] * grid[2],
            threads // 32,
            {},
            code[kernel],
            taken[kernel][0],
            taken[kernel][1] + launched_with(kernel),
        )
        for kernel, grid, threads in found
    ]


def in_triton(case: Case, arch: int) -> list[Launch]:
    with on(arch), _triton.recorded(divmod(arch, 10)) as found:
        _dispatch.implementation(case.op, "triton").run(*case.triton)
    launches = []
    for kernel, arguments, constants, options, grid in found:
        made = compile_for(arch, kernel, arguments, constants, options, grid)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            code, taken = read(Path(file.name))
        name = kernel.__name__
        blocks = grid[0] * (*grid, 1)[1]
        launches.append(
            Launch(name, blocks, made.metadata.num_warps, constants, code[name], taken[name][0], made.metadata.shared)
        )
    return launches


def times(case: Case, arch: int, launch: Launch) -> dict:
    """Of one launch: what moves and is issued, and the microseconds of either."""
    gpu = GPUS[arch]
    marks = next((marks for start, marks in MARKS.items() if launch.kernel.startswith(start)), (WANTED, None))
    per_turn = unit(launch.kernel, launch.constants)
    turns = case.work / per_turn / launch.blocks if per_turn else 1.0
    of_warp = issued(launch.sass, turns, *marks)
    in_turn = -(-launch.blocks // gpu.processors) * launch.warps  # warps of the busiest multiprocessor
    us = {pipe: 32 * in_turn * count / gpu.lanes[pipe] / gpu.clock / 1e3 for pipe, count in of_warp.items()}
    binds = max(us, key=us.get)
    moved = next(size for start, size in reversed(case.bytes.items()) if launch.kernel.startswith(start))
    return {
        "kernel": launch.kernel,
        "blocks": launch.blocks,
        "warps": launch.warps,
        "registers": launch.registers,
        "shared": launch.shared,
        "bytes": round(moved),
        "issued": {pipe: round(count * launch.blocks * launch.warps) for pipe, count in of_warp.items()},
        "memory_us": round(moved / gpu.memory / 1e6, 2),
        "issue_us": round(us[binds], 2),
        "pipe": binds,
    }


def bound(launches: list[dict]) -> dict:
    """Of launches behind one another, and what binds the longest of them."""
    each = [max(one["memory_us"], one["issue_us"]) for one in launches]
    longest, between = launches[each.index(max(each))], LAUNCH * len(launches)
    binds = "memory" if longest["memory_us"] >= longest["issue_us"] else longest["pipe"]
    binds = "launches" if between > sum(each) else binds
    return {"us": round(sum(each) + between, 2), "binds": binds, "launches": launches}


def row_of(case: Case, arch: int, compiled: dict) -> dict:
    """Both bounds of a case, and who is to be asked first: Triton where its bound is clearly the shorter."""
    made = {"native": bound([times(case, arch, one) for one in cuda(case, arch, compiled)])}
    made["triton"] = bound([times(case, arch, one) for one in in_triton(case, arch)])
    native, triton = (made[name]["us"] for name in ("native", "triton"))
    close = max(native, triton) <= (1 + CLOSE) * min(native, triton)
    first = "native" if close or native < triton else "triton"
    kind = f"{case.op}: {_tuned.KINDS[case.op](*case.triton)}"
    about = {"kind": kind, "of": case.sizes, "target": GPUS[arch].target, "chip": GPUS[arch].name}
    return about | {"first": first, "close": close} | made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="one op alone; default: all")
    parser.add_argument("--arch", type=int, choices=GPUS, nargs="+", help=f"default: {' '.join(map(str, GPUS))}")
    given = parser.parse_args()
    compiled, found = {}, []
    for case in cases():
        for arch in (given.arch or GPUS) if given.op in (None, case.op) else ():
            found.append(row := row_of(case, arch, compiled))
            told = (f"{name} {row[name]['us']} us ({row[name]['binds']})" for name in ("native", "triton"))
            print(row["kind"], row["of"], row["chip"], *told, row["first"], "close" if row["close"] else "", flush=True)
    if not given.op and not given.arch:
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")


if __name__ == "__main__":
    main()
