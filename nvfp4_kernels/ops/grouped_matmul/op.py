"""grouped_matmul: one matmul for each group of rows that lie together, as the tokens of each expert do, in one call."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack, is_packed, rows_of
from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.formats.packed import STEP, TILE, unpack
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops._check import FLOATS, float_tensor, index_tensor, no_grad, require, rows_within, same_device
from nvfp4_kernels.ops._dispatch import candidates, implementation, select
from nvfp4_kernels.ops._library import register

Rows = Tensor | NVFP4Tensor | MXFP8Tensor


def grouped_matmul(
    a: Rows | Columns,
    b: Tensor | Stack | Columns,
    offsets: Tensor,
    out_dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """y = a @ b.T for each group by itself, summed in fp32, rounded once; group e has the rows offsets[e] to offsets[e + 1].

    a: bf16, fp16 or fp32 (or fp64, then b and y too), any strides, or quantized. out_dtype: that of a plain operand by
        default, bf16 where there is none.
    offsets: int64 [groups + 1], ascending from 0, on a's device; nothing of it is read back to the host.
    b a stack [groups, N, K], plain, NVFP4, MXFP8 or FP8: a is [rows, K], plain, NVFP4Tensor or MXFP8Tensor, its rows in the
        order of the groups; y is [rows, N]. Of a quantized stack's transposes (mT) N is as stored, padding included. Packed
        NVFP4 is read in place by CUDA's kernels for bf16, and unpacked for all others.
    b a plain matrix [N, rows] or Columns of N lines: a is [M, rows] or Columns of M lines, and the sum is divided; y is
        [groups, M, N], zero for a group without rows.
    rows: int64 [rows] on a's device, or None. The rows are gathered as they are read: beside a stack row r is row rows[r] of
        a, beside a plain matrix [N, tokens] it is column rows[r] of b. The bits are those of a product after a gather. Numbers
        out of range are an error on the CPU; on a GPU, which would have to report them to the host, they read zeros (beside
        packed matrices some row of a).

    For a layer y = x w^T of each expert: forward grouped_matmul(x, w, o), the gradient of x
    grouped_matmul(dy, w.mT, o), that of w grouped_matmul(dy.t(), x.t(), o); with x not sorted by expert the first and the last
    take rows. Operands that went through the Hadamard transform must share its signs. A global scale that is not finite makes
    its products NaN.
    Raises TypeError, ValueError or RuntimeError naming the argument.
    """
    return torch.ops.nvfp4.grouped_matmul(*checked(a, b, offsets, out_dtype, rows))


def checked(
    a: Rows | Columns, b: Tensor | Stack | Columns, offsets: Tensor, out_dtype: torch.dtype | None, rows: Tensor | None
) -> tuple:
    """What the registered op takes, as ARGUMENTS says."""
    signs_a, signs_b = (getattr(x, "hadamard", None) for x in (a, b))
    require(signs_a == signs_b, "a and b", f"Hadamard signs {signs_a} and {signs_b}", "the same transform on both")
    left, right = as_parts(a), as_parts(b)
    require(left.values.dim() == 2, "a", f"{left.values.dim()} dimensions", "2, [rows, K], or [M, rows] where b has 2")
    check_stack("a", left, left.values.device)
    index_tensor("offsets", offsets, left.values.device)
    require(offsets.numel() >= 1, "offsets", "no numbers", "[groups + 1]")
    if rows is not None:
        index_tensor("rows", rows, left.values.device)
    check_stack("b", right, left.values.device)
    whole = signs_b is None and not is_packed(right)
    require(whole or not right.turned, "b", "transposes of a rotated or packed form", "transposes of others")
    plain = [x.values.dtype for x in (left, right) if x.scales is None and x.global_scales is None]
    out_dtype = out_dtype or (plain[0] if plain else torch.bfloat16)
    require(out_dtype in (*FLOATS, torch.float64), "out_dtype", out_dtype, "a floating-point type", TypeError)
    types = {*plain, out_dtype}
    mixed = torch.float64 in types and len(types) > 1
    require(not mixed, "a, b and out_dtype", ", ".join(sorted(map(str, types))), "float64 for all or none", TypeError)
    groups, depth = offsets.numel() - 1, length(right)
    if right.values.dim() > 2:
        require(
            not isinstance(a, Columns), "a", "Columns with a stack of matrices", "Columns beside a matrix or Columns"
        )
        require(right.values.shape[0] == groups, "offsets", f"{groups + 1} numbers", f"{len(right.values) + 1}")
        k = length(left) if isinstance(a, Stack) else a.shape[1]
        fits = ceil_to(k, 1 if right.turned else run_of(right)) == depth
    else:
        require(isinstance(a, (Tensor, Columns)), "a", type(a).__name__, "a plain matrix or Columns, as b", TypeError)
        for name, x in (("a", a), ("b", b)):
            if isinstance(x, Columns):
                _check_starts(name, x.starts, offsets)
        if rows is not None:
            require(right.scales is None, "b", "a quantized matrix with rows", "a stack or a plain matrix")
            depth = len(rows)
        k = length(left)
        fits = isinstance(a, Columns) or isinstance(b, Columns) or k == depth
    require(fits, "a and b", f"K = {k} and K = {depth}", "equal K, the last axis of both")
    return (
        *plain_parts(left), getattr(a, "starts", None), *plain_parts(right), getattr(b, "starts", None),
        offsets, rows, str(out_dtype)[6:], right.turned,
    )  # fmt: skip


def as_parts(x: Rows | Stack | Columns) -> Stack:
    """Any operand as values, scales and global scales; a matrix has values of two dimensions."""
    if isinstance(x, Stack):  # isinstance, not match: torch 2.10 traces no class patterns
        return x
    if isinstance(x, Columns):
        return Stack(x.values, x.scales, x.global_scales)
    if isinstance(x, NVFP4Tensor):
        return Stack(x.codes, x.scales, x.global_scale)
    if isinstance(x, MXFP8Tensor):
        return Stack(x.codes, x.scales)
    require(
        isinstance(x, Tensor),
        "a and b",
        type(x).__name__,
        "Tensor, NVFP4Tensor, MXFP8Tensor, Stack, Columns",
        TypeError,
    )
    return Stack(x)


def run_of(x: Stack | Columns) -> int:
    """Values that a row has a multiple of in memory: as many as a block scale is for, 128 of packed ones; 1 without."""
    if x.scales is None:
        return 1
    return 32 if x.global_scales is None else STEP if isinstance(x, Stack) and is_packed(x) else 16


def length(x: Stack | Columns) -> int:
    """Values of a row, padding included."""
    if isinstance(x, Stack) and is_packed(x):
        return x.values.shape[2] * TILE
    if isinstance(x, Stack) and x.turned:
        return x.values.shape[-2]
    return x.values.shape[-1] * (2 if run_of(x) == 16 else 1)


def check_stack(name: str, stack: Stack, device: torch.device) -> None:
    """A matrix or a stack of them, whose parts belong together."""
    values, scales, global_scales = stack[:3]
    if is_packed(stack):
        _check_packed(name, stack, device)
        return
    require(values.dim() in (2, 3), name, f"{values.dim()} dimensions", "3, [groups, N, K], or 2, [N, rows]")
    if scales is None and global_scales is None:
        _check_values(name, values)
    elif scales is None:
        fp8, found = torch.float8_e4m3fn, (values.dtype, global_scales.dtype, tuple(global_scales.shape))
        wanted = fp8, torch.float32, tuple(values.shape[:-2])
        require(values.dim() == 3 and found == wanted, name, f"FP8 {found}", f"{fp8} [groups, N, K], float32 [groups]")
    else:
        codes = values.shape
        if global_scales is None:
            fp8, run, scale = torch.float8_e4m3fn, 32, torch.uint8
            require(values.dtype == fp8, name, f"codes {values.dtype} without global scales", f"{fp8}, MXFP8")
        else:
            run, scale = 8, torch.float8_e4m3fn  # bytes of codes
            require(values.dtype == torch.uint8, name, f"codes {values.dtype}", "uint8 [.., K / 2]")
            single = global_scales.dim() <= 1 and (values.dim() == 2 or global_scales.shape == codes[:1])
            if not single or global_scales.dtype != torch.float32:  # no words are put together for what is right
                found = f"{global_scales.dtype} {list(global_scales.shape)}"
                require(False, name, f"global scales {found}", f"float32 [{codes[0]}]")
        wanted = (*codes[:-1], codes[-1] // run)
        if codes[-1] % run or scales.shape != wanted or scales.dtype != scale:
            require(False, name, f"scales {scales.dtype} {list(scales.shape)}", f"{scale} {list(wanted)}")
    for part in stack[:3]:
        if part is not None:
            same_device(name, part, device)


def _check_packed(name: str, stack: Stack, device: torch.device) -> None:
    values, scales, global_scales = stack[:3]
    shape = tuple(values.shape)
    right = len(shape) == 5 and shape[2] % 2 == 0 and shape[3:] == (32, 4)
    require(right, name, f"packed values {list(shape)}", "[groups, rows / 16, ceil128(cols) / 64, 32, 4]")
    for part, dtype, wanted in (
        (scales, torch.int32, (*shape[:2], shape[2] // 2, 32)),
        (global_scales, torch.float32, shape[:1]),
    ):
        found = None if part is None else (part.dtype, tuple(part.shape))
        require(found == (dtype, wanted), name, f"scales {found}", f"{dtype} {list(wanted)} beside packed values")
    for part in stack[:3]:
        same_device(name, part, device)
        require(part.is_contiguous(), name, f"packed parts with strides {part.stride()}", "contiguous memory")


def _check_values(name: str, x: Tensor) -> None:
    if not (isinstance(x, Tensor) and x.dtype == torch.float64):
        float_tensor(name, x)
    no_grad(name, x, "nk.experts differentiates")


def plain_parts(stack: Stack) -> tuple[Tensor | None, ...]:
    """The three tensors, E4M3 as bytes, for which torch's tools have kernels."""
    values, scales, global_scales = stack[:3]
    if (scales is None and global_scales is None) or is_packed(stack):
        return values, scales, global_scales
    scales = None if scales is None else scales.view(torch.uint8)
    return values.view(torch.uint8), scales, global_scales


