"""What `nvfp4 tune` times: a call for each question that the ops ask (ops/_tuned.py), at sizes of Nano's and Super's layers."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.matmul.op import matmul
from nvfp4_kernels.ops.quantize.op import quantize, quantize_pair
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.state_update.op import state_update

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Make = Callable[[], Callable[[], object]]


class Case(NamedTuple):
    """One call. makes: by backend, a function that draws the inputs and gives the call."""

    name: str
    makes: dict[str, Make]


def cases(device: str, small: bool = False) -> Iterator[Case]:
    """small: sizes for Triton's interpreter."""
    for group in (_quantize, _products, _state_update, _selective_scan, _grouped):
        yield from group(device, small)


def _both(make: Make) -> dict[str, Make]:
    return {"triton": make, "native": make}


def _draw(device: str, *shape: int, dtype=BF16) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _quantize(device: str, small: bool) -> Iterator[Case]:
    plain, noisy, tiled = QuantSpec(), QuantSpec("1x16", "stochastic"), QuantSpec("16x16")
    turned, gradient = QuantSpec(hadamard=DEFAULT_SIGNS), QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)
    for row, col in ((plain, None), (noisy, None), (tiled, tiled), (plain, turned), (noisy, gradient)):

        def make(row=row, col=col):
            x, noise = _draw(device, *((32, 64) if small else (8192, 4096))), torch.tensor([1, 2], device=device)
            return lambda: quantize_pair(x, row, col, noise)

        yield Case(f"quantize {row}, {col}", _both(make))


def _products(device: str, small: bool) -> Iterator[Case]:
    for m, n, k in ((16, 48, 64), (65, 48, 64)) if small else ((16, 4096, 4096), (8192, 4096, 4096)):

        def make(m=m, n=n, k=k):
            a, b = (quantize(_draw(device, rows, k)) for rows in (m, n))
            return lambda: matmul(a, b)

        yield Case(f"matmul NVFP4 x NVFP4 {m}x{n}x{k}", _both(make))
    n, k = (48, 64) if small else (4096, 14336)
    for m in (1, 65) if small else (8, 32, 64, 192, 8192):

        def make(form, m=m):
            a, b = _draw(device, m, k), form(quantize(_draw(device, n, k)))
            return lambda: matmul(a, b)

        makes = {"triton": lambda make=make: make(lambda b: b)}
        if m <= 8:  # a weight is packed, or not, once, for all numbers of rows: the few of decoding decide
            makes["native"] = lambda make=make: make(PackedNVFP4Tensor.pack)
        yield Case(f"matmul bf16 x NVFP4 weight {m}x{n}x{k}", makes)


def _state_update(device: str, small: bool) -> Iterator[Case]:
    heads, head_dim, groups, state = (2, 16, 1, 16) if small else (64, 64, 8, 128)
    for batch in (1, 2) if small else (8, 256):
        for dtype, noisy in ((FP32, False), (FP16, True)):

            def make(batch=batch, dtype=dtype, noisy=noisy):
                kept = _draw(device, batch, heads, head_dim, state, dtype=dtype)
                x, dt = _draw(device, batch, heads, head_dim), _draw(device, batch, heads)
                B, C = (_draw(device, batch, groups, state) for _ in range(2))
                A, D, bias = (-torch.rand(heads, device=device) for _ in range(3))
                noise = torch.tensor([1, 2], device=device) if noisy else None
                return lambda: state_update(kept, x, dt, A, B, C, D, dt_bias=bias, noise=noise)

            yield Case(f"state_update {batch}, {str(dtype)[6:]}", _both(make))


def _selective_scan(device: str, small: bool) -> Iterator[Case]:
    """Forward and backward; the interpreter has no bf16 products."""
    length, heads, head_dim, groups, state = (64, 2, 16, 1, 16) if small else (8192, 64, 64, 8, 128)
    dtype = FP16 if small else BF16

    def make():
        x, dy = (_draw(device, 1, length, heads, head_dim, dtype=dtype) for _ in range(2))
        B, C = (_draw(device, 1, length, groups, state, dtype=dtype) for _ in range(2))
        dt, A = _draw(device, 1, length, heads, dtype=dtype) - 4, -torch.rand(heads, device=device)
        leaves = [t.requires_grad_() for t in (x, dt, A, B, C)]

        def run():
            y = selective_scan(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        return run

    yield Case("selective_scan", {"triton": make})


def _grouped(device: str, small: bool) -> Iterator[Case]:
    """Experts' rows times bf16 weights and NVFP4 ones, and the sums of the weights' gradients."""
    rows, n, k, experts = (32, 48, 64, 4) if small else (49152, 1856, 2688, 128)

    def make(kind: str):
        x, dy = _draw(device, rows, k), _draw(device, rows, n)
        offsets = torch.arange(experts + 1, device=device) * (rows // experts)
        if kind == "sums":
            return lambda: grouped_matmul(dy.t(), x.t(), offsets, FP32)
        w = _draw(device, experts, n, k)
        if kind == "nvfp4":
            q = quantize(w.view(experts * n, k))
            parts = (part.unflatten(0, (experts, n)) for part in (q.codes, q.scales))
            w = Stack(*parts, q.global_scale.repeat(experts))
        return lambda: grouped_matmul(x, w, offsets)

    for kind in ("bf16", "nvfp4", "sums"):
        yield Case(f"grouped_matmul {kind}", {"triton": lambda kind=kind: make(kind)})
