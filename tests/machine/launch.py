"""Puts the machine in the place of a GPU: Triton's launches and those of csrc's kernels are compiled to PTX and executed here.

    with launch.chip(90):
        nvfp4_kernels.ops.quantize.triton.run(x, ...)  # of CPU tensors

A process in which Triton interprets (TRITON_INTERPRET=1) cannot compile with it.
"""

import contextlib
import functools
import struct
from unittest import mock

import torch
import triton

from benchmarks.resources import specialized
from nvfp4_kernels.ops import _cuda, _device, _nvrtc, _triton
from tests.machine.machine import execute
from tests.machine.memory import Fault
from tests.machine.parse import parse

TARGETS = {80: "80", 90: "90a", 100: "100a", 103: "103a", 120: "120f"}
FORMATS = {"f32": "f", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "b8": "B", "b16": "H", "b32": "I", "b64": "Q"}
# What a launch may ask for: blocks on the three axes, and kibibytes of shared memory a block (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
MOST_BLOCKS = 2**31 - 1, 65535, 65535
MOST_SHARED = {80: 163, 90: 227, 100: 227, 103: 227, 120: 99}
LAUNCHED: list[str] = []  # the names of the kernels that ran


@contextlib.contextmanager
def chip(arch: int):
    """Within it, CPU tensors stand for tensors on a GPU of this architecture, to Triton and to the CUDA kernels."""
    capability = divmod(arch, 10)
    before = _triton._recorder, _cuda._model, _device._capability, _device.cuda_target
    _triton._recorder, _cuda._model = functools.partial(launch_triton, arch), functools.partial(launch_cuda, arch)
    _device._capability, _device.cuda_target = lambda device: capability, lambda device: TARGETS[arch]
    try:
        yield LAUNCHED
    finally:
        _triton._recorder, _cuda._model, _device._capability, _device.cuda_target = before
        LAUNCHED.clear()


def launch_triton(arch: int, kernel, arguments, constants, options, grid) -> None:
    if 0 in grid:
        return
    source, keywords, taken = specialized(arch, kernel, arguments, constants, options)
    with mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", to_ptx):
        compiled = triton.compile(source, **keywords)
    found = parsed(compiled.asm["ptx"])[compiled.metadata.name]
    LAUNCHED.append(found.name)
    parameters = b""
    # after the arguments come two pointers to scratch memory, which no kernel here has
    for (at, size), kind, value in zip(found.parameters.values(), found.parameter_types, [*taken, 0, 0], strict=True):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        if kind.startswith(("u", "b")):
            value = int(value) & (1 << 8 * size) - 1
        parameters = parameters.ljust(at, b"\0") + struct.pack("<" + FORMATS[kind], value)
    if compiled.metadata.global_scratch_size:
        raise NotImplementedError(f"{found.name} wants scratch memory")
    check(arch, grid, compiled.metadata.shared)
    execute(found, grid, found.threads, compiled.metadata.shared, parameters)


def check(arch: int, grid, shared: int) -> None:
    if any(n > most for n, most in zip(grid, MOST_BLOCKS, strict=False)):
        raise Fault(f"a grid of {tuple(grid)}")
    if shared > MOST_SHARED[arch] << 10:
        raise Fault(f"{shared} bytes of shared memory")


def to_ptx(backend=None, stages=None, *rest):
    """Triton's hook into what it compiles by, with a key of its own in Triton's cache: nobody here needs machine code."""
    if stages is None:
        return "PTX alone", "PTX alone"
    stages["cubin"] = lambda ptx, metadata: b""


@functools.lru_cache(256)
def parsed(ptx: str):
    return parse(ptx)


def launch_cuda(arch: int, op: str, kernel: str, grid, threads: int, shared: int, parameters: bytes) -> None:
    LAUNCHED.append(kernel)
    check(arch, grid, shared)
    execute(parsed(cuda_ptx(op, TARGETS[arch]))[kernel], grid, threads, shared, parameters)


@functools.lru_cache
def cuda_ptx(op: str, target: str) -> str:
    return _nvrtc.compile_source(op, target, ptx=True).decode()
