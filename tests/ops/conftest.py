"""The fixture `isa`: the test runs once on each instruction set of the native module that this CPU has."""

import platform

import pytest

from nvfp4_kernels.ops._native import native

ARM = platform.machine() in ("aarch64", "arm64")


@pytest.fixture(params=("scalar", "neon") if ARM else ("scalar", "avx2", "avx512", "avx512bf16"))
def isa(request):
    if native is None:
        pytest.skip("no native module")
    before = native.isa()
    if not native.set_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    native.set_isa(before)
