"""The squared ReLU where a tile of products leaves its program: forward taken of the values as they are rounded, backward of
those that forward left. Bytes a value, bf16: 4 written; 2 read and 2 written, or 4 with the squares once more."""

from nvfp4_kernels.ops._triton import jit, tl
from nvfp4_kernels.ops._triton_numerics import as_fp32, bits, rounded
from nvfp4_kernels.ops.matmul._triton_tiles import scaled

# Columns at once, at most: beside the sums of 128 x 256 the registers have no room for what is read and made of all of them.
COLS = tl.constexpr(64)


@jit
def write_relu2(
    sums, m, n, M, N, a_global_ptr, b_global_ptr, out_ptr, h_ptr, weights_ptr, squares_ptr, parts_ptr, amax_ptr, rows,
    FINISH: tl.constexpr, RELU2: tl.constexpr,
):  # fmt: skip
    """FINISH: as `scaled` takes it. RELU2: (backward, there are weights, the squares are wanted, the largest magnitude is).

    Forward: y is h, to out, and relu2(h, weights) to squares. Backward: y is the gradient of relu2(h, weights); that of h to
    out, the squares again if wanted, and the part of the weights' gradient to parts [tiles of at most COLS columns, rows].
    amax: int32 of the group, zero or the largest yet of what forward or backward made, as the bits of fp32, in whose order NaN
    and infinities are last; of integers the largest is the same in any order.
    """
    if sums.shape[1] > COLS:
        halves = tl.split(tl.permute(tl.reshape(sums, [sums.shape[0], 2, sums.shape[1] // 2]), (0, 2, 1)))
        for i in tl.static_range(2):
            write_relu2(
                halves[i], m, n + i * (sums.shape[1] // 2), M, N, a_global_ptr, b_global_ptr, out_ptr, h_ptr, weights_ptr,
                squares_ptr, parts_ptr, amax_ptr, rows, FINISH, RELU2,
            )  # fmt: skip
    else:
        y = scaled(sums, a_global_ptr, b_global_ptr, FINISH)
        row, col = m + tl.arange(0, y.shape[0]), n + tl.arange(0, y.shape[1])
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row[:, None].to(tl.int64) * N + col[None, :]
        weight = tl.full([y.shape[0]], 1.0, tl.float32)
        if RELU2[1]:
            weight = tl.load(weights_ptr + row, row < M, 0.0)
        if RELU2[0]:
            h = as_fp32(tl.load(h_ptr + at, inside, 0))
        else:
            narrow = rounded(y, out_ptr)
            tl.store(out_ptr + at, narrow, inside)
            h = as_fp32(narrow)
        r = tl.where(h < 0, 0.0, h)  # NaN stays
        if RELU2[2]:
            made = rounded(r * r * weight[:, None], squares_ptr)
            tl.store(squares_ptr + at, made, inside)
        if RELU2[0]:
            d = y * r
            made = rounded(d * (2.0 * weight)[:, None], out_ptr)
            tl.store(out_ptr + at, made, inside)
            if RELU2[1]:
                tl.store(parts_ptr + n // y.shape[1] * rows + row, tl.sum(d * r, 1), row < M)
        if RELU2[3]:
            most = tl.max(tl.max(tl.where(inside, bits(as_fp32(made)) & 0x7FFFFFFF, 0), 1), 0)
            tl.atomic_max(amax_ptr, most, sem="relaxed")
