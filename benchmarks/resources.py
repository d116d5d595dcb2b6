"""Compiles the Triton kernels, without a GPU, for each architecture, and says what each of them takes.

    python benchmarks/resources.py                    all kernels, all architectures; writes benchmarks/results/resources.json
    python benchmarks/resources.py --op matmul --arch 90 100    a part of it, only printed
    python benchmarks/resources.py --few              every kernel for every architecture, not every case; only printed
    python benchmarks/resources.py --cold             seconds of one core in which first calls compile for sm_90

A case runs an op on tensors of the meta device at a size that counts; what it would have launched is compiled as Triton itself
would specialize it. A row: op, case, kernel, arch, registers, spills (bytes a thread), shared memory (bytes), and how often
each instruction stands in the SASS that the case or the architecture makes one expect; overwritten, where it should be empty:
instructions that write an operand's registers while a product on its way may read them (sass.py).
"""

import argparse
import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.sass import overwritten
from nvfp4_kernels.ops import _triton

ARCHS = (80, 90, 100, 103, 120)
RESULTS = Path(__file__).parent / "results" / "resources.json"
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHOSEN: list[tuple] = []  # the cases to compile; functions, which no pipe takes
# What is compiled for every architecture even so: a product on the tensor cores of each.
EVERYWHERE = "matmul", "nvfp4 x nvfp4 8192x4096x4096"
# Tensor-core products by generation, and the PTX that becomes them.
PRODUCTS = {
    "HMMA": r"mma\.sync\.(?!.*block_scale)", "HGMMA": r"wgmma\.mma_async", "UTCHMMA": r"tcgen05\.mma.*kind::(f16|tf32)",
    "UTCOMMA": r"tcgen05\.mma.*kind::mxf4nvf4", "OMMA": r"mma\.sync\..*kind::mxf4nvf4",
}  # fmt: skip
INSTRUCTIONS = (*PRODUCTS, "UTMALDG", "LDGSTS", "F2FP")  # and asynchronous copies, conversions to FP4


def cases():
    """(op, name of the case, function that calls the op's Triton implementation on meta tensors)."""
    folder = Path(__file__).parent / "cases"
    for path in sorted(folder.glob("[a-z]*.py")):
        module = importlib.import_module(f"benchmarks.cases.{path.stem}")
        for name, run in module.CASES.items():
            yield path.stem, name, run


def launches(run, arch: int) -> list[tuple]:
    with _triton.recorded(divmod(arch, 10)) as found:
        run()
    return found


def specialized(arch: int, kernel, arguments, constants, options) -> tuple[ASTSource, dict, list]:
    """A launch with these arguments as Triton would compile it: the source, the compiler's keywords, and of the arguments those
    that the compiled kernel still takes."""
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = constants | options | {"debug": False}
    bound, specialization, rest = binder(*arguments, **keywords)
    packed, signature, constexprs, attributes = kernel._pack_args(backend, keywords, bound, specialization, rest)
    source = ASTSource(kernel, signature, constexprs, attributes)
    taken = [bound[name] for name, kind in signature.items() if kind != "constexpr"]
    return source, {"target": target, "options": packed.__dict__}, taken


def compile_for(arch: int, kernel, arguments, constants, options, grid):
    """The compiled kernel, specialized as a launch with these arguments would be, on whatever grid."""
    source, keywords, _ = specialized(arch, kernel, arguments, constants, options)
    return triton.compile(source, **keywords)


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(BIN / name), *arguments], capture_output=True, text=True, check=True).stdout


def counted(sass: str) -> dict[str, int]:
    """How often each of INSTRUCTIONS stands in a disassembly."""
    found = collections.Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", sass, re.M))
    return {name: found[name] for name in INSTRUCTIONS if found[name]}


