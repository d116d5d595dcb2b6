"""The scales of a frozen weight: those of its largest values, or those with the smallest squared error.

The search works on magnitudes in units of the global scale, u = |x| / global_scale, where a block's scale s is an E4M3
number and its values are rounded to s * {0, .5, 1, 1.5, 2, 3, 4, 6}. It tries every E4M3 number that could win:

* Above the scale s0 of the largest value, amax / 6: the eight up to 2 s0. From there on the grid of s / 2, which E4M3
  holds exactly while it is normal, has every value of the grid of s that lies near the block, and more. Where s / 2
  may be subnormal (bytes below 16), all up to byte 15.
* Below s0: as long as clipping the largest value alone, (amax - 6 s)^2, costs less than the best scale so far.

So the outcome equals that of trying all 126 scales, after about 13 of them. The published Nemotron 3 Super checkpoint
chose its scales by such a sweep.
"""

import torch
from torch import Tensor

from nvfp4_kernels.formats import e2m1, e4m3
from nvfp4_kernels.formats.layout import pad_last
from nvfp4_kernels.formats.tensor import NVFP4Tensor
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.quantize.op import quantize

SEARCHES = ("max", "mse")
CHUNK = 1 << 14  # blocks looked at together: 1 MiB of fp32, which stays in a core's cache
SAMPLE = 1 << 11  # blocks by which global scales are compared
# The global scale as a multiple of amax / (6 * 448). Its powers of two change nothing but what underflows; in between, each
# moves the grid of block scales, and those from 1.5 on leave the block of the largest value room for a larger scale. For normal
# values the best of them gains 0.1% of the squared error or less, on a few outliers much more.
MULTIPLES = (1.0, 1.25, 1.5, 1.75)
WORTHWHILE = 0.995  # share of the sample's error from which on a second pass over the whole weight is run


@torch.no_grad()
def quantize_nvfp4(weight: Tensor, search: str = "max", four_over_six: str | None = None) -> NVFP4Tensor:
    """`weight` [rows, cols] in blocks of 1x16.

    search: "max" (each block's largest value becomes 6, as nk.quantize does it) or "mse": the scales, the global one
        among them, with the smallest squared error.
    four_over_six: with "max", let each block choose between 6 and 4 by "mae" or "mse".
    Raises ValueError naming the argument, also for a weight with NaN or infinity.
    """
    require(search in SEARCHES, "search", repr(search), ", ".join(SEARCHES))
    require(
        search == "max" or four_over_six is None, "four_over_six", f"{four_over_six!r} with search {search}",
        "search max (mse tries these two scales among all others)",
    )  # fmt: skip
    require(bool(torch.isfinite(weight).all()), "weight", "NaN or infinity", "finite values")
    if search == "max":
        return quantize(weight.detach(), four_over_six=four_over_six)
    return _smallest_error(weight.detach())


