"""sm_100's kernels on the machine, tcgen05 and what it waits for: csrc's as NVRTC compiles them, Triton's as Triton does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _nvrtc, _triton

ROOT = Path(__file__).parent.parent.parent
TILES = "tests/native/cuda/matmul_sm100_cases.py::"
PRODUCTS, EXPERTS = "tests/ops/test_matmul_triton.py::", "tests/ops/test_experts_triton.py::"

CUDA = [  # both widths; a ring that comes round, sets of scales and halves of the sums that are used again
    TILES + "test_length[128-1856]",
    TILES + "test_every_block_persists[192]",
    TILES + "test_every_code_under_every_scale",
    TILES + "test_results[dtype0-43]",
]
TRITON = [  # block scales in tiles of 128 x 128 and 128 x 256, split sums; A in tensor memory: bf16, and tf32 three times
    PRODUCTS + "test_large_products_decode_once[1x16-1x16]",
    PRODUCTS + "test_splits_of_k_change_no_bits_between_runs",
    PRODUCTS + "test_shapes[bf16-65-16-640]",
    PRODUCTS + "test_every_pair_of_kinds[fp32-1x16]",
    EXPERTS + "test_grouped_matmul[dtype0-mixed]",
]


@pytest.mark.parametrize("compiler, chosen", [("NVRTC", CUDA), ("Triton", TRITON)], ids=["cuda", "triton"])
def test_on_the_machine(compiler, chosen):
    if _triton.triton is None:
        pytest.skip("no Triton")
    if compiler == "NVRTC" and _nvrtc.missing():
        pytest.skip(_nvrtc.missing())
    environment = {**os.environ, "NVFP4_MACHINE": "100", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "tests.machine.plugin", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    whole = f"{len(chosen)} passed" in last and "skipped" not in last
    assert done.returncode == 0 and whole, (done.stdout + done.stderr)[-6000:]
