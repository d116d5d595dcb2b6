"""quantize: tensors, groups of rows and stacks to NVFP4 or MXFP8, row form and column form from one read of the source."""

from math import prod

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack, group_starts
from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.formats.signs import sign_mask
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops._check import float_tensor, index_tensor, no_grad, require, rows_within, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register
from nvfp4_kernels.ops.quantize._forms import Groups, empty_forms

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
    amax: Tensor | None = None,
) -> Quantized:
    """Quantize `x` along its last axis (along its rows with transpose=True).

    x: [..., cols], bf16, fp16 or fp32, any strides; 2-D for transpose=True and for block "16x16".
    spec: a QuantSpec; or give its fields: block "1x16", "16x16" (NVFP4) or "1x32" (MXFP8), rounding "nearest" or
        "stochastic", hadamard (None, a 16-bit mask or 16 signs), four_over_six (None, "mae", "mse").
    transpose: quantize x.T instead; the result has shape [cols, rows].
    seed: for stochastic rounding, an int or an int64 tensor [2] (seed, offset); None draws one from torch's generator.
    amax: fp32, one element, on x's device: the largest magnitude of x, as whoever made x knows it, which spares the read
        of x that finds it; with the true one the result is the same bit for bit. What is larger saturates at 448 * 6 *
        global_scale (amax itself; 1.75 amax under four_over_six). Of 0 the global scale is 1; NaN or an infinity, as it
        must be where x has one, makes every decoded value NaN. A rotated form still reads x for the amax of its transform,
        unless amax is [2], with that behind: a bf16 value, as the transform's are, whatever it is where the first is not
        finite. "1x32" has no use for either.

    Returns an NVFP4Tensor or MXFP8Tensor of the shape of x (of x.T). cols need be no multiple of anything: blocks are
    padded with zeros inside (a rotated form keeps its padding: the transform mixes it in, so cols becomes ceil16(cols)).
    A NaN or an infinity anywhere makes every decoded value NaN.

    Raises TypeError or ValueError naming the argument; RuntimeError when x requires grad.
    Source: "Pretraining LLMs with NVFP4", appendices B to D; OCP MX v1.0 for "1x32".
    """
    if spec is None:
        spec = QuantSpec(block, rounding, None if hadamard is None else sign_mask(hadamard), four_over_six)
    _specs(spec=spec)
    _check(x, transpose or spec.block == "16x16")
    amax = _amax(x, amax, (2,))
    if amax is not None and len(amax) == 2:
        amax = torch.cat((amax, amax[1:]))  # of either form's transform
    noise = _noise(x, seed, spec.stochastic)
    if transpose:
        return _form(_call(x, None, spec, noise, amax)[3:], spec, (x.shape[1], x.shape[0]))
    return _form(_call(x.reshape(-1, x.shape[-1]), spec, None, noise, amax)[:3], spec, x.shape)


def quantize_pair(
    x: Tensor,
    row: QuantSpec | None,
    col: QuantSpec | None,
    noise: int | Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Quantized | Tensor, Quantized | Tensor]:
    """The row form of `x` and the column form (of x.T), from the same values in one pass; None means high precision.

    x: [rows, cols], bf16, fp16 or fp32, any strides.
    row, col: QuantSpec or None. For None the form is x itself, or x.T as a view.
    noise: for stochastic rounding, int64 [2] (seed, offset). The row form draws at `offset`, the column form at the next
        offset when the row form is stochastic too. None draws a seed from torch's generator.
    amax: as in quantize, for both forms; or [3], with the row form's transform's and the column form's behind. Of a form
        without a transform its place says nothing.

    Returns (row form [rows, cols], column form [cols, rows]). With block "16x16" both decode to the same values.
    Raises as quantize does.
    """
    _specs(row=row, col=col)
    _check(x, True)
    amax = _amax(x, amax, (3,))
    if row is None and col is None:
        return x, x.t()
    stochastic = (row is not None and row.stochastic) or (col is not None and col.stochastic)
    parts = _call(x, row, col, _noise(x, noise, stochastic), amax)
    return (
        x if row is None else _form(parts[:3], row, x.shape),
        x.t() if col is None else _form(parts[3:], col, (x.shape[1], x.shape[0])),
    )


