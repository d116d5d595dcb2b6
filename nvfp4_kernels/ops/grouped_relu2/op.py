"""grouped_relu2: the squared ReLU between the experts' two products, taken and differentiated where these leave their sums."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, rows_of
from nvfp4_kernels.ops._check import floating_point, no_grad, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register
from nvfp4_kernels.ops.grouped_matmul.op import ARGUMENTS, Rows, as_called, checked, fake

TAKEN = 12  # arguments of grouped_matmul's


def grouped_relu2(
    a: Rows,
    b: Tensor | Stack,
    offsets: Tensor,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
    amax: bool = False,
    signs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h = grouped_matmul(a, b, offsets, out_dtype, rows) and relu2(h, weights), bit for bit what these two give.

    a, offsets, out_dtype, rows: as nk.grouped_matmul takes them. b: a stack [groups, N, K], not packed.
    weights: float [rows], or None.
    amax: also the largest magnitudes in each group of the second result, fp32 [3, groups], as quantize_groups takes them: of
        the values, not finite where one is not; zeros, a row form's transform being nobody's; of the column form's transform
        with these signs, a 16-bit mask, zeros without. 0 of a group without rows.
    Returns (h [rows, N], relu2(h, weights) [rows, N], amax or None). No gradients: nk.experts has them.
    Raises TypeError, ValueError or RuntimeError naming the argument.
    """
    given = checked(a, _stack(b), offsets, out_dtype, rows)
    _check_weights(weights, (a if rows is None else rows).shape[0], offsets.device)
    h, squared, most = torch.ops.nvfp4.grouped_relu2(*given, weights, amax, signs)
    return h, squared, most if amax else None


def grouped_relu2_backward(
    a: Rows,
    b: Tensor | Stack,
    offsets: Tensor,
    h: Tensor,
    weights: Tensor | None = None,
    again: bool = False,
    amax: bool = False,
    signs: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """With d = grouped_matmul(a, b, offsets) the gradient of relu2(h, weights), in fp32 and never rounded by itself:
    dh = 2 relu(h) weights d, dweights[row] = the sum of relu(h)^2 d, in a fixed order.

    a, b, offsets: as in grouped_relu2. h: [rows, N], floating point, any strides.
    weights: float [rows], or None.
    again: also relu2(h, weights), the bits of forward's: what the second matrix's gradient reads in high precision.
    amax, signs: as in grouped_relu2, of dh.
    Returns (dh [rows, N] of h's type, dweights [rows] of weights' type, relu2(h, weights) [rows, N], amax [3, groups]), None
    for what is not asked for. Raises TypeError, ValueError or RuntimeError naming the argument.
    """
    floating_point("h", h)
    no_grad("h", h, "nk.experts differentiates")
    stack = _stack(b)
    given = checked(a, stack, offsets, h.dtype, None)
    shape = a.shape[0], rows_of(stack)
    require(tuple(h.shape) == shape, "h", f"shape {list(h.shape)}", f"{list(shape)}")
    same_device("h", h, offsets.device)
    _check_weights(weights, len(h), h.device)
    made = torch.ops.nvfp4.grouped_relu2_backward(*given, h, weights, again, amax, signs)
    wanted = True, weights is not None, again, amax
    return tuple(part if want else None for part, want in zip(made, wanted, strict=True))


def _stack(b: Tensor | Stack) -> Stack:
    stack = b if isinstance(b, Stack) else Stack(b)
    require(stack.values.dim() == 3, "b", f"{stack.values.dim()} dimensions", "3, [groups, N, K]")
    return stack


def _check_weights(weights: Tensor | None, count: int, device: torch.device) -> None:
    if weights is not None:
        floating_point("weights", weights)
        no_grad("weights", weights, "nk.experts differentiates")
        require(
            tuple(weights.shape) == (count,), "weights", f"shape {list(weights.shape)}", f"[{count}], one for each row"
        )
        same_device("weights", weights, device)


def _run(*given) -> tuple[Tensor, Tensor, Tensor]:
    call, (weights, *asked) = as_called(*given[:TAKEN]), given[TAKEN:]
    h, squared, most = select("grouped_relu2", *call).run(*call, weights, *asked)
    return h, squared, _or_nothing(most, h)


def _backward(*given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call, (h, weights, *asked) = as_called(*given[:TAKEN]), given[TAKEN:]
    dh, dweights, *parts = select("grouped_relu2", *call).backward(*call[:3], h, weights, *asked)
    dweights = None if weights is None else dweights.to(weights.dtype)
    return dh, *(_or_nothing(part, h) for part in (dweights, *parts))


def _or_nothing(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _fake(*given) -> tuple[Tensor, Tensor, Tensor]:
    h, (_, amax, _) = fake(*given[:TAKEN]), given[TAKEN:]
    return h, torch.empty_like(h), _fake_amax(given, amax)


def _fake_backward(*given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dh, (_, weights, again, amax, _) = fake(*given[:TAKEN]), given[TAKEN:]
    dweights = dh.new_empty(0) if weights is None else torch.empty_like(weights, memory_format=torch.contiguous_format)
    return dh, dweights, torch.empty_like(dh) if again else dh.new_empty(0), _fake_amax(given, amax)


def _fake_amax(given: tuple, amax: bool) -> Tensor:
    offsets = given[8]
    return offsets.new_empty((3, len(offsets) - 1) if amax else 0, dtype=torch.float32)


register(f"grouped_relu2({ARGUMENTS}, Tensor? weights, bool amax, int? signs) -> (Tensor, Tensor, Tensor)", _run, _fake)
register(
    f"grouped_relu2_backward({ARGUMENTS}, Tensor h, Tensor? weights, bool again, bool amax, int? signs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
