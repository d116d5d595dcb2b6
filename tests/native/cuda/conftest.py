"""Runs the CUDA kernels on the CPU: each launch goes to the library of csrc/arch/host_model.h that NVFP4_HOST_MODEL names, or,
compiled for the architecture that NVFP4_MACHINE names, to the machine of tests/machine.

test_cuda.py builds the library under the address sanitizer and calls these files in a process that has the sanitizer loaded;
tests/machine/test_kernels.py calls some of their cases on the machine.
"""

import contextlib
import ctypes
import os

import pytest

from nvfp4_kernels.ops import _cuda


class Model:
    """Threads run in another order at each launch, `seed` and what follows it, or, with None, one after the other."""

    first_seed = 1

    def __init__(self):
        self.library = ctypes.CDLL(os.environ["NVFP4_HOST_MODEL"])
        self.seed = self.first_seed
        self.kernels = []  # the names of those launched

    def __call__(self, op, kernel, grid, threads, shared, parameters):
        self.kernels.append(kernel)
        message = ctypes.create_string_buffer(256)
        order = 0 if self.seed is None else self.seed
        if self.seed is not None:
            self.seed += 1
        # a copy of exactly the parameters' size, for the sanitizer
        block = ctypes.create_string_buffer(parameters, len(parameters))
        status = self.library.nvfp4_model_launch(
            kernel.encode(),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_size_t(shared),
            block,
            ctypes.c_size_t(len(parameters)),
            ctypes.c_uint64(order),
            message,
        )
        if status:
            raise RuntimeError(message.value.decode())

    @contextlib.contextmanager
    def chip(self):
        before, _cuda._model = _cuda._model, self
        try:
            yield
        finally:
            _cuda._model = before


class Machine:
    """Warps in step with each other, or, at an odd seed, in an order drawn with it, which takes several times as long: only
    where a case asks for it. A case whose kernel is written for another architecture is skipped."""

    first_seed = None

    def __init__(self, arch: int):
        from tests.machine import launch

        self.arch, self.launch = arch, launch
        self.seed, self.kernels = self.first_seed, []

    def __call__(self, op, kernel, grid, threads, shared, parameters):
        self.kernels.append(kernel)
        seed = self.seed if self.seed and self.seed % 2 else None
        if self.seed is not None:
            self.seed += 1
        if not self.launch.exists(self.arch, op, kernel):
            pytest.skip(f"no {kernel} for sm_{self.arch}")
        self.launch.launch_cuda(self.arch, op, kernel, grid, threads, shared, parameters, seed)

    def chip(self):
        return self.launch.chip(self.arch, self)


@pytest.fixture(scope="session")
def library():
    arch = os.environ.get("NVFP4_MACHINE")
    return Machine(int(arch)) if arch else Model()


@pytest.fixture(autouse=True)
def model(library):
    library.seed, library.kernels = library.first_seed, []
    with library.chip():
        yield library
