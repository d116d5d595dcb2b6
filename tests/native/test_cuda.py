"""The CUDA kernels on the CPU: csrc/*/cuda.cu compiled with g++ behind csrc/arch/host_model.h, under the address sanitizer.

The cases of tests/native/cuda run in a process of their own, which must have the sanitizer loaded before Python starts.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
CXX = shutil.which("g++")
FLAGS = ["-std=c++17", "-Og", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-Icsrc"]
OPS = sorted(path.parent.name for path in ROOT.glob("csrc/*/cuda.cu"))

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="no g++"),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="the model's fibers are written for x86-64"
    ),
]


def build(library: Path, *sources: str, flags=()) -> None:
    """A library of kernels and their model."""
    command = [CXX, *FLAGS, *flags, "-x", "c++", *sources, "tests/native/cuda/host_model.cpp", "-o", str(library)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:3000]


def complaint(
    library, kernel: str, blocks: int, threads: int, shared: int, parameters: bytes, seed: int = 1
) -> str | None:
    """What the model says to a launch; None when nothing is wrong."""
    message, size = ctypes.create_string_buffer(256), ctypes.c_size_t
    grid, threads = (ctypes.c_uint * 3)(blocks, 1, 1), ctypes.c_uint(threads)
    status = library.nvfp4_model_launch(
        kernel.encode(), grid, threads, size(shared), parameters, size(len(parameters)), ctypes.c_uint64(seed), message
    )
    return message.value.decode() if status else None


@pytest.mark.parametrize("op", OPS)
def test_kernels_on_the_cpu(op, tmp_path):
    library = tmp_path / "kernels.so"
    build(library, f"csrc/{op}/cuda.cu", flags=("-fsanitize=address", "-g1", "-Wall", "-Wextra", "-Werror"))
    # the C++ library too, or the sanitizer finds nobody to hand exceptions to
    preload = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        "NVFP4_HOST_MODEL": str(library),
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-s",
        "-p",
        "no:cacheprovider",
        *map(str, sorted((HERE / "cuda").glob(f"{op}*_cases.py"))),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-6000:]