def row(compiled, disassembled: bool = True) -> dict:
    """disassembled: instructions are counted in the SASS. Else, which takes a fifth less time in all, products in the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        on_its_way = "wgmma" in compiled.asm["ptx"]
        sass = tool("nvdisasm", "-c", file.name) if disassembled or on_its_way else ""
        if disassembled:
            instructions = counted(sass)
        else:
            instructions = {
                n: count for n, ptx in PRODUCTS.items() if (count := len(re.findall(ptx, compiled.asm["ptx"])))
            }
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    faults = overwritten(sass) if on_its_way else []
    return {
        "registers": registers,
        "spills": stack,
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "instructions": instructions,
        **({"overwritten": faults} if faults else {}),
    }


def case_rows(index: int, arch: int, kernels: set[str], disassembled: bool) -> list[dict]:
    """What these kernels of one of CHOSEN take on one architecture; in a process of its own, which has it from the fork."""
    op, name, run = CHOSEN[index]
    found = [launch for launch in launches(run, arch) if launch[0].__name__ in kernels]
    about = [{"op": op, "case": name, "kernel": kernel.__name__, "arch": arch} for kernel, *_ in found]
    return [first | row(compile_for(arch, *launch), disassembled) for first, launch in zip(about, found, strict=True)]


def tasks(archs, few: bool = False) -> list[tuple[int, int, set[str]]]:
    """(index of one of CHOSEN, architecture, names of kernels). few: each case for one architecture, in turns, or, of
    EVERYWHERE, for all; and what is missing then of an op's kernels for an architecture."""
    made = {
        (index, arch): {kernel.__name__ for kernel, *_ in launches(run, arch)}
        for index, (_, _, run) in enumerate(CHOSEN)
        for arch in archs
    }
    if not few:
        return [(*where, kernels) for where, kernels in made.items()]
    found, seen = [], collections.defaultdict(set)
    for missing in (False, True):
        for (index, arch), kernels in made.items():
            op, case, _ = CHOSEN[index]
            in_turn = archs[index % len(archs)] == arch or (op, case) == EVERYWHERE
            new = kernels - seen[op, arch] if missing else kernels
            if in_turn != missing and new:
                found.append((index, arch, new))
                seen[op, arch] |= new
    return found


def cold(op: str, name: str, run) -> str:
    """How long the first call compiles, forward and backward, kernel by kernel."""
    module = importlib.import_module(f"nvfp4_kernels.ops.{op}.triton")
    backward, forward_ends = getattr(module, "backward", None), []
    with _triton.recorded((9, 0)) as found:
        marked = lambda *given: forward_ends.append(len(found)) or backward(*given)  # noqa: E731
        with mock.patch.object(module, "backward", marked, create=True):
            run()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder):
        seconds = [spent(lambda launch=launch: compile_for(90, *launch)) for launch in found]
    ends = [0, *forward_ends, len(found)]
    spans = zip(("forward", "backward"), ends, ends[1:], strict=False)
    whole = (f"{way} {sum(seconds[first:last]):.1f} s" for way, first, last in spans)
    each = (f"{kernel.__name__} {s:.1f}" for (kernel, *_), s in zip(found, seconds, strict=True))
    return f"{op}, {name}: {', '.join(whole)} ({', '.join(each)})"


def spent(run) -> float:
    """Processor time of this process and of those that it ran, as a quiet core would take."""
    began = sum(os.times()[:4])
    run()
    return sum(os.times()[:4]) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="one op alone; default: all")
    parser.add_argument("--arch", type=int, nargs="+", help=f"default: {' '.join(map(str, ARCHS))}")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--few", action="store_true", help="not every case for every architecture")
    parser.add_argument("--cold", action="store_true", help="time compiling, with nothing in the cache")
    given = parser.parse_args()
    CHOSEN.extend(case for case in cases() if given.op in (None, case[0]))
    if given.cold:
        for case in CHOSEN:
            print(cold(*case), flush=True)
        return
    rows = []
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        chosen = tasks(given.arch or ARCHS, given.few)
        for made in pool.map(case_rows, *zip(*chosen, strict=True), [not given.few] * len(chosen)):
            rows += made
            for made_row in () if given.json else made:
                print("  ".join(f"{key} {value}" for key, value in made_row.items()), flush=True)
    if given.json:
        print(json.dumps(rows))
    elif given.op is None and given.arch is None and not given.few:
        rows += [row for row in json.loads(RESULTS.read_text()) if row["case"] == "CUDA"]  # of cuda_resources.py
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


if __name__ == "__main__":
    main()
