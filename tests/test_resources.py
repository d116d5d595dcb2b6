"""Every Triton kernel compiles for every architecture, at sizes that count, without spilling."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _dispatch, _triton

ROOT = Path(__file__).parent.parent
PROBE = """
import torch
from benchmarks.resources import compile_for, row
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.testing.rounding_probe import probe
import nvfp4_kernels.testing.rounding_probe as module

module.answers = lambda codes: []
for arch in (100, 103):
    with _triton.recorded(divmod(arch, 10)) as found:
        assert probe("meta") == []
    (launch,) = found
    compiled = compile_for(arch, *launch)
    assert "cvt.rs.satfinite.e2m1x4.f32" in compiled.asm["ptx"]
    assert row(compiled, disassembled=False)["spills"] == 0  # the nvdisasm of Triton 3.6 does not know sm_103
"""
ARCHS = {80, 90, 100, 103, 120}
# mixer_scan launches those of conv_scan and gated_rms_norm
OPS = [op for op, names in _dispatch.TABLE.items() if "triton" in names and op != "mixer_scan"]
# The product of NVFP4 operands on each generation's tensor cores, decoded where they know no FP4
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCOMMA", 103: "UTCOMMA", 120: "OMMA"}
TENSOR_CORES = {"UTCHMMA", *PRODUCTS.values()}
OLD = _triton.version[:2] == (3, 6)  # takes a few registers more, in some kernels more than there are

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def compiled():
    """Rows of what is compiled here and now: every kernel for every architecture, each case for one."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "resources.py"), "--few", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def committed():
    """Rows of what was compiled last: every case for every architecture."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "resources.json").read_text())
    return [row for row in rows if row["case"] != "CUDA"]


@pytest.mark.parametrize("op", OPS)
def test_compiles_everywhere_without_spills(op, compiled, committed):
    rows, told = ([row for row in found if row["op"] == op] for found in (compiled, committed))
    assert rows, f"benchmarks/cases/{op}.py has no case"
    assert {row["arch"] for row in rows} == ARCHS and {row["case"] for row in rows} == {row["case"] for row in told}
    kernels = {(row["kernel"], row["arch"]) for row in told}
    assert {(row["kernel"], row["arch"]) for row in rows} == kernels
    for case in {row["case"] for row in told}:
        assert {row["arch"] for row in told if row["case"] == case} == ARCHS, case
    assert not [spilled(row) for row in told if row["spills"]]
    most = (160 if op == "selective_scan" else 8) if OLD else 0
    assert not [spilled(row) for row in rows if row["spills"] > most]
    assert not [row for row in rows + told if "overwritten" in row]


def spilled(row: dict) -> tuple:
    return row["case"], row["kernel"], row["arch"], row["spills"]


def test_tensor_cores(compiled, committed):
    """By kernel those in the PTX that the table has of the SASS; NVFP4 times NVFP4 by each generation's own."""
    found, told = (products(rows) for rows in (compiled, committed))
    assert found == {where: told[where] for where in found}
    for arch, name in PRODUCTS.items():
        where = "matmul", "nvfp4 x nvfp4 8192x4096x4096", arch
        assert name in set().union(*(names for (*at, _), names in found.items() if tuple(at) == where))


def products(rows: list[dict]) -> dict[tuple[str, str, int, str], set[str]]:
    """{(op, case, arch, kernel): tensor-core instructions}"""
    found = collections.defaultdict(set)
    for row in rows:
        found[row["op"], row["case"], row["arch"], row["kernel"]] |= row["instructions"].keys() & TENSOR_CORES
    return found


def test_the_rounding_probe_asks_with_the_instruction_itself():
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=compiled)
    assert done.returncode == 0, done.stderr[-2000:]
