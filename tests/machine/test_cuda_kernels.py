"""The CUDA kernels as NVRTC compiles them, inline assembly and all, on the machine: some of the cases of tests/native/cuda.

Those run in a process of their own, in which the machine stands in for one chip. All of them on another chip:

    NVFP4_MACHINE=90 TRITON_INTERPRET=0 pytest tests/native/cuda/quantize_cases.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _nvrtc

ROOT = Path(__file__).parent.parent.parent
# What mma.sync, cp.async, split sums, Philox and the transform need, on the oldest chip; E2M1 by cvt on a newer one.
CASES = {
    80: [
        "matmul_cases.py::test_tokens[9]",
        "matmul_cases.py::test_splits_add_up_in_order[1]",
        "matmul_cases.py::test_every_code_under_every_scale_is_exact",
        "matmul_groups_cases.py::test_loads[few each]",
        "quantize_cases.py::test_recipe[row1-col1-dtype1]",
        "state_update_cases.py::test_shapes[dtype1-2-17-2-200]",
        "state_update_cases.py::test_bits_of_sixteen_bit_inputs[dtype1-True]",
    ],
    100: ["quantize_cases.py::test_recipe[row0-None-dtype0]"],
}

pytestmark = pytest.mark.skipif(_nvrtc.missing() is not None, reason="no NVRTC")


@pytest.mark.parametrize("arch", CASES)
def test_cases(arch):
    environment = {**os.environ, "NVFP4_MACHINE": str(arch), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    nodes = [f"tests/native/cuda/{case}" for case in CASES[arch]]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0 and f"{len(nodes)} passed" in last and "skipped" not in last, (
        done.stdout + done.stderr
    )[-6000:]
