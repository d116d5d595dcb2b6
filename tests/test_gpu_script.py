"""benchmarks/gpu/run.py without a GPU: it says so, and its cases run at tiny sizes, the kernels interpreted."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.run import step
from nvfp4_kernels.ops import _dispatch, _triton

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu" / "run.py"


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *arguments], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_it_says_that_there_is_no_gpu():
    assert "no GPU here" in run().stdout


def test_a_step_that_overruns_leaves_nothing_behind(tmp_path):
    done = tmp_path / "done"
    assert step(["bash", "-c", f"(sleep 0.7; touch {done}) & wait"], 0.2) == "stopped after 0.2 s"
    time.sleep(0.8)
    assert not done.exists()
    assert step(["bash", "-c", f"touch {done}; exit 3"], 60).startswith("exit status 3, ") and done.exists()


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_rehearsal():
    done = run("--rehearse")
    assert not done.stderr.strip(), done.stderr[-2000:]
    measured = {
        tuple(line.split(", ")[0:1]) + (line.rsplit(", ", 1)[1].split(":")[0],)
        for line in done.stdout.splitlines()
        if line.endswith(" us")
    }
    for op, names in _dispatch.TABLE.items():
        if op not in (
            "grouped_matmul",
            "grouped_relu2",
            "expert_mlp",
            "route",
            "router_logits",
            "permute",
            "relu2",
            "mixer_step",
            "moe_step",
        ):  # within others
            assert {name for name in names if name != "reference"} <= {
                backend for of, backend in measured if of == op
            }, op
    assert {("moe", "nvfp4_kernels"), ("moe decode", "nvfp4_kernels")} <= measured
