"""Compiles csrc/*/cuda.cu with nvcc, without a GPU, and says what each kernel takes, as resources.py does for Triton's.

    python benchmarks/cuda_resources.py [--op matmul] [--arch 80 90a]    writes its rows of benchmarks/results/resources.json

The rows have the case "CUDA". shared: what a kernel has by itself and what a launch adds. slots_a_weight, of kernels that
decode weights for tensor cores: instructions of their main loop, times threads, by the weights that go through in one turn.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.resources import RESULTS, counted, tool
from nvfp4_kernels.ops.matmul import _cuda as matmul
from nvfp4_kernels.ops.matmul import _cuda_sm90 as matmul_sm90
from nvfp4_kernels.ops.matmul import _cuda_sm100 as matmul_sm100
from nvfp4_kernels.ops.matmul import _cuda_sm120 as matmul_sm120
from nvfp4_kernels.ops.mixer_scan import _cuda as mixer_scan
from nvfp4_kernels.ops.quantize import _cuda as quantize

ROOT = Path(__file__).resolve().parent.parent
OPS = tuple(sorted(path.parent.name for path in ROOT.glob("csrc/*/cuda.cu")))
ARCHS = ("80", "90a", "100a", "103a", "120f")  # as in CMakeLists.txt
WARPS = collections.defaultdict(lambda: 4, {f"amax_values_{name}": 8 for name in quantize.NAMES.values()})
WARPS |= {f"weight_only_{form}_{tile}": 8 for form in ("tiles", "parts") for tile in matmul_sm90.COST} | {
    "decode_packed": 8
}
WARPS |= {
    f"mixer_scan_{heads}x{cluster}": 4 * heads for shapes in mixer_scan.SHAPES.values() for heads, cluster in shapes
}
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*)")
WARPS |= {f"tcgen05_{width}": matmul_sm100.THREADS // 32 for width in matmul_sm100.WIDTHS} | {
    "swizzle_scales": matmul_sm100.SCALE_THREADS // 32
}


def launched_with(kernel: str) -> int:
    """Bytes of shared memory that a launch adds."""
    if kernel.startswith(("amax_values", "weight_only_parts", "decode_packed", "swizzle_scales")):
        return 0
    if kernel.startswith("weight_only_tiles"):
        return matmul_sm90.shared_bytes(int(kernel.rsplit("_", 1)[1]))
    if kernel.startswith("tcgen05"):
        return matmul_sm100.shared_bytes(int(kernel.rsplit("_", 1)[1]))
    if kernel == "block_scaled":
        return matmul_sm120.SHARED
    if kernel.startswith("weight_only"):
        return matmul.shared_bytes(int(kernel.rsplit("_", 1)[1]))
    if kernel.startswith("mixer_scan"):
        return mixer_scan.shared_bytes(*map(int, kernel.rsplit("_", 1)[1].split("x")))
    if kernel.startswith("state_update"):
        return 16 * int(kernel.rsplit("_", 1)[1])
    return quantize.shared_bytes(4 if kernel.endswith("fp32") else 2)


def built(source: Path, arch: str, cubin: Path) -> None:
    """Compiles. Raises RuntimeError with nvcc's message, warnings and the losses that ptxas tells of as information included:
    products of a warpgroup that it could not leave on their way."""
    flags = ["-std=c++17", "--fmad=false", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(["nvcc", *flags, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True)
    told = done.stdout + done.stderr
    if done.returncode or "warning" in told or "Performance Loss" in told:
        raise RuntimeError(told[:2000])


def main_loop(sass: str) -> int:
    """Instructions of the shortest loop with all of a kernel's products on tensor cores that stand in any loop."""
    found, places = [], {}
    for line in sass.splitlines():
        label, instruction = re.match(r"(\.L_\w+):", line), INSTRUCTION.match(line)
        if label:
            places[label[1]] = len(found)
        elif instruction:
            found.append(instruction[1])
    products = [i for i, text in enumerate(found) if "HGMMA" in text or "HMMA" in text]
    jumps = ((i, re.search(r"BRA `\((\.L_\w+)\)", text)) for i, text in enumerate(found))
    loops = [(places[to[1]], i + 1) for i, to in jumps if to and places.get(to[1], i + 1) <= i]
    held = [(sum(begin <= i < end for i in products), begin - end) for begin, end in loops]
    return -max(held)[1] if held else 0


def slots(kernel: str, sass: str) -> dict:
    """{"slots_a_weight": thread-instructions of the main loop for each weight} of kernels that decode weights."""
    form = re.fullmatch(r"weight_only_(tiles_)?(\d+)", kernel)
    if not form:
        return {}
    weights = matmul.STEP * (int(form[2]) if form[1] else matmul.ROWS)
    return {"slots_a_weight": round(main_loop(sass) * 32 * WARPS[kernel] / weights, 2)}


def rows(op: str, arch: str) -> list[dict]:
    """What each kernel of an op takes on an architecture. Raises RuntimeError with nvcc's message."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        built(ROOT / "csrc" / op / "cuda.cu", arch, cubin)
        return rows_of(cubin, op, arch)


def rows_of(cubin: Path, op: str, arch: str) -> list[dict]:
    """The same of what was compiled before."""
    usage, sass = tool("cuobjdump", "--dump-resource-usage", str(cubin)), tool("nvdisasm", "-c", str(cubin))
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
    made = []
    for kernel, text in re.findall(r"Function (\w+):\s*(REG:.*)", usage):
        registers, stack, shared = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "SHARED"))
        about = {"op": op, "case": "CUDA", "kernel": kernel, "arch": int(arch.rstrip("af"))}
        taken = {
            "registers": registers,
            "spills": stack,
            "shared": shared + launched_with(kernel),
            "warps": WARPS[kernel],
        }
        made.append(about | taken | slots(kernel, code[kernel]) | {"instructions": counted(code[kernel])})
    return sorted(made, key=lambda row: row["kernel"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, help="one op alone; default: all")
    parser.add_argument("--arch", choices=ARCHS, nargs="+", help=f"default: {' '.join(ARCHS)}")
    given = parser.parse_args()
    tasks = [(op, arch) for op in OPS if given.op in (None, op) for arch in given.arch or ARCHS]
    found = []
    with ThreadPoolExecutor(2) as pool:
        for made in pool.map(lambda task: rows(*task), tasks):
            found += made
            for row in made:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    made = {(row["op"], row["arch"]) for row in found}
    known = json.loads(RESULTS.read_text())
    cuda = [row for row in known if row["case"] == "CUDA" and (row["op"], row["arch"]) not in made] + found
    cuda.sort(key=lambda row: (row["op"], row["arch"], row["kernel"]))
    rows_of_all = [row for row in known if row["case"] != "CUDA"] + cuda
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows_of_all) + "\n]\n")


if __name__ == "__main__":
    main()
