"""One launch for all groups, with the squared ReLU behind each tile's sums (ops/grouped_matmul/_triton_relu2.py)."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, rows_of
from nvfp4_kernels.ops.grouped_matmul import triton as grouped_matmul
from nvfp4_kernels.ops.grouped_matmul._triton_relu2 import COLS
from nvfp4_kernels.ops.grouped_matmul.triton import launch_rows, rows_form


def refuses(a: Stack, b: Stack, offsets: Tensor, out_dtype: torch.dtype, rows: Tensor | None) -> str | None:
    return grouped_matmul.refuses(a, b, offsets, out_dtype, rows)


def run(
    a: Stack,
    b: Stack,
    offsets: Tensor,
    out_dtype: torch.dtype,
    rows: Tensor | None,
    weights: Tensor | None,
    amax: bool,
    signs: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    h = torch.empty(len(a.values if rows is None else rows), rows_of(b), dtype=out_dtype, device=a.values.device)
    squares, most = torch.empty_like(h), _most(offsets, amax)
    places = None, _wide(weights), squares, None, most
    launch_rows(
        rows_form(a, b, len(h)), a, b, offsets, rows, h, places, (False, weights is not None, True, amax, signs)
    )
    return h, squares, most.view(torch.float32) if amax else None


def backward(
    a: Stack,
    b: Stack,
    offsets: Tensor,
    h: Tensor,
    weights: Tensor | None,
    again: bool,
    amax: bool,
    signs: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of h and weights, and what else is asked for."""
    form, h, N = rows_form(a, b, len(h)), h.contiguous(), rows_of(b)
    dh, squares, most = torch.empty_like(h), torch.empty_like(h) if again else None, _most(offsets, amax)
    across, weighted = min(form[0].n, COLS.value), weights is not None
    tiles = -(-N // form[0].n) * form[0].n // across  # the last of them may lie beyond N
    parts = torch.empty(tiles, len(h), dtype=torch.float32, device=h.device) if weighted else None
    places = h, _wide(weights), squares, parts, most
    launch_rows(form, a, b, offsets, None, dh, places, (True, weighted, again, amax, signs))
    dweights = parts[: -(-N // across)].sum(0) if weighted else None
    return dh, dweights, squares, most.view(torch.float32) if amax else None


def _wide(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.float().contiguous()


def _most(offsets: Tensor, wanted: bool) -> Tensor | None:
    return offsets.new_zeros(3, len(offsets) - 1, dtype=torch.int32) if wanted else None
