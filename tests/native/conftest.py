"""What reads compiled CUDA kernels, where there is what it needs."""

import shutil

import pytest

from nvfp4_kernels.ops import _triton


@pytest.fixture(scope="session")
def resources():
    """benchmarks/cuda_resources.py."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    if _triton.triton is None:
        pytest.skip("no Triton, whose package has the tools that read what was compiled")
    from benchmarks import cuda_resources

    return cuda_resources
