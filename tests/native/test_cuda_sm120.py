"""The block-scaled product as it is compiled for sm_120, and its operands' layout beside that of Triton's compiler."""

import json
import os
import re
import subprocess
import sys

import pytest

from nvfp4_kernels.ops import _triton
from tests.native.test_cuda import ROOT

# Run where Triton compiles and does not interpret.
COMPILED = """
import json
from benchmarks.cases.matmul import case
from benchmarks.resources import compile_for, launches

made = compile_for(120, *launches(case("nvfp4", "nvfp4", 8192, 4096, 4096), 120)[0]).asm
print(json.dumps([made["ptx"], made["ttgir"]]))
"""
needs_triton = pytest.mark.skipif(_triton.triton is None, reason="no Triton")


def test_as_compiled(taken):
    row = next(row for row in taken("matmul", "120f") if row["kernel"] == "block_scaled")
    assert row["spills"] == 0 and row["registers"] * 32 * row["warps"] * 2 <= 65536
    assert 2 * row["shared"] <= 100 << 10  # two blocks a processor; counted with the kilobyte that each takes besides
    # a stage's mmas of a warp; its eight copies of codes, one or four of scales for each operand, before the loop and in it
    assert row["instructions"] == {"OMMA": 64, "LDGSTS": 36}


def computed(ptx: str, register: str, lane: int) -> int:
    """What a register holds in a thread of the first warp, as far as the thread decides: all else counts as 0."""
    if not register.startswith("%r"):
        return int(register)
    op, operands = re.search(rf"^\s*([\w.]+)\s+{re.escape(register)}, (.*);$", ptx, re.M).groups()
    operands = operands.split(", ")
    if operands == ["%tid.x"]:
        return lane
    names = {
        "and.b32": "__and__",
        "or.b32": "__or__",
        "xor.b32": "__xor__",
        "shl.b32": "__lshift__",
        "add.s32": "__add__",
    }
    if op not in names:
        return 0
    x, y = (computed(ptx, operand, lane) for operand in operands)
    return getattr(x, names[op])(y)


def named(ptx: str, address: str, lane: int, rows: int) -> tuple[int, int]:
    """Row and chunk that a lane names; rows of 64 bytes, whose chunks have changed places as in sm120.cuh."""
    place = computed(ptx, address, lane)
    return place >> 6 & rows - 1, (place >> 4 ^ place >> 7) & 3


@needs_triton
def test_layout_is_that_of_triton():
    """Which lane has which codes and scales, for the same tile: codes by the rows that each lane names to ldmatrix in Triton's
    PTX, scales by the layouts in its TTGIR, which are linear maps: the images of each bit of register and lane, as row and
    column."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ptx, ttgir = json.loads(done.stdout)
    products = [re.findall(r"\{ ?([^}]*?) ?\}", text) for text in re.findall(r"mma\.sync\S*4X\S*ue4m3([^;]*);", ptx)]
    loads = dict(re.findall(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 \{(.*?)\}, \[(%r\d+)", ptx))
    pairs = {tuple(four.split(", ")[2 * i : 2 * i + 2]): (four, i) for four in loads for i in (0, 1)}
    copies = dict(re.findall(r"^\s*mov\.b32\s+(%r\d+), (%r\d+);", ptx, re.M))  # made by `apart` for older Triton
    assert len(products) == 32
    for _, a, b, _, a_selectors, b_selectors in products:
        assert a_selectors == b_selectors == "0, 0"
        loaded = tuple(copies.get(register, register) for register in b.split(", "))
        four, half = pairs[loaded]  # of the 128 k: four matrices have b0, b1 of either
        for lane in range(32):
            assert named(ptx, loads[a], lane, 16) == (lane & 15, 2 * half + (lane >> 4))
            assert named(ptx, loads[four], lane, 8) == (lane & 7, lane >> 3)

    layouts = dict(re.findall(r"(#\w+) = #ttg\.linear<\{(.*?), warp", ttgir))
    a, b = re.findall(r"f8E4M3FN, (#\w+)>", re.search(r"tt\.dot_scaled.*", ttgir)[0])
    eight_rows = "[1, 0], [2, 0], [4, 0]]"  # by the upper three bits of the lane
    for layout, lower_bits in ((layouts[a], "[8, 0], [0, 0]"), (layouts[b], "[0, 0], [0, 0]")):
        assert layout.startswith("register = [[0, 1], [0, 2], [0, 4]")  # four scales a register
        assert layout.endswith(f"lane = [{lower_bits}, {eight_rows}")
