"""Operands of grouped GEMMs: one matrix for each group, or the columns of rows that lie together by group."""

from typing import NamedTuple

import torch
from torch import Tensor


class Stack(NamedTuple):
    """One matrix [rows, cols] for each group: plain values, NVFP4 or FP8 with a global scale for each matrix, or MXFP8.

    NVFP4 may be packed, in the layout of formats/packed.py: int32 values [groups, rows / 16, ceil128(cols) / 64, 32, 4] and
    scales [groups, rows / 16, ceil128(cols) / 128, 32].
    """

    values: Tensor  # float, FP8 [groups, rows, cols]; codes uint8 [.., ceil16(cols) / 2], MXFP8 E4M3 [.., ceil32(cols)]
    scales: Tensor | None = None  # E4M3 [.., ceil16(cols) / 16]; MXFP8 uint8 [.., ceil32(cols) / 32]
    global_scales: Tensor | None = None  # NVFP4, FP8: fp32 [groups]
    hadamard: int | None = None  # NVFP4: the sign mask of the transform that each row went through
    turned: bool = False  # NVFP4, MXFP8: the matrices are the transposes of what values and scales say

    @property
    def mT(self) -> "Stack":  # noqa: N802, as torch calls it
        return transposed(self)


# Functions, not properties as mT is: torch 2.10 traces none of a NamedTuple's.


def transposed(stack: Stack) -> Stack:
    """The transposes, nothing moved; not of packed matrices. What was padding of rows is rows of zeros."""
    if stack.scales is None:
        return stack._replace(values=stack.values.mT)
    return stack._replace(turned=not stack.turned)


def is_packed(stack: Stack) -> bool:
    return stack.scales is not None and stack.values.dtype == torch.int32


def rows_of(stack: Stack) -> int:
    """Of a matrix; of a transpose as many as there are values in a stored row, padding included."""
    if stack.turned:
        return stack.values.shape[-1] * (2 if stack.values.dtype == torch.uint8 else 1)
    return stack.values.shape[1] * 16 if is_packed(stack) else stack.values.shape[-2]


class Columns(NamedTuple):
    """x.T of x [rows, cols], sorted by group, quantized along the rows of each group by itself.

    A group's values are padded with zeros to whole blocks (16 values, MXFP8 32) and lie at starts[e] to starts[e + 1] of each
    line. A line is as long as any sizes of the groups could need (most_runs), zeros beyond starts[-1].
    """

    values: Tensor  # uint8 codes [cols, runs * 8], or for MXFP8 E4M3 [cols, runs * 32]
    scales: Tensor  # E4M3 [cols, runs], or for MXFP8 uint8
    global_scales: Tensor | None  # NVFP4: fp32 [groups]
    starts: Tensor  # int64 [groups + 1], multiples of the block, on the device
    hadamard: int | None = None


def most_runs(rows: int, groups: int, run: int) -> int:
    """Blocks of `run` values that the rows of `groups` groups need at most: what sum(ceil(size / run)) cannot exceed."""
    return (rows + (run - 1) * min(rows, groups)) // run


def group_starts(offsets: Tensor, run: int) -> Tensor:
    """Where groups begin when each is padded to a multiple of `run`: int64 [groups + 1] from offsets [groups + 1]."""
    blocks = torch.div(offsets.diff() + (run - 1), run, rounding_mode="floor")
    return torch.cat([offsets.new_zeros(1), blocks.cumsum(0) * run])
