"""Activations, weights and gradients of a layer over 8,192 tokens, and a decoded token: the forms that the recipes ask for."""

import torch

from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops.quantize import triton
from nvfp4_kernels.ops.quantize._forms import Groups

SR = "stochastic"
FORMS = {
    "row": (QuantSpec(), None),
    "row 16x16": (QuantSpec("16x16"), None),
    "row MXFP8": (QuantSpec("1x32"), None),
    "x": (QuantSpec(), QuantSpec(hadamard=DEFAULT_SIGNS)),
    "dy": (QuantSpec("1x16", SR), QuantSpec("1x16", SR, DEFAULT_SIGNS)),
    "weight": (QuantSpec("16x16"), QuantSpec("16x16")),
    "MXFP8": (QuantSpec("1x32"), QuantSpec("1x32")),
    "four_over_six": (QuantSpec(four_over_six="mae"), None),
}


def case(name: str, rows: int, cols: int, dtype: torch.dtype):
    def run():
        x = torch.empty(rows, cols, dtype=dtype, device="meta")
        triton.run(x, *FORMS[name], torch.empty(2, dtype=torch.int64, device="meta"))

    return run


def groups(name: str, rows: int, cols: int, count: int, tokens: int | None = None):
    def run():
        x = torch.empty(tokens or rows, cols, dtype=torch.bfloat16, device="meta")
        noise, places, picked = (torch.empty(n, dtype=torch.int64, device="meta") for n in (2, count + 1, rows))
        row, col = FORMS[name]
        picked, row = (picked, None) if tokens else (None, row)
        triton.run(x, row, col, noise, Groups(places, places, picked))

    return run


CASES = {f"{name} 8192x4096": case(name, 8192, 4096, torch.bfloat16) for name in FORMS}
CASES |= {f"row {rows}x4096": case("row", rows, 4096, torch.bfloat16) for rows in (1, 16)}
CASES["weight 4096x4096 fp32"] = case("weight", 4096, 4096, torch.float32)
CASES |= {f"{name} of 128 groups, 49152x2688": groups(name, 49152, 2688, 128) for name in ("x", "dy")}
CASES["columns of x gathered for 128 groups, 49152x2688"] = groups("x", 49152, 2688, 128, 8192)
