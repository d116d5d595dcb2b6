"""Triton's kernels as it compiles them for each generation, by a choice of their own tests: what the interpreter does not see.

All of a file, and on another chip:
    TRITON_INTERPRET=0 NVFP4_MACHINE=120 python -m pytest -p tests.machine.plugin tests/ops/test_quantize_triton.py
and what `nvfp4 check` asks: python -m tests.machine.check 120
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _triton

ROOT = Path(__file__).parent.parent.parent
CHOSEN = {
    80: (
        "test_quantize_triton.py::test_golden_bytes[4over6_mae]",
        "test_quantize_triton.py::test_equals_brute_force[1e-38-stochastic]",
        "test_matmul_triton.py::test_all_scale_bytes[bf16]",
    ),
    90: (
        "test_state_update_triton.py::test_noise_is_philox_and_the_rule_bit_for_bit[8-dtype0]",
        "test_gated_rms_norm_triton.py::test_sixteen_bits_round_once[dtype0]",
        "test_quantize_groups.py::test_rows_out_of_range_are_zeros_where_nobody_can_say_so",
        "test_experts_triton.py::test_ties_go_by_index_and_nan_comes_first",
    ),
    100: (
        "test_quantize_triton.py::test_equals_brute_force[1e-38-nearest]",
        "test_quantize_triton.py::test_hadamard[shape1-dtype0]",
        "test_experts_triton.py::test_relu2[dtype1-shape1]",
    ),
    120: ("test_selective_scan_triton.py::test_lengths[segments-64]",),
}


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("arch", CHOSEN)
def test_chosen(arch):
    chosen = [f"tests/ops/{name}" for name in CHOSEN[arch]]
    changes = dict(TRITON_INTERPRET="0", NVFP4_MACHINE=str(arch), CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "pytest", "-p", "tests.machine.plugin", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(chosen)} passed" in done.stdout, done.stdout[-1000:]