def quantize_groups(
    x: Tensor,
    offsets: Tensor,
    row: QuantSpec | None,
    col: QuantSpec | None,
    noise: int | Tensor | None = None,
    amax: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Quantized | Tensor, Columns | Tensor]:
    """As quantize_pair, where each group of rows is a matrix of its own to the column form: the tokens of each expert.

    x: [rows, cols], bf16, fp16 or fp32, any strides; group e has the rows offsets[e] to offsets[e + 1].
    offsets: int64 [groups + 1], ascending from 0 to rows, on x's device; nothing of it is read back to the host.
    row, col: QuantSpec or None; col of block "1x16" or "1x32". For None the form is x itself, or x.T as a view.
    noise: as in quantize_pair. A block draws by its place in the whole form, so that no two groups share noise.
    amax: as in quantize_pair, but fp32 [groups] or [3, groups], of each group's rows; the row form takes the largest.
    rows: int64 [rows] on x's device, or None. Row r of the groups is row rows[r] of x, gathered as it is read, at the bits of a
        form of gathered rows; for a column form alone, since quantize gives the row form of x at less work. Out of range as in
        nk.grouped_matmul.

    Returns (row form [rows, cols], with one global scale; Columns, with a global scale for each group). A NaN or an infinity
    makes its own group NaN, and all of the row form. A group's values depend on no other group, but for stochastic noise.
    Raises as quantize does, and ValueError for offsets that do not fit.
    """
    _specs(row=row, col=col)
    _check(x, True)
    require(isinstance(offsets, Tensor), "offsets", type(offsets).__name__, "an int64 tensor", TypeError)
    require(offsets.dtype == torch.int64, "offsets", offsets.dtype, "int64", TypeError)
    require(offsets.dim() == 1 and offsets.numel() >= 1, "offsets", f"shape {list(offsets.shape)}", "[groups + 1]")
    same_device("offsets", offsets, x.device)
    amax = _amax(x, amax, (3, len(offsets) - 1))
    require(col is None or col.block != "16x16", "col", "block 16x16", "1x16 or 1x32: tiles would span groups")
    if rows is not None:
        index_tensor("rows", rows, x.device)
        require(row is None, "row", str(row), "None beside rows: the row form is that of x")
        require(col is not None, "col", "None", "a QuantSpec beside rows")
    if col is None:
        return quantize_pair(x, row, None, noise, None if amax is None else amax.abs().amax(1))
    require(
        row is None or row.block != "16x16", "row", "block 16x16", "1x16 or 1x32 beside groups: tiles would span them"
    )
    starts = group_starts(offsets, col.run)
    stochastic = col.stochastic or (row is not None and row.stochastic)
    parts = _call(x, row, col, _noise(x, noise, stochastic), amax, (offsets.contiguous(), starts, rows))
    columns = Columns(*parts[3:5], parts[5] if col.format == "nvfp4" else None, starts, col.hadamard)
    return x if row is None else _form(parts[:3], row, x.shape), columns


def quantize_stack(
    x: Tensor, row: QuantSpec | None, col: QuantSpec | None, noise: int | Tensor | None = None
) -> tuple[Stack, Stack]:
    """Both forms of each matrix of a stack, each with a global scale of its own: the weights of all experts.

    x: [groups, rows, cols], bf16, fp16 or fp32, any strides. row, col, noise: as in quantize_pair; a block draws by its place
    in the whole stack. Returns stacks of the row forms [groups, rows, cols] and the column forms [groups, cols, rows].
    Raises as quantize does.
    """
    _specs(row=row, col=col)
    float_tensor("x", x)
    require(x.dim() == 3, "x", f"{x.dim()} dimensions", "3, [groups, rows, cols]")
    require(x.shape[-1] > 0, "x", f"shape {list(x.shape)}", "a last axis of at least 1")
    no_grad("x", x, "nk.experts differentiates")
    if row is None and col is None:
        return Stack(x), Stack(x.transpose(1, 2))
    stochastic = (row is not None and row.stochastic) or (col is not None and col.stochastic)
    parts = _call(x, row, col, _noise(x, noise, stochastic), None)
    return _stack(x, row, parts[:3]), _stack(x.transpose(1, 2), col, parts[3:])