def from_parts(values: Tensor, scales: Tensor | None, global_scales: Tensor | None, turned: bool = False) -> Stack:
    """The inverse of plain_parts."""
    if (scales is None) != (global_scales is None):
        return Stack(values.view(torch.float8_e4m3fn), scales, global_scales, turned=turned)
    if scales is None or values.dtype == torch.int32:
        return Stack(values, scales, global_scales)
    return Stack(values, scales.view(torch.float8_e4m3fn), global_scales, turned=turned)


def _check_starts(name: str, starts: Tensor, offsets: Tensor) -> None:
    found = f"starts {starts.dtype} {list(starts.shape)}"
    require(starts.dtype == torch.int64 and starts.shape == offsets.shape, name, found, f"int64 {list(offsets.shape)}")
    require(starts.is_contiguous(), name, f"starts with strides {starts.stride()}", "contiguous memory")
    same_device(name, starts, offsets.device)


def _operand(values: Tensor, scales: Tensor | None, global_scales: Tensor | None, starts: Tensor | None, turned=False):
    parts = from_parts(values, scales, global_scales, turned)
    return parts if starts is None else Columns(*parts[:3], starts)


def as_called(
    a, a_scales, a_global, a_starts, b, b_scales, b_global, b_starts, offsets, rows, out_dtype: str, b_turned=False
) -> tuple:
    """ARGUMENTS as the implementations take them."""
    left, right = _operand(a, a_scales, a_global, a_starts), _operand(b, b_scales, b_global, b_starts, b_turned)
    rows_within(rows, a.shape[0] if b.dim() > 2 else b.shape[1])
    return left, right, offsets, getattr(torch, out_dtype), rows


