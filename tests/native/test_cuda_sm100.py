"""What csrc/matmul/sm100.cuh tells the tensor cores of sm_100, beside what Triton's compiler tells them for the same tile."""

import ctypes
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvfp4_kernels.formats.layout import swizzle_128x4
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.ops import _tensor_map, _triton
from nvfp4_kernels.ops.matmul import _cuda_sm100
from tests.native.test_cuda import build, complaint

ROOT = Path(__file__).parent.parent.parent
FAULTS_SOURCE = Path(__file__).parent / "tcgen05_faults.cu"
SOURCE = """
#include "arch/ptx_sm100.cuh"
extern "C" unsigned long long codes(unsigned at) { return nvfp4::shared_matrix(at, 1024, nvfp4::swizzle_128); }
extern "C" unsigned long long scales(unsigned at) { return nvfp4::shared_matrix(at, 128, nvfp4::no_swizzle); }
extern "C" unsigned kind(unsigned n) { return nvfp4::block_scaled_kind(128, n); }
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The functions the kernels build their descriptors with."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("descriptors")
    (folder / "d.cpp").write_text(SOURCE)
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
        "-Icsrc",
        str(folder / "d.cpp"),
        "-o",
        str(folder / "d.so"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    library = ctypes.CDLL(str(folder / "d.so"))
    library.codes.restype = library.scales.restype = ctypes.c_uint64
    return library


@pytest.fixture(scope="module", params=[128, 256])
def theirs(request):
    """(N, Triton's PTX), by a process that compiles where this one interprets."""
    if _triton.triton is None:
        pytest.skip("no Triton")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "oracles" / "triton_sm100.py"), str(request.param)]
    return request.param, subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout


class Registers:
    """What each register of straight-line PTX holds, as (root, constant): a constant has no root."""

    def __init__(self, ptx):
        self.of = {}
        for line in ptx.splitlines():
            if m := re.match(r"\s*mov\.b32\s+(%r\d+), (-?\d+);", line):
                self.of[m[1]] = (None, int(m[2]))
            elif m := re.match(r"\s*add\.s32\s+(%r\d+), (%r\d+), (-?\d+);", line):
                root, constant = self.value(m[2])
                self.of[m[1]] = (root, constant + int(m[3]))
            elif m := re.match(r"\s*mov\.b64\s+(%rd\d+), \{(%r\d+), (%r\d+)\};", line):
                self.of[m[1]] = (*self.value(m[2]), self.value(m[3])[1])
            elif m := re.match(r"\s*(?:or\.b64|add\.s64)\s+(%rd\d+), (%rd\d+), (\d+);", line):  # Triton 3.6
                self.of[m[1]] = (m[2], int(m[3]) & 0xFFFFFFFF, int(m[3]) >> 32)

    def value(self, name):
        return self.of.get(name, (name, 0))


def test_products(ours, theirs):
    """The kind of product; codes' swizzle and stride; 32 bytes from one K = 64 to the next; four products a stage."""
    n, ptx = theirs
    held = Registers(ptx)
    sums, scales = r"\[ (%r\d+) \+ 0 \]", r"\[ (%r\d+) \+ 0 \], \[ (%r\d+) \+ 0 \]"
    pattern = rf"tcgen05\.mma\S+(?:block16|4X) {sums}, (%rd\d+), (%rd\d+), (%r\d+), {scales}"
    found = re.findall(pattern, ptx)
    assert len(found) >= 4
    high = ours.codes(0) >> 32
    for i, (_, a, b, kind, *_) in enumerate(found):
        assert held.value(kind) == (None, ours.kind(n))
        for name in (a, b):
            _, low, theirs_high = held.of[name]
            assert theirs_high == high
            assert low == (ours.codes(1024 + 32 * (i % 4)) - ours.codes(1024)) & 0xFFFFFFFF


