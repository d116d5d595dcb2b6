"""Puts the machine in the place of a GPU: Triton's launches and those of csrc's kernels are compiled to PTX and executed here.

    with launch.chip(90):
        nvfp4_kernels.ops.quantize.triton.run(x, ...)  # of CPU tensors

A process in which Triton interprets (TRITON_INTERPRET=1) cannot compile with it.
"""

import contextlib
import functools
import hashlib
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
OPTIONS: dict = {}  # of machine.execute
# What a launch may ask for: blocks on the three axes, and kibibytes of shared memory a block (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
MOST_BLOCKS = 2**31 - 1, 65535, 65535
MOST_SHARED = {80: 163, 90: 227, 100: 227, 103: 227, 120: 99}
LAUNCHED: list[str] = []  # the names of the kernels that ran


@contextlib.contextmanager
def chip(arch: int, model=None):
    """Within it, CPU tensors stand for tensors on a GPU of this architecture, to Triton and to the CUDA kernels; these a
    `model` may launch in its own way."""
    capability = divmod(arch, 10)
    before = _triton._recorder, _cuda._model, _device._capability, _device.cuda_target
    _triton._recorder = functools.partial(launch_triton, arch)
    _cuda._model = model or functools.partial(launch_cuda, arch)
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
    found = parsed(compiled.asm["ptx"], compiled.metadata.name)
    found.loads_at_once = True
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
    tensors = [value for value in taken if isinstance(value, torch.Tensor)]
    check(arch, grid, compiled.metadata.shared)
    execute(found, grid, found.threads, compiled.metadata.shared, parameters, tensors, **OPTIONS)


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
def parsed(ptx: str, kernel: str):
    return parse(ptx, kernel)[kernel]


def launch_cuda(arch: int, op: str, kernel: str, grid, threads: int, shared: int, parameters: bytes, seed=None) -> None:
    LAUNCHED.append(kernel)
    found = parsed(cuda_ptx(op, TARGETS[arch], kernel), kernel)
    check(arch, grid, shared)
    options = OPTIONS if seed is None else OPTIONS | {"order": seed}
    execute(found, grid, threads, shared, parameters, **options)


def exists(arch: int, op: str, kernel: str) -> bool:
    """Whether an op's source has a kernel for an architecture."""
    return f".entry {kernel}(" in cuda_ptx(op, TARGETS[arch], kernel)


# Before a cuda.cu: all of its kernels but the one called ONLY are templates that nobody asks for. NVRTC takes a minute for all.
ALONE = """#include "arch/kernel.cuh"
#undef NVFP4_KERNEL
#undef NVFP4_CLUSTER_KERNEL
#define WANTED_ONLY ~, 1
#define SECOND(a, b, ...) b
#define IS_WANTED(...) SECOND(__VA_ARGS__, 0, 0)
#define JOIN(a, b) JOINED(a, b)
#define JOINED(a, b) a##b
#define KERNEL_0(name, bounds, Parameters) template <int> static __device__ void name(const Parameters& p)
#define KERNEL_1(name, bounds, Parameters) extern "C" __global__ void bounds name(const __grid_constant__ Parameters p)
#define NVFP4_KERNEL(name, threads, blocks, Parameters) \
    JOIN(KERNEL_, IS_WANTED(WANTED_##name))(name, __launch_bounds__(threads, blocks), Parameters)
#define NVFP4_CLUSTER_KERNEL(name, threads, blocks, cluster, Parameters) \
    JOIN(KERNEL_, IS_WANTED(WANTED_##name))( \
        name, __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, blocks), Parameters)
#line 1
"""


@functools.lru_cache
def cuda_ptx(op: str, target: str, kernel: str) -> str:
    """One kernel of an op, from the cache that has the cubins, if it is there."""
    before = ALONE.replace("ONLY", kernel)
    path = _nvrtc.folder() / f"{_nvrtc.key(op, target)}-{hashlib.sha256(before.encode()).hexdigest()[:16]}.ptx"
    if not path.exists():
        _nvrtc.write_whole(path, _nvrtc.compile_source(op, target, ptx=True, before=before))
    return path.read_text()