def _run(*given) -> Tensor:
    left, right, *rest = as_called(*given)
    if isinstance(right, Stack) and is_packed(right) and not reads_packed("grouped_matmul", left, right, *rest):
        right = unpacked(right, length(left))
    return select("grouped_matmul", left, right, *rest).run(left, right, *rest)


def reads_packed(op: str, *arguments) -> bool:
    """Whether the kernels for packed stacks serve the call."""
    return "native" in candidates(op) and implementation(op, "native").refuses(*arguments) is None


def unpacked(stack: Stack, cols: int) -> Stack:
    """A packed stack of matrices of `cols` columns as it was before."""
    return Stack(*unpack(stack.values, stack.scales, cols), *stack[2:]) if is_packed(stack) else stack


def fake(
    a, a_scales, a_global, a_starts, b, b_scales, b_global, b_starts, offsets, rows, out_dtype: str, b_turned=False
) -> Tensor:
    count, right = (a if rows is None else rows).shape[0], from_parts(b, b_scales, b_global, b_turned)
    shape = (count, rows_of(right)) if b.dim() > 2 else (offsets.shape[0] - 1, a.shape[0], b.shape[0])
    return a.new_empty(shape, dtype=getattr(torch, out_dtype))


_OPERANDS = ", ".join(f"Tensor {x}, Tensor? {x}_scales, Tensor? {x}_global, Tensor? {x}_starts" for x in "ab")
ARGUMENTS = f"{_OPERANDS}, Tensor offsets, Tensor? rows, str out_dtype, bool b_turned"
register(f"grouped_matmul({ARGUMENTS}=False) -> Tensor", _run, fake)
