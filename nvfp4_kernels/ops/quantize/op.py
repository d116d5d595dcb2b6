"""quantize and quantize_pair: tensors to NVFP4 or MXFP8, row form and column form from one read of the source."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.formats.signs import sign_mask
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops._check import float_tensor, no_grad, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register

Quantized = NVFP4Tensor | MXFP8Tensor


def quantize(
    x: Tensor,
    spec: QuantSpec | None = None,
    *,
    block: str = "1x16",
    rounding: str = "nearest",
    hadamard=None,
    transpose: bool = False,
    seed: int | Tensor | None = None,
    four_over_six: str | None = None,
) -> Quantized:
    """Quantize `x` along its last axis (along its rows with transpose=True).

    x: [..., cols], bf16, fp16 or fp32, any strides; 2-D for transpose=True and for block "16x16".
    spec: a QuantSpec; or give its fields: block "1x16", "16x16" (NVFP4) or "1x32" (MXFP8), rounding "nearest" or
        "stochastic", hadamard (None, a 16-bit mask or 16 signs), four_over_six (None, "mae", "mse").
    transpose: quantize x.T instead; the result has shape [cols, rows].
    seed: for stochastic rounding, an int or an int64 tensor [2] (seed, offset); None draws one from torch's generator.

    Returns an NVFP4Tensor or MXFP8Tensor of the shape of x (of x.T). cols need be no multiple of anything: blocks are
    padded with zeros inside (a rotated form keeps its padding: the transform mixes it in, so cols becomes ceil16(cols)).
    A NaN or an infinity anywhere makes every decoded value NaN.

    Raises TypeError or ValueError naming the argument; RuntimeError when x requires grad.
    Source: "Pretraining LLMs with NVFP4", appendices B to D; OCP MX v1.0 for "1x32".
    """
    if spec is None:
        spec = QuantSpec(block, rounding, None if hadamard is None else sign_mask(hadamard), four_over_six)
    _check(x, transpose or spec.block == "16x16")
    noise = _noise(x, seed, spec.stochastic)
    if transpose:
        return _form(_call(x, None, spec, noise)[3:], spec, (x.shape[1], x.shape[0]))
    return _form(_call(x.reshape(-1, x.shape[-1]), spec, None, noise)[:3], spec, x.shape)


def quantize_pair(
    x: Tensor, row: QuantSpec | None, col: QuantSpec | None, noise: int | Tensor | None = None
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """The row form of `x` and the column form (of x.T), from the same values in one pass; None means high precision.

    x: [rows, cols], bf16, fp16 or fp32, any strides.
    row, col: QuantSpec or None. For None the form is x itself, or x.T as a view.
    noise: for stochastic rounding, int64 [2] (seed, offset). The row form draws at `offset`, the column form at the next
        offset when the row form is stochastic too. None draws a seed from torch's generator.

    Returns (row form [rows, cols], column form [cols, rows]). With block "16x16" both decode to the same values.
    Raises as quantize does.
    """
    _check(x, True)
    if row is None and col is None:
        return x, x.t()
    stochastic = (row is not None and row.stochastic) or (col is not None and col.stochastic)
    parts = _call(x, row, col, _noise(x, noise, stochastic))
    return (
        x if row is None else _form(parts[:3], row, x.shape),
        x.t() if col is None else _form(parts[3:], col, (x.shape[1], x.shape[0])),
    )


def _check(x: Tensor, matrix: bool) -> None:
    float_tensor("x", x)
    require(x.dim() >= 1, "x", f"{x.dim()} dimensions", "at least 1")
    require(x.dim() == 2 or not matrix, "x", f"{x.dim()} dimensions", "2, for 16x16 blocks and for a transposed form")
    require(x.shape[-1] > 0, "x", f"shape {list(x.shape)}", "a last axis of at least 1")
    no_grad("x", x, "nk.linear differentiates")


def _noise(x: Tensor, seed: int | Tensor | None, stochastic: bool) -> Tensor | None:
    if not stochastic:
        return None
    if isinstance(seed, Tensor):
        require(seed.dtype == torch.int64, "seed", seed.dtype, "int64", TypeError)
        require(tuple(seed.shape) == (2,), "seed", f"shape {list(seed.shape)}", "[2], (seed, offset)")
        same_device("seed", seed, x.device)
        return seed
    if seed is None:
        return torch.randint(0, 1 << 62, (2,), dtype=torch.int64).to(x.device)
    require(isinstance(seed, int), "seed", type(seed).__name__, "an int, an int64 tensor [2] or None", TypeError)
    seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # any 64 bits, as the two's complement that int64 holds
    return torch.tensor([seed, 0], dtype=torch.int64, device=x.device)


def _form(parts: tuple[Tensor, ...], spec: QuantSpec, shape) -> Quantized:
    codes, scales, global_scale = parts
    lead = tuple(shape[:-1])
    codes, scales = codes.view(*lead, codes.shape[-1]), scales.view(*lead, scales.shape[-1])
    if spec.format == "mxfp8":
        return MXFP8Tensor(codes, scales, shape)
    # the transform spreads the last values of an axis into its padding, which therefore belongs to the operand
    cols = shape[-1] if spec.hadamard is None else ceil_to(shape[-1], 16)
    return NVFP4Tensor(codes, scales, global_scale, (*lead, cols), spec.hadamard)


def _call(x: Tensor, row: QuantSpec | None, col: QuantSpec | None, noise: Tensor | None) -> tuple[Tensor, ...]:
    return torch.ops.nvfp4.quantize(x, str(row or ""), str(col or ""), noise)


def _parse(row: str, col: str) -> tuple[QuantSpec | None, QuantSpec | None]:
    return QuantSpec.parse(row) if row else None, QuantSpec.parse(col) if col else None


def _run(x: Tensor, row: str, col: str, noise: Tensor | None) -> tuple[Tensor, ...]:
    arguments = (x, *_parse(row, col), noise)
    return select("quantize", *arguments).run(*arguments)


def _fake(x: Tensor, row: str, col: str, noise: Tensor | None) -> tuple[Tensor, ...]:
    def form(rows, cols, spec):
        if spec is None:
            return (
                x.new_empty(0, dtype=torch.uint8),
                x.new_empty(0, dtype=torch.uint8),
                x.new_empty(0, dtype=torch.float32),
            )
        padded = ceil_to(cols, spec.run)
        if spec.format == "mxfp8":
            return (
                x.new_empty(rows, padded, dtype=torch.float8_e4m3fn),
                x.new_empty(rows, padded // 32, dtype=torch.uint8),
                x.new_empty(0, dtype=torch.float32),
            )
        return (
            x.new_empty(rows, padded // 2, dtype=torch.uint8),
            x.new_empty(rows, padded // 16, dtype=torch.float8_e4m3fn),
            x.new_empty((), dtype=torch.float32),
        )

    row_spec, col_spec = _parse(row, col)
    return (*form(x.shape[0], x.shape[1], row_spec), *form(x.shape[1], x.shape[0], col_spec))


register(
    "quantize(Tensor x, str row, str col, Tensor? noise) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
