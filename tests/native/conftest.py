"""What reads compiled CUDA kernels, where there is what it needs; and the kernels, each compiled once for all tests."""

import os
import shutil

import pytest

from nvfp4_kernels.ops import _nvrtc, _triton


@pytest.fixture(scope="session")
def resources():
    """benchmarks/cuda_resources.py."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    if _triton.triton is None:
        pytest.skip("no Triton, whose package has the tools that read what was compiled")
    from benchmarks import cuda_resources

    return cuda_resources


@pytest.fixture(scope="session")
def by_nvrtc(tmp_path_factory):
    """by_nvrtc(op, arch): the file of an op's kernels, which all processes that run these tests have in common."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if own.name.startswith("popen-") else own) / "by_nvrtc"

    def made(op, arch):
        cubin = folder / f"{op}-{arch}.cubin"
        if not cubin.exists():
            _nvrtc.write_whole(cubin, _nvrtc.compile_source(op, arch))
        return cubin

    return made


@pytest.fixture(scope="session")
def taken(resources, by_nvrtc):
    """taken(op, arch): the rows of cuda_resources.py, of what a test of NVRTC's compiles anyway; by nvcc where NVRTC is
    older than 13.0, or NVFP4_CUDA=1 asks for nvcc."""
    asked = os.environ.get("NVFP4_CUDA", "0") not in ("", "0")

    def made(op, arch):
        if not asked and _nvrtc.missing() is None and _nvrtc._nvrtc().getVersion() >= (13, 0):
            return resources.rows_of(by_nvrtc(op, arch), op, arch)
        return resources.rows(op, arch)

    return made
