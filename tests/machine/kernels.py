"""Small kernels written as text, for the machine's own tests, and launches of them on arrays."""

import functools
import struct

import numpy as np
import torch

from tests.machine.machine import execute
from tests.machine.parse import parse

HEAD = ".version 8.8\n.target sm_{arch}\n.address_size 64\n"
REGISTERS = ".reg .pred %p<16>;\n.reg .b16 %h<32>;\n.reg .b32 %r<64>;\n.reg .b64 %rd<32>;\n"
ELEMENTWISE = 128  # threads a block


def kernel(body: str, pointers: int = 1, shared: int = 0, arch: str = "90a", declarations: str = "") -> str:
    """A module with one kernel of pointers %rd0, %rd1, ..., thread %r0, block %r1, thread of the grid %r2, and bytes `s`."""
    parameters = ", ".join(f".param .u64 p{n}" for n in range(pointers))
    loads = "".join(f"ld.param.u64 %rd{n}, [p{n}];\n" for n in range(pointers))
    array = f".shared .align 128 .b8 s[{shared}];\n" if shared else ""
    where = "mov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ntid.x;\nmad.lo.u32 %r2, %r1, %r2, %r0;\n"
    return (
        f"{HEAD.format(arch=arch)}.visible .entry k({parameters})\n{{\n{REGISTERS}{declarations}{array}{loads}{where}"
        f"{body}\nret;\n}}\n"
    )


@functools.lru_cache(512)
def parsed(text: str):
    return parse(text)["k"]


def launch(text: str, *arrays: np.ndarray, threads: int = 32, blocks: int = 1, shared: int = 0, **options) -> None:
    """Run a kernel on arrays, which it may write."""
    tensors = [torch.from_numpy(a.reshape(-1).view(np.uint8)) for a in arrays]
    parameters = struct.pack(f"<{len(arrays)}Q", *(t.data_ptr() for t in tensors))
    execute(parsed(text), (blocks,), threads, shared, parameters, tensors=tensors, **options)


def elementwise(instructions: str, dtype, *inputs, arch: str = "90a", **options) -> np.ndarray:
    """What instructions write to d, of this type, for each element of the inputs: registers a, b, c, e, f."""
    inputs = [np.ascontiguousarray(x) for x in np.broadcast_arrays(*inputs)]
    count, dtype = inputs[0].size, np.dtype(dtype)
    declared = [f".reg .b{max(16, 8 * x.itemsize)} {name};" for name, x in zip("abcef", inputs, strict=False)]
    declared.append(f".reg .b{max(16, 8 * dtype.itemsize)} d;\n")
    loads = "".join(
        f"mad.wide.u32 %rd9, %r2, {x.itemsize}, %rd{n + 1};\nld.global.b{8 * x.itemsize} {name}, [%rd9];\n"
        for n, (name, x) in enumerate(zip("abcef", inputs, strict=False))
    )
    body = (
        f"setp.ge.u32 %p0, %r2, {count};\n@%p0 bra END;\n{loads}{instructions}\n"
        f"mad.wide.u32 %rd9, %r2, {dtype.itemsize}, %rd0;\nst.global.b{8 * dtype.itemsize} [%rd9], d;\nEND:"
    )
    text = kernel(body, 1 + len(inputs), arch=arch, declarations=" ".join(declared))
    out = np.zeros(count, dtype)
    launch(text, out, *inputs, threads=ELEMENTWISE, blocks=-(-count // ELEMENTWISE), **options)
    return out.reshape(inputs[0].shape)
