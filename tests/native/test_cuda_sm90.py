"""Hopper's kernels as nvcc compiles them, without a GPU, and what the host model says to wrong uses of wgmma."""

import ctypes
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch

from benchmarks.sass import overwritten
from nvfp4_kernels.ops import _triton
from tests.native.test_cuda import ROOT, build, complaint
from tests.native.test_cuda import pytestmark as needs_model

FAULTS = {
    "none": None,
    "unshown": "copies that no fence has shown",
    "unfenced": "no fence since the last group",
    "a_changed": "A has changed",
    "sums_changed": "sums have changed",
    "b_changed": "B has changed",
    "unswizzled": "other than 128-byte swizzle",
    "not_waited": "products that it never waited for",
    "uneven": "lanes with different operands",
}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    build(library, "tests/native/wgmma_faults.cu", flags=("-Wall", "-Wextra", "-Werror"))
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_model_tells_of(faults, fault):
    for mark in needs_model:
        if mark.args[0]:
            pytest.skip(mark.kwargs["reason"])
    x, out = torch.ones(128, 64, dtype=torch.bfloat16), torch.zeros(128)
    parameters = struct.pack("QQq", x.data_ptr(), out.data_ptr(), list(FAULTS).index(fault))
    told = complaint(faults, "product_with_fault", 1, 128, (16 << 10) + 1024, parameters)
    if FAULTS[fault] is None:
        assert told is None and (out == 32).all()  # ones times ones, 16 deep, twice
    else:
        assert told and FAULTS[fault] in told


def test_descriptor_is_that_of_triton(faults):
    """What Triton's compiler adds to the address of B for the same instruction and layout."""
    if _triton.triton is None:
        pytest.skip("no Triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "oracles" / "triton_sm90.py")]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 4
    faults.nvfp4_swizzled_rows.restype = ctypes.c_uint64
    assert {int(found) for found in re.findall(r"or\.b64\s+%rd\d+, %rd\d+, (\d+);", ptx)} == {
        faults.nvfp4_swizzled_rows(0)
    }
    assert faults.nvfp4_swizzled_rows(0x12340) == faults.nvfp4_swizzled_rows(0) + 0x1234


def test_compiled(resources, tmp_path):
    """No spills, no product that waits for the one before, operand A in registers, and the tensor cores' time not filled by
    other instructions: they leave 8 thread-instructions a weight."""
    cubin = tmp_path / "matmul.cubin"
    resources.built(ROOT / "csrc" / "matmul" / "cuda.cu", "90a", cubin)
    usage, sass = (
        resources.tool("cuobjdump", "--dump-resource-usage", str(cubin)),
        resources.tool("nvdisasm", "-c", str(cubin)),
    )
    code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
    assert len(code) == 9 and set(re.findall(r"STACK:(\d+)", usage)) == {"0"}
    for slabs, rows in ((1, 128), (2, 256)):
        kernel = code[f"weight_only_tiles_{rows}"]
        found = re.findall(r"HGMMA\.(\S+) R\d+, (\S+), gdesc\[UR\d+\], R\d+", kernel)
        # eight k-steps, each with operand A in four registers
        assert len(found) == 8 * slabs and all(form == "64x128x16.F32.BF16" and a[0] == "R" for form, a in found)
        assert len({a for _, a in found}) >= 4 * slabs  # of the products on their way and of the next
        assert not overwritten(kernel)
        without_waits = re.sub(r"WARPGROUP\.DEPBAR\S* gsb0, 0x\d", "NOP", kernel)
        assert len(overwritten(without_waits)) > 8 * slabs
        assert 0 < resources.slots(f"weight_only_tiles_{rows}", kernel)["slots_a_weight"] < 6.5


def test_serialized_products_are_told_of(resources, tmp_path):
    """The kernel with a sum touched while products are on their way: ptxas only informs of it."""
    folder = tmp_path / "matmul"
    shutil.copytree(ROOT / "csrc" / "matmul", folder)
    kernel = (folder / "sm90.cuh").read_text()
    assert kernel.count("    wait_products<1>();") == 1
    kernel = kernel.replace("    wait_products<1>();", "    sums[0][3] *= 1.5f;\n    wait_products<1>();")
    (folder / "sm90.cuh").write_text(kernel)
    with pytest.raises(RuntimeError, match="wgmma.mma_async instructions are serialized"):
        resources.built(folder / "cuda.cu", "90a", tmp_path / "matmul.cubin")
