"""The PTX that the Triton kernels write inline, executed by tests/machine: for Triton's interpreter, which runs no inline
assembly."""

import re

import numpy as np
import triton.language as tl

from tests.machine import kernels

THREADS = 128


def execute(asm, constraints, outputs, inputs):
    """What instructions, in which $n are outputs, then inputs, make of words of 32 bits: the outputs' words."""
    names = [f"io{n}" for n in range(outputs + len(inputs))]
    widths = [16 if letter.strip().endswith("h") else 32 for letter in constraints.split(",")]
    declarations = "".join(f".reg .b{width} {name};\n" for width, name in zip(widths, names, strict=True))
    loads, stores = "", ""
    for n, (width, name) in enumerate(zip(widths, names, strict=True)):
        place = f"mad.wide.u32 %rd20, %r2, 4, %rd{n};\n"
        if n < outputs:
            stores += f"{place}st.global.b{width} [%rd20], {name};\n"
        else:
            loads += f"{place}ld.global.b{width} {name}, [%rd20];\n"
    body = re.sub(r"\$(\d+)", lambda m: names[int(m[1])], asm)
    count = inputs[0].size
    text = f"setp.ge.u32 %p0, %r2, {count};\n@%p0 bra END;\n{loads}{body};\n{stores}END:"
    results = [np.zeros(count, np.uint32) for _ in range(outputs)]
    given = [np.ascontiguousarray(x, np.uint32).reshape(-1) for x in inputs]
    module = kernels.kernel(text, len(names), declarations=declarations)
    kernels.launch(module, *results, *given, threads=THREADS, blocks=-(-count // THREADS))
    return results


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack, _semantic=None):
    """A stand-in for tl.inline_asm_elementwise in the interpreter."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    given = [x.handle.data if isinstance(x, tl.tensor) else np.array([x]) for x in args]
    shape = np.broadcast_shapes(*(x.shape for x in given))
    words = [np.broadcast_to(x.astype(np.int64) if x.dtype != np.float32 else x.view(np.uint32), shape) for x in given]
    made = execute(asm, constraints, len(dtypes), [w.astype(np.uint32) for w in words])
    like = next(x for x in args if isinstance(x, tl.tensor))
    results = []
    for word, kind in zip(made, dtypes, strict=True):
        word = word.reshape(shape)
        narrow = {tl.bfloat16: np.uint16, tl.int16: np.int16}.get(kind)
        data = word.astype(narrow) if narrow else word.view(np.float32 if kind == tl.float32 else np.int32)
        results.append(tl.core.tensor(type(like.handle)(data.copy(), kind), tl.block_type(kind, list(shape))))
    return tuple(results) if isinstance(dtype, tuple) else results[0]