@torch.no_grad()
def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of `weight` and their scale, fp32 []: amax / 448, 1 for a weight of zeros. Raises as quantize_nvfp4."""
    require(bool(torch.isfinite(weight).all()), "weight", "NaN or infinity", "finite values")
    values = weight.detach().float()
    amax = values.abs().amax()
    scale = torch.where(amax == 0, 1.0, (amax / e4m3.MAX).clamp(min=torch.finfo(torch.float32).tiny))
    return e4m3.encode(values / scale), scale


def _smallest_error(weight: Tensor) -> NVFP4Tensor:
    rows, cols = weight.shape
    plain = quantize(weight)
    blocks = pad_last(weight.float(), 16).reshape(-1, 16)
    if not bool(blocks.any()):
        return plain
    # A sample may mislead: the global scale of the largest value is always tried on the whole.
    scales, global_scale, _ = min(
        (_search_all(blocks, plain.global_scale * multiple) for multiple in _worthwhile(blocks, plain.global_scale)),
        key=lambda found: found[2],
    )
    codes = _codes(blocks, scales, global_scale)
    lead = (rows, -1)
    return NVFP4Tensor(codes.view(lead), scales.view(torch.float8_e4m3fn).view(lead), global_scale, (rows, cols))


def _worthwhile(blocks: Tensor, global_scale: Tensor) -> list[float]:
    """The multiples of `global_scale` that are to be tried on all of `blocks`."""
    if len(blocks) <= SAMPLE:
        return list(MULTIPLES)
    sample = blocks[:: len(blocks) // SAMPLE].abs()
    costs = {multiple: _cost(sample, global_scale * multiple) for multiple in MULTIPLES}
    best = min(costs, key=costs.get)
    return [1.0, best] if costs[best] < WORTHWHILE * costs[1.0] else [1.0]


def _cost(magnitudes: Tensor, global_scale: Tensor) -> float:
    """The squared error of blocks [n, 16] under their best scales."""
    error = best_scales(magnitudes / global_scale)[1]
    return float(error.sum(dtype=torch.float64) * global_scale.double() ** 2)


def _search_all(blocks: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, float]:
    """(bytes of the best scales [n], global scale, their squared error) for blocks [n, 16]."""
    scales, total = blocks.new_empty(len(blocks), dtype=torch.uint8), 0.0
    for part, out in zip(blocks.split(CHUNK), scales.split(CHUNK), strict=True):
        found, error = best_scales(part.abs() / global_scale)
        out.copy_(found)
        total += float(error.sum(dtype=torch.float64))
    return scales, global_scale, total * float(global_scale) ** 2


def best_scales(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """The E4M3 byte of the scale with the smallest squared error of each block, and that error in units of the global scale.

    magnitudes: fp32 [n, 16], |x| / global_scale, at most 6 * 448. Of equal errors the scale nearest to amax / 6 wins, the
    larger one first. A block of zeros gets byte 0.
    """
    values = e4m3.decode(torch.arange(127, dtype=torch.uint8, device=magnitudes.device))
    amax = magnitudes.amax(1)
    start = e4m3.encode(amax / 6).view(torch.uint8).long()
    best, error = start.clone(), _error(magnitudes, values[start])

    def consider(candidate: Tensor, rows: Tensor) -> None:
        new = _error(magnitudes[rows], values[candidate])
        won = new < error[rows]
        best[rows[won]], error[rows[won]] = candidate[won], new[won]

    last = torch.where(amax == 0, 0, torch.clamp(start + 7, 15, 126))
    for step in range(1, 16):
        rows = (start + step <= last).nonzero()[:, 0]
        if len(rows):
            consider(start[rows] + step, rows)
    for step in range(1, 126):
        candidate = (start - step).clamp(min=0)
        rows = ((candidate > 0) & ((amax - 6 * values[candidate]).square() < error)).nonzero()[:, 0]
        if len(rows) == 0:
            break  # clipping only grows
        consider(candidate[rows], rows)
    return best.to(torch.uint8), error


def _error(magnitudes: Tensor, scales: Tensor) -> Tensor:
    """Sum of squared errors of [n, 16] under scales [n], fp32."""
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return round_e2m1_(magnitudes / scales).mul_(scales).sub_(magnitudes).square_().sum(1)


def round_e2m1_(x: Tensor) -> Tensor:
    """x >= 0 to the nearest E2M1 values, ties to even, in place: adding 2^(e + 22) to a number of exponent e leaves one
    mantissa bit. formats.e2m1.round_nearest, from which the codes come, looks up tables: 6 times the time."""
    x.clamp_(max=e2m1.MAX)
    exponent = (x.view(torch.int32) & 0x7F800000).clamp_(min=0x3F800000)  # below 1 the step stays .5
    anchor = exponent.add_(22 << 23).view(torch.float32)
    return x.add_(anchor).sub_(anchor)


def _codes(blocks: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """Packed E2M1 codes [n, 8] of blocks [n, 16], as nk.quantize rounds under the same scales."""
    codes = blocks.new_empty(len(blocks), 8, dtype=torch.uint8)
    for part, scale, out in zip(blocks.split(CHUNK), scales.split(CHUNK), codes.split(CHUNK), strict=True):
        decode = e4m3.decode(scale) * global_scale
        encode = torch.div(torch.ones_like(decode), decode).clamp(max=torch.finfo(torch.float32).max)
        out.copy_(e2m1.pack(e2m1.round_nearest((part * encode.unsqueeze(1)).clamp(-e2m1.MAX, e2m1.MAX))))
    return codes