def test_scales(ours, theirs):
    """Atoms of 512 bytes to four columns each; a product reads those of a, and of b atom after atom, next to one another."""
    n, ptx = theirs
    held = Registers(ptx)
    atoms = n // 128
    copies = re.findall(r"tcgen05\.cp\.cta_group::1\.warpx4\.32x128b \[ (%r\d+) \+ 0 \], (%rd\d+);", ptx)
    products = re.findall(r"tcgen05\.mma\S+(?:block16|4X) .*\[ (%r\d+) \+ 0 \], \[ (%r\d+) \+ 0 \], %p", ptx)
    assert len(copies) % (4 + 4 * atoms) == 0 and len(copies) >= 4 + 4 * atoms
    copies = copies[: 4 + 4 * atoms]  # of the first stage
    high, base_offset = ours.scales(0) >> 32, 7 << 17  # without a swizzle the base offset says nothing
    columns, lows = [], []
    for column, matrix in copies:
        root, low, theirs_high = held.of[matrix]
        assert theirs_high & ~base_offset == high
        columns.append(held.value(column)[1])
        lows.append(low)
    assert lows[:4] == [(ours.scales(512 * i) - ours.scales(0)) & 0xFFFFFFFF for i in range(4)]
    first = columns[0]
    assert columns == [first + 4 * i for i in range(4 + 4 * atoms)]  # a's, then b's, product by product
    if atoms == 2:  # in its shared memory b's second 128 rows lie behind the first, in tensor memory beside them
        assert lows[4:8] == [0, 128, 32, 160]
    for i, (a, b) in enumerate(products[:4]):
        assert held.value(a)[1] == first + 4 * i and held.value(b)[1] == first + 16 + 4 * atoms * i


def test_compiled(taken):
    """For both chips that have the instructions: products and copies on the units of their own, no spills."""
    for arch in ("100a", "103a") if os.environ.get("NVFP4_CUDA", "0") not in ("", "0") else ("100a",):
        rows = {row["kernel"]: row for row in taken("matmul", arch)}
        assert not rows["swizzle_scales"]["spills"]
        for width in _cuda_sm100.WIDTHS:
            row = rows[f"tcgen05_{width}"]
            # a stage's four products, a last one's up to three more; both operands' boxes
            assert row["instructions"]["UTCOMMA"] >= 4 and row["instructions"]["UTMALDG"] >= 2
            assert not row["spills"] and row["warps"] == 6
            assert _cuda_sm100.shared_bytes(width) < row["shared"] <= 228 << 10  # 1 KB of which every block has


FAULTS = re.findall(r"\w+", re.search(r"enum Fault : i64 \{(.*?)\}", FAULTS_SOURCE.read_text(), re.S)[1])


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Runs the two products of tcgen05_faults.cu on the model with a fault; (result, what it must be), or RuntimeError."""
    if shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no g++, or fibers for another machine")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    build(library, str(FAULTS_SOURCE.relative_to(ROOT)))
    model = ctypes.CDLL(str(library))
    generator = torch.Generator().manual_seed(1)
    sides = [torch.randint(0, 256, (128, 64), dtype=torch.uint8, generator=generator) for _ in range(2)]
    scales = [torch.randint(40, 80, (128, 8), dtype=torch.uint8, generator=generator) for _ in range(2)]
    quantized = [
        NVFP4Tensor(x, s.view(torch.float8_e4m3fn), torch.tensor(1.0), (128, 128))
        for x, s in zip(sides, scales, strict=True)
    ]
    left, right = (x.dequantize(torch.float32).double() for x in quantized)
    expected = left @ right.t()
    swizzled = [swizzle_128x4(s) for s in scales]

    def run(fault, seed):
        out = torch.full((128, 128), float("nan"))
        maps = [_tensor_map.MODEL.pack(x.data_ptr(), 64, 128, 64, 128, 128).ljust(128, b"\0") for x in sides]
        pointers = struct.pack("QQQq", *(s.data_ptr() for s in swizzled), out.data_ptr(), FAULTS.index(fault))
        parameters = b"".join(maps) + pointers.ljust(64, b"\0")
        told = complaint(model, "faulty_products", 1, 128, 1024 + 2 * 128 * 128 + 2048 + 32, parameters, seed)
        if told:
            raise RuntimeError(told)
        return out, expected

    return run


def test_products_without_a_fault(faulty):
    for seed in range(4):
        out, expected = faulty("none", seed)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_no_fault_passes(faulty, fault):
    """In one order of threads and units at least; in the first, units come as late as they can."""

    def shows(seed):
        try:
            out, expected = faulty(fault, seed)
        except RuntimeError:
            return True
        return not torch.allclose(out.double(), expected, rtol=1e-3, atol=1e-1)

    assert any(map(shows, range(8)))
