"""The block-scaled product as nvcc compiles it for sm_120, and its operands' layout beside that of Triton's compiler."""

import json
import os
import re
import shutil
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


@needs_triton
def test_as_compiled():
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    from benchmarks import cuda_resources

    row = next(row for row in cuda_resources.rows("matmul", "120f") if row["kernel"] == "block_scaled")
    assert row["spills"] == 0 and row["registers"] * 32 * row["warps"] * 2 <= 65536
    assert 2 * row["shared"] <= 100 << 10  # two blocks a processor; counted with the kilobyte that each takes besides
    # a stage's mmas of a warp; its eight copies of codes, one or four of scales for each operand, before the loop and in it
    assert row["instructions"] == {"OMMA": 64, "LDGSTS": 36}


@needs_triton
def test_layout_is_that_of_triton():
    """Which lane has which codes and scales, for a dot_scaled of two warps' tiles or more: Triton writes layouts as linear
    maps, by the images of the bits of register, lane and warp, as rows and bytes (two codes, or a scale)."""
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
    products = re.findall(r"mma\.sync[^;]*;", ptx)
    assert products and all(".scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3" in text for text in products)
    assert all(text.count("{ 0, 0 }") == 2 for text in products)  # the selectors

    layouts = dict(re.findall(r"(#\w+) = #ttg\.linear<\{(.*?), block = \[\]\}>", ttgir))
    a, a_scales, b, b_scales = re.search(
        r"tt\.dot_scaled .*?: tensor<\d+x\d+xi8, (#.*?)>, tensor<\d+x\d+xf8E4M3FN, (#\w+)> \* "
        r"tensor<\d+x\d+xi8, (#.*?)>, tensor<\d+x\d+xf8E4M3FN, (#\w+)>",
        ttgir,
    ).groups()
    q_and_g = "[1, 0], [2, 0], [4, 0]]"  # the upper three bits of the lane: the row within 8
    assert "register = [[0, 1], [0, 2], [0, 4]" in layouts[a_scales]
    assert (
        "lane = [[8, 0], [0, 0], " + q_and_g in layouts[a_scales]
    )  # lane 4 g + 1 has row g + 8; 4 g + 2, 4 g + 3 repeat
    assert "register = [[0, 1], [0, 2], [0, 4]" in layouts[b_scales]
    assert "lane = [[0, 0], [0, 0], " + q_and_g in layouts[b_scales]
    # b, transposed in registers: four bytes a register, lane 4 g + q from byte 4 q on, the second register 16 bytes on
    turned = re.search(r"tt\.trans .*?: tensor<\d+x\d+xi8, (#\w+)> -> tensor<\d+x\d+xi8, " + re.escape(b), ttgir)[1]
    assert "register = [[0, 1], [0, 2], [0, 16]" in layouts[turned]
    assert "lane = [[0, 4], [0, 8], " + q_and_g in layouts[turned]
    # a, of which Triton writes no more than this: four bytes a register in the fragments of mma.sync, rows of 16 bytes
    assert re.fullmatch(r"#ttg\.dot_op<\{opIdx = 0, parent = #mma, kWidth = 4\}>", a)
    assert re.search(r"#mma = #ttg\.nvidia_mma<\{versionMajor = 2, .*instrShape = \[16, 8\]\}>", ttgir)
