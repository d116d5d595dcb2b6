"""Quantization as the papers write it, in plain torch, statement by statement: what every other backend must equal bit for bit.

NVFP4: "Pretraining LLMs with NVFP4", appendix B (scales), C (Hadamard transform), D (stochastic rounding), in the order of
operations that public implementations settled on. Division is written torch.div(tensor, tensor): `number / tensor` is a
reciprocal and a product in torch, two roundings.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats import e2m1, e4m3, philox
from nvfp4_kernels.formats.layout import ceil_to, pad_last
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops.hadamard import reference as hadamard
from nvfp4_kernels.ops.quantize._forms import Groups, Spec, check_ascending, empty_forms

FLT_MAX = torch.finfo(torch.float32).max


def refuses(
    x: Tensor, row: Spec, col: Spec, noise: Tensor | None, groups: Groups | None = None, amax: Tensor | None = None
) -> str | None:
    return None


def run(
    x: Tensor, row: Spec, col: Spec, noise: Tensor | None, groups: Groups | None = None, amax: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Codes, scales and global scale of x [rows, cols] by `row`, then those of x.T by `col`; empty for None.

    x may be a stack [groups, rows, cols]; with `groups` each group of rows is a matrix to the column form.
    amax: fp32 [1, 1] or [1, groups], to be taken for the largest magnitude of x; [3, ...]: also of the row form's transform
        and of the column form's; None: they are found here.
    """
    row_parts, col_parts = empty_forms(x, row, col, groups)
    amax = None if amax is None else amax.abs()
    largest = None if amax is None else amax.amax(1)
    if row is not None:
        for index in range(len(x)) if x.dim() == 3 else (...,):
            _write(row_parts, x[index], row, noise, 0, index, _of(largest, 1))
    advance = int(row is not None and row.stochastic)
    if col is None:
        return (*row_parts, *col_parts)
    if groups is None:
        for index in range(len(x)) if x.dim() == 3 else (...,):
            _write(col_parts, x[index].t(), col, noise, advance, index, _of(largest, 2))
        return (*row_parts, *col_parts)
    offsets, starts, rows = groups
    x = x if rows is None else x.index_select(0, rows)
    check_ascending(offsets, len(x))
    for part in col_parts:
        part.view(torch.uint8).zero_()  # what no group has
    places = zip(offsets.tolist(), offsets.tolist()[1:], starts.tolist(), starts.tolist()[1:], strict=False)
    for group, (begin, end, first, last) in enumerate(places):
        own = None if amax is None else _of(amax[:, group], 2)
        _write(col_parts, x[begin:end].t(), col, noise, advance, group, own, slice(first // col.run, last // col.run))
    return (*row_parts, *col_parts)


def _of(amax: Tensor | None, form: int) -> Tensor | None:
    """[1 or 2]: of the values and, if it is there, of a form's transform."""
    return None if amax is None else amax[::form][:2]


def _write(
    parts,
    x: Tensor,
    spec: QuantSpec,
    noise: Tensor | None,
    advance: int,
    index,
    amax: Tensor | None,
    runs: slice | None = None,
) -> None:
    """Put the form of one matrix where it belongs: matrix `index` of a stack, or group `index` at `runs` of each line."""
    codes, scales, global_scale = parts
    line = scales.shape[-1]
    lines = torch.arange(x.shape[0], device=x.device)[:, None] * line
    block = torch.arange(line, device=x.device)[runs or slice(None)]
    before = index * x.shape[0] * line if runs is None and index is not ... else 0
    made = _form(x, spec, noise, advance, before + lines + block, amax)
    if runs is None:
        codes[index], scales[index] = made[:2]
    else:
        width = 8 if spec.format == "nvfp4" else spec.run
        codes[:, runs.start * width : runs.stop * width], scales[:, runs] = made[:2]
    if spec.format == "nvfp4":
        global_scale[index] = made[2]


def _form(
    x: Tensor, spec: QuantSpec, noise: Tensor | None, advance: int, numbers: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and global scale of one matrix whose blocks have these numbers [rows, runs] in the noise."""
    if spec.format == "mxfp8":
        return _mxfp8(x)
    finite = torch.isfinite(x if given is None else given[0]).all()
    values = x if spec.hadamard is None else hadamard.run(x, spec.hadamard)
    values = torch.where(finite, values.to(torch.float32), 0)
    rows, padded = x.shape[0], ceil_to(x.shape[1], 16)
    blocks = pad_last(values, 16).view(rows, padded // 16, 16)

    amax = _block_amax(blocks, spec)
    scale_max = 256.0 if spec.four_over_six else e4m3.MAX
    known = None if given is None else given[:1] if spec.hadamard is None else given[1:]
    if known is not None and len(known):
        amax_tensor = torch.where(finite, known[0], 0)
    else:
        amax_tensor = amax.amax() if amax.numel() else amax.new_zeros(())
    g_enc = torch.div(_like(scale_max * e2m1.MAX, amax), amax_tensor).clamp(max=FLT_MAX)
    g_enc = torch.where(amax_tensor == 0, 1.0, g_enc)
    g_dec = torch.div(torch.ones_like(g_enc), g_enc)
    if spec.four_over_six:
        scales = _four_over_six(blocks, amax, amax_tensor, g_enc, spec)
    else:
        scales = e4m3.encode(amax * (g_enc * _like(1 / 6, amax)))
    scaled = (blocks * _encode_scale(scales, g_dec)).clamp(-e2m1.MAX, e2m1.MAX)
    if spec.stochastic:
        random = philox.block_bytes(numbers.flatten(), noise, advance).view(blocks.shape)
        codes = e2m1.round_stochastic(scaled, random)
    else:
        codes = e2m1.round_nearest(scaled)
    codes = torch.where(finite, codes, 0)
    global_scale = torch.where(finite, g_dec, torch.nan)
    return e2m1.pack(codes.view(rows, padded)), scales, global_scale


def _block_amax(blocks: Tensor, spec: QuantSpec) -> Tensor:
    """The largest magnitude under each scale, [rows, blocks]; a 16x16 tile's is repeated for its 16 rows."""
    amax = blocks.abs().amax(dim=-1)
    return _over_tiles(amax, torch.amax) if spec.block == "16x16" else amax


def _over_tiles(per_row: Tensor, reduce) -> Tensor:
    """Reduce [rows, blocks] over each 16 rows and give the result back to each of them."""
    rows = per_row.shape[0]
    missing = ceil_to(rows, 16) - rows
    padded = torch.cat([per_row, per_row.new_zeros(missing, per_row.shape[1])])
    return reduce(padded.unflatten(0, (-1, 16)), dim=1).repeat_interleave(16, dim=0)[:rows]


def _encode_scale(scales: Tensor, g_dec: Tensor) -> Tensor:
    """What a block's values are multiplied by, [rows, blocks, 1]: 1 / (scale * g_dec), a zero scale giving FLT_MAX."""
    decode = e4m3.decode(scales) * g_dec
    return torch.div(torch.ones_like(decode), decode).clamp(max=FLT_MAX).unsqueeze(-1)


def _four_over_six(blocks: Tensor, amax: Tensor, amax_tensor: Tensor, g_enc: Tensor, spec: QuantSpec) -> Tensor:
    """The scale that maps the block's largest value to 4, where its error is strictly smaller than mapping it to 6."""
    base = torch.div(amax, _like(6, amax)) * g_enc
    six, four = e4m3.encode(base), e4m3.encode(base * 1.5)
    four_wins = _error(blocks, four, amax_tensor, g_enc, spec) < _error(blocks, six, amax_tensor, g_enc, spec)
    return torch.where(four_wins, e4m3.decode(four), e4m3.decode(six)).to(torch.float8_e4m3fn)


def _error(blocks: Tensor, scales: Tensor, amax_tensor: Tensor, g_enc: Tensor, spec: QuantSpec) -> Tensor:
    """Sum of absolute or squared errors under each scale, fp32, summed in the order of the elements.

    Decoded here as code * scale * amax / (6 * 256), left to right: with any other order exact ties between the two
    candidates fall the other way in about 1 of 10,000 blocks.
    """
    g_dec = torch.div(torch.ones_like(g_enc), g_enc)
    codes = e2m1.round_nearest((blocks * _encode_scale(scales, g_dec)).clamp(-e2m1.MAX, e2m1.MAX))
    decoded = e2m1.values(blocks.device)[codes.long()] * e4m3.decode(scales).unsqueeze(-1) * amax_tensor
    difference = torch.div(decoded, _like(256 * 6, decoded)) - blocks
    error = _in_order(difference.abs() if spec.four_over_six == "mae" else difference.square())
    return _over_tiles(error, _in_order_rows) if spec.block == "16x16" else error


def _in_order(x: Tensor) -> Tensor:
    """Sum over the last axis, first element first (torch.sum is free to choose another order)."""
    total = torch.zeros_like(x[..., 0])
    for element in x.unbind(-1):
        total = total + element
    return total


def _in_order_rows(x: Tensor, dim: int) -> Tensor:
    return _in_order(x.movedim(dim, -1))


def _mxfp8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E4M3 codes and E8M0 scales: the smallest power of two under which the block's amax does not exceed 448."""
    rows, padded = x.shape[0], ceil_to(x.shape[1], 32)
    blocks = pad_last(x.to(torch.float32), 32).view(rows, padded // 32, 32)
    finite = torch.isfinite(blocks).all(dim=-1)
    blocks = torch.where(finite.unsqueeze(-1), blocks, 0)
    mantissa, exponent = torch.frexp(blocks.abs().amax(dim=-1))  # amax = mantissa * 2^exponent, mantissa in [.5, 1)
    exponent = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)  # 448 = 0.875 * 2^9
    exponent = torch.where(mantissa == 0, -127, exponent.clamp(-127, 127))
    codes = e4m3.encode(torch.ldexp(blocks, -exponent.unsqueeze(-1)))
    scales = torch.where(finite, exponent + 127, 255).to(torch.uint8)
    return codes.view(rows, padded), scales, x.new_empty(0, dtype=torch.float32)


def _like(number: float, x: Tensor) -> Tensor:
    return torch.tensor(number, dtype=torch.float32, device=x.device)
