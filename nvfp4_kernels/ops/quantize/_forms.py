"""What quantize's backends share: the tensors they fill, and what they say of wrong offsets."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import most_runs
from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops._check import require

Spec = QuantSpec | None
# Where groups of rows begin, in x and in the lines of the column form: int64 [groups + 1].
Groups = tuple[Tensor, Tensor]


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
        matrices = (groups[0].shape[0] - 1,)
        runs = most_runs(rows, matrices[0], col.run)

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


def put_amax(amax: Tensor, found: Tensor) -> None:
    """Write amax, [1] or one for each group, where a kernel reads the largest magnitudes of the values: found[..., 0, :]."""
    place = found.view(torch.float32)[..., 0, :]
    torch.abs(amax.expand_as(place), out=place)


def check_ascending(offsets: Tensor, rows: int) -> None:
    """Raise ValueError for offsets that are not ascending numbers from 0 to `rows`."""
    fits = offsets[0] == 0 and offsets[-1] == rows and bool((offsets.diff() >= 0).all())
    require(fits, "offsets", offsets.tolist(), f"ascending numbers from 0 to {rows}, the number of rows")
