"""What quantize's backends share: the tensors they fill, and what they say of wrong offsets."""

from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import most_runs
from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops._check import require

Spec = QuantSpec | None


class Groups(NamedTuple):
    """Groups of rows, each a matrix to the column form."""

    offsets: Tensor  # int64 [groups + 1]: where they begin
    starts: Tensor  # int64 [groups + 1]: where they begin in the lines of the column form
    rows: Tensor | None = None  # int64: which row of x each row is; None: itself


def empty_forms(
    x: Tensor, row: Spec, col: Spec, groups: Groups | None
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Codes, scales and global scale of each form, not yet filled; all three empty for a form that is not asked for.

    x [rows, cols] (with `groups` the column form's are groups of rows), or a stack [groups, rows, cols].
    """
    rows, cols = x.shape[-2:]
    lead = matrices = x.shape[:-2]
    runs = 0 if col is None else ceil_to(rows, col.run) // col.run
    if groups is not None:
        matrices = (groups.offsets.shape[0] - 1,)
        runs = most_runs((x if groups.rows is None else groups.rows).shape[0], matrices[0], col.run)

    def form(spec: Spec, lines: int, runs: int, matrices) -> tuple[Tensor, Tensor, Tensor]:
        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return x.new_empty(shape, dtype=dtype)

        if spec is None:
            return empty(torch.uint8, 0), empty(torch.uint8, 0), empty(torch.float32, 0)
        if spec.format == "mxfp8":
            codes, scales = empty(torch.float8_e4m3fn, *lead, lines, 32 * runs), empty(torch.uint8, *lead, lines, runs)
            return codes, scales, empty(torch.float32, 0)
        codes, scales = empty(torch.uint8, *lead, lines, 8 * runs), empty(torch.float8_e4m3fn, *lead, lines, runs)
        return codes, scales, empty(torch.float32, *matrices)

    row_runs = 0 if row is None else ceil_to(cols, row.run) // row.run
    return form(row, rows, row_runs, lead), form(col, cols, runs, matrices)


def spares(amax: Tensor | None, row: Spec, col: Spec) -> bool:
    """Whether amax, as a backend's run takes it, leaves nothing to be found of x."""
    turned = any(spec is not None and spec.hadamard is not None for spec in (row, col))
    return amax is not None and (len(amax) == 3 or not turned)


def put_amax(amax: Tensor, found: Tensor) -> None:
    """Write amax where a kernel reads the largest magnitudes of the values, of the row form's transform and of the column
    form's: found [..., 3, programs or groups]."""
    place = found.view(torch.float32)[..., : len(amax), :]
    torch.abs(amax.expand_as(place), out=place)


def exchanged(amax: Tensor | None) -> Tensor | None:
    """amax for forms that change places."""
    return amax if amax is None or len(amax) == 1 else torch.stack((amax[0], amax[2], amax[1]))


def check_ascending(offsets: Tensor, rows: int) -> None:
    """Raise ValueError for offsets that are not ascending numbers from 0 to `rows`."""
    fits = offsets[0] == 0 and offsets[-1] == rows and bool((offsets.diff() >= 0).all())
    require(fits, "offsets", offsets.tolist(), f"ascending numbers from 0 to {rows}, the number of rows")