def _stack(x: Tensor, spec: QuantSpec | None, parts: tuple[Tensor, ...]) -> Stack:
    if spec is None:
        return Stack(x)
    return Stack(*parts[:2], parts[2] if spec.format == "nvfp4" else None, spec.hadamard)


def _specs(**specs: QuantSpec | None) -> None:
    for name, spec in specs.items():
        allowed = "a QuantSpec or None, as QuantSpec('1x16')"
        require(spec is None or isinstance(spec, QuantSpec), name, type(spec).__name__, allowed, TypeError)


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


def _amax(x: Tensor, amax: Tensor | None, whole: tuple[int, ...]) -> Tensor | None:
    """[1, count] or, with those of the transforms, whole[0] of them, [whole[0], count]; None also where nothing has one."""
    if amax is None:
        return None
    count = prod(whole[1:])
    require(isinstance(amax, Tensor), "amax", type(amax).__name__, "a torch.Tensor or None", TypeError)
    require(amax.dtype == torch.float32, "amax", amax.dtype, "float32", TypeError)
    allowed = f"{count} in all, one for each global scale, or {list(whole)}, with the transforms'"
    require(amax.numel() == count or tuple(amax.shape) == whole, "amax", f"shape {list(amax.shape)}", allowed)
    same_device("amax", amax, x.device)
    return amax.detach().reshape(-1, count) if count else None


def _form(parts: tuple[Tensor, ...], spec: QuantSpec, shape) -> Quantized:
    codes, scales, global_scale = parts
    lead = tuple(shape[:-1])
    codes, scales = codes.view(*lead, codes.shape[-1]), scales.view(*lead, scales.shape[-1])
    if spec.format == "mxfp8":
        return MXFP8Tensor(codes, scales, shape)
    # the transform spreads the last values of an axis into its padding, which therefore belongs to the operand
    cols = shape[-1] if spec.hadamard is None else ceil_to(shape[-1], 16)
    return NVFP4Tensor(codes, scales, global_scale, (*lead, cols), spec.hadamard)


def _call(
    x: Tensor,
    row: QuantSpec | None,
    col: QuantSpec | None,
    noise: Tensor | None,
    amax: Tensor | None,
    groups: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor, ...]:
    return torch.ops.nvfp4.quantize(x, str(row or ""), str(col or ""), noise, *groups, amax)


def _parse(row: str, col: str) -> tuple[QuantSpec | None, QuantSpec | None]:
    return QuantSpec.parse(row) if row else None, QuantSpec.parse(col) if col else None


def _groups(offsets: Tensor | None, starts: Tensor | None, rows: Tensor | None) -> Groups | None:
    return None if offsets is None else Groups(offsets, starts, rows)


def _run(
    x: Tensor,
    row: str,
    col: str,
    noise: Tensor | None,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
    rows: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if offsets is not None:
        rows_within(rows, x.shape[0])
    arguments = (x, *_parse(row, col), noise, _groups(offsets, starts, rows), amax)
    return select("quantize", *arguments).run(*arguments)


def _fake(
    x: Tensor,
    row: str,
    col: str,
    noise: Tensor | None,
    offsets: Tensor | None = None,
    starts: Tensor | None = None,
    rows: Tensor | None = None,
    amax: Tensor | None = None,
) -> tuple[Tensor, ...]:
    row_parts, col_parts = empty_forms(x, *_parse(row, col), _groups(offsets, starts, rows))
    return (*row_parts, *col_parts)


register(
    "quantize(Tensor x, str row, str col, Tensor? noise, Tensor? offsets=None, Tensor? starts=None, Tensor? rows=None, "
    "Tensor? amax=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
)
