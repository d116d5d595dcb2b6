"""Every Triton kernel compiles for every architecture, at sizes that count, without spilling."""

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
    assert row(compiled)["spills"] == 0
"""
ARCHS = {80, 90, 100, 103, 120}
# mixer_scan launches those of conv_scan and gated_rms_norm
OPS = [op for op, names in _dispatch.TABLE.items() if "triton" in names and op != "mixer_scan"]

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")


@pytest.mark.parametrize("op", OPS)
def test_compiles_everywhere_without_spills(op):
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "resources.py"), "--op", op, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=compiled)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert rows, f"benchmarks/cases/{op}.py has no case"
    for case in {row["case"] for row in rows}:
        assert {row["arch"] for row in rows if row["case"] == case} == ARCHS, case
    spilled = [(row["case"], row["kernel"], row["arch"], row["spills"]) for row in rows if row["spills"]]
    assert not spilled


def test_the_rounding_probe_asks_with_the_instruction_itself():
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=compiled)
    assert done.returncode == 0, done.stderr[-2000:]
