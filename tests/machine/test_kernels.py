"""Kernels as they are compiled for each generation, executed on the machine: some of their own tests, a process for each chip.

All tests of a file, on any chip (CUDA kernels by NVRTC, tests/native/cuda; Triton's by Triton, tests/ops):
    TRITON_INTERPRET=0 NVFP4_MACHINE=120 python -m pytest -p tests.machine.plugin tests/ops/test_quantize_triton.py
and what `nvfp4 check` asks: python -m tests.machine.check 120
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _nvrtc, _triton

ROOT = Path(__file__).parent.parent.parent
CUDA, TRITON = "tests/native/cuda/", "tests/ops/"
CHOSEN = {
    80: [  # mma.sync, ldmatrix, cp.async, split sums, Philox, the transform; operands decoded, no FP8 conversions
        CUDA + "matmul_cases.py::test_tokens[9]",
        CUDA + "matmul_cases.py::test_splits_add_up_in_order[1]",
        CUDA + "matmul_cases.py::test_every_code_under_every_scale_is_exact",
        CUDA + "matmul_groups_cases.py::test_loads[few each]",
        CUDA + "quantize_cases.py::test_recipe[row1-col1-dtype1]",
        CUDA + "state_update_cases.py::test_shapes[dtype1-2-17-2-200]",
        CUDA + "state_update_cases.py::test_bits_of_sixteen_bit_inputs[dtype1-True]",
        TRITON + "test_quantize_triton.py::test_equals_brute_force[1e-38-stochastic]",
        TRITON + "test_matmul_triton.py::test_shapes[1x16-16-16-16]",
        TRITON + "test_matmul_triton.py::test_all_scale_bytes[bf16]",
        TRITON + "test_experts_triton.py::test_expert_mlp[dtype0-1-2]",
    ],
    90: [  # wgmma, A from registers and from shared memory, both turned too; bf16, fp16, tf32; groups; a cluster of four
        CUDA + "matmul_sm90_cases.py::test_sizes[128-64-250-128]",
        CUDA + "matmul_sm90_cases.py::test_sizes[257-16-128-256]",
        CUDA + "matmul_sm90_cases.py::test_every_code_under_every_scale_is_exact[128]",
        CUDA + "matmul_sm90_cases.py::test_results[dtype0-parts]",
        CUDA + "mixer_scan_cases.py::test_steps_and_decays_at_their_limits",
        TRITON + "test_matmul_triton.py::test_all_scale_bytes[bf16]",
        TRITON + "test_matmul_triton.py::test_all_scale_bytes[fp16]",
        TRITON + "test_matmul_triton.py::test_all_scale_bytes[fp32]",
        TRITON + "test_experts_triton.py::test_grouped_matmul[dtype0-mixed]",
        TRITON + "test_experts_triton.py::test_grouped_matmul_of_odd_sizes[300-48]",
        TRITON + "test_experts_triton.py::test_ties_go_by_index_and_nan_comes_first",
        TRITON + "test_state_update_triton.py::test_noise_is_philox_and_the_rule_bit_for_bit[8-dtype0]",
        TRITON + "test_gated_rms_norm_triton.py::test_sixteen_bits_round_once[dtype0]",
        TRITON + "test_quantize_groups.py::test_rows_out_of_range_are_zeros_where_nobody_can_say_so",
    ],
    100: [  # tcgen05: block scales in both widths, a ring that comes round, halves of the sums used again; A in tensor memory
        CUDA + "matmul_sm100_cases.py::test_length[128-1856]",
        CUDA + "matmul_sm100_cases.py::test_every_block_persists[192]",
        CUDA + "matmul_sm100_cases.py::test_every_code_under_every_scale",
        CUDA + "matmul_sm100_cases.py::test_results[dtype0-43]",
        CUDA + "quantize_cases.py::test_recipe[row0-None-dtype0]",
        TRITON + "test_matmul_triton.py::test_splits_of_k_change_no_bits_between_runs",
        TRITON + "test_matmul_triton.py::test_shapes[bf16-65-16-640]",
        TRITON + "test_experts_triton.py::test_grouped_matmul[dtype0-mixed]",
        TRITON + "test_experts_triton.py::test_plain_grouped_matmul_of_whole_tiles",
        TRITON + "test_experts_triton.py::test_relu2[dtype1-shape1]",
        TRITON + "test_quantize_triton.py::test_equals_brute_force[1e-38-nearest]",
        TRITON + "test_quantize_triton.py::test_hadamard[shape1-dtype0]",
    ],
    120: [  # mma.sync with block scales, splits of k; the scan by segments
        CUDA + "matmul_sm120_cases.py::test_splits_add_up_in_order[2-40-1024-2]",
        CUDA + "matmul_sm120_cases.py::test_results[dtype0-34]",
        CUDA + "matmul_sm120_cases.py::test_block_scales_that_quantize_never_writes",
        TRITON + "test_matmul_triton.py::test_shapes[1x16-1-33-1856]",
        TRITON + "test_selective_scan_triton.py::test_lengths[segments-64]",
    ],
}


def run(arch: int) -> tuple[int, subprocess.CompletedProcess]:
    """How many tests ought to have passed on a chip, and what came of them."""
    nodes = [node for node in CHOSEN[arch] if node.startswith(TRITON) or _nvrtc.missing() is None]
    changes = dict(NVFP4_MACHINE=str(arch), TRITON_INTERPRET="0", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    changes["NVFP4_CACHE"] = str(ROOT / "build" / "machine")  # not the user's own
    command = [sys.executable, "-m", "pytest", "-p", "tests.machine.plugin", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True)
    return len(nodes), done


@pytest.fixture(scope="module")
def runs(request):
    """{arch: the future of its run}, two at a time."""
    archs = {item.callspec.params["arch"] for item in request.session.items if item.path == request.path}
    with ThreadPoolExecutor(2) as pool:
        yield {arch: pool.submit(run, arch) for arch in CHOSEN if arch in archs}


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("arch", CHOSEN)
def test_chosen(runs, arch):
    count, done = runs[arch].result()
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0 and last.startswith(f"{count} passed") and "skipped" not in last, (
        done.stdout + done.stderr
    )[-6000:]
