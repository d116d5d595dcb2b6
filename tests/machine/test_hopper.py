"""Hopper's kernels on the machine: csrc's with wgmma and clusters as NVRTC compiles them, Triton's products as Triton does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _nvrtc, _triton

ROOT = Path(__file__).parent.parent.parent
SLABS, SCAN = "tests/native/cuda/matmul_sm90_cases.py::", "tests/native/cuda/mixer_scan_cases.py::"
PRODUCTS, EXPERTS = "tests/ops/test_matmul_triton.py::", "tests/ops/test_experts_triton.py::"

CUDA = [  # A from registers, parts of tiles added up, odd strides; chunks and their tails, a cluster of four and of eight
    SLABS + "test_sizes[100-272-1856-256]",
    SLABS + "test_every_code_under_every_scale_is_exact[128]",
    SLABS + "test_results[dtype0-parts]",
    SCAN + "test_lengths[65-False]",
    SCAN + "test_steps_and_decays_at_their_limits",
]
TRITON = [  # A from registers and from shared memory; fp16, bf16, tf32; tiles of groups
    PRODUCTS + "test_all_scale_bytes",
    EXPERTS + "test_grouped_matmul_of_odd_sizes[300-48]",
]


@pytest.mark.parametrize("compiler, chosen", [("NVRTC", CUDA), ("Triton", TRITON)], ids=["cuda", "triton"])
def test_on_the_machine(compiler, chosen):
    if _triton.triton is None:
        pytest.skip("no Triton")
    if compiler == "NVRTC" and _nvrtc.missing():
        pytest.skip(_nvrtc.missing())
    environment = {**os.environ, "NVFP4_MACHINE": "90", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.machine.plugin", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-6000:]
    assert " skipped" not in done.stdout
