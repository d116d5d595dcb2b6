"""Kernels that multiply by mma.sync, compiled for sm_120 and sm_80 and executed on the machine: some of their own tests.

Block scales, ldmatrix, cp.async and splits of k on sm_120, in CUDA (where there is NVRTC) and in Triton; decoded operands on
sm_80, which has no FP4 products and no FP8 conversions. Each chip in a process of its own, where Triton compiles and does not
interpret.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _nvrtc, _triton

ROOT = Path(__file__).parent.parent.parent
CUDA, TRITON = "tests/native/cuda/matmul_sm120_cases.py", "tests/ops/test_matmul_triton.py"
EXPERTS = "tests/ops/test_experts_triton.py"
NVRTC = [f"{CUDA}::{case}" for case in (
    "test_splits_add_up_in_order[2-40-1024-2]", "test_results[dtype0-34]", "test_block_scales_that_quantize_never_writes",
)]  # fmt: skip
SELECTED = {
    120: [f"{TRITON}::test_shapes[1x16-1-33-1856]"],
    80: [f"{TRITON}::test_shapes[1x16-16-16-16]", f"{TRITON}::test_all_scale_bytes[bf16]",
         f"{EXPERTS}::test_expert_mlp[dtype0-1-2]"],
}  # fmt: skip


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("arch", SELECTED)
def test_selected(arch):
    tests = SELECTED[arch] + (NVRTC if arch == 120 and _nvrtc.missing() is None else [])
    environment = os.environ | {"NVFP4_MACHINE": str(arch), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "tests.machine.plugin", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{len(tests)} passed" in done.stdout and "skipped" not in done.stdout
