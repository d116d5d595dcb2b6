"""The squared ReLU where a tile of products leaves its program: forward taken of the values as they are rounded, backward of
those that forward left. Bytes a value, bf16: 4 written; 2 read and 2 written, or 4 with the squares once more."""

from nvfp4_kernels.ops._triton import jit, tl
from nvfp4_kernels.ops._triton_numerics import BF16_MAX, as_fp32, bits, largest, nearest_bf16, one, rounded
from nvfp4_kernels.ops.matmul._triton_tiles import scaled

# Columns at once, at most: beside the sums of 128 x 256 the registers have no room for what is read and made of all of them.
# With their transform 64 take up to 164 registers on sm_100, 32 fewer than 128, which leave room for a second block.
COLS = tl.constexpr(32)


@jit
def halves(x):
    """Butterflies of the last axis."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))
    return a + b, a - b


@jit
def turned(x, SIGNS: tl.constexpr):
    """The largest magnitude of the transform along each sixteen rows of x, rounded to bf16, as bits, as `largest` gives it;
    arithmetic and order those of `hadamard`."""
    sign = (SIGNS >> (tl.arange(0, x.shape[0]) % 16)) & 1
    x = x * (0.0625 - 0.125 * sign)[:, None]
    runs = tl.permute(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), (0, 2, 1))
    parts = (runs,)
    for _ in tl.static_range(4):
        made = ()
        for i in tl.static_range(len(parts)):
            made += halves(parts[i])
        parts = made
    most = tl.abs(parts[0])
    for i in tl.static_range(1, 16):
        most = tl.maximum(most, tl.abs(parts[i]))
    most = largest(tl.max(most, 2)) * 4.0
    return nearest_bf16(tl.minimum(most, BF16_MAX))


@jit
def write_relu2(
    sums, m, n, M, N, a_global_ptr, b_global_ptr, out_ptr, h_ptr, weights_ptr, squares_ptr, parts_ptr, amax_ptr, groups,
    rows, FINISH: tl.constexpr, RELU2: tl.constexpr,
):  # fmt: skip
    """FINISH: as `scaled` takes it. RELU2: (backward, there are weights, the squares are wanted, the largest magnitudes are,
    signs of their transform or None).

    Forward: y is h, to out, and relu2(h, weights) to squares. Backward: y is the gradient of relu2(h, weights); that of h to
    out, the squares again if wanted, and the part of the weights' gradient to parts [tiles of at most COLS columns, rows].
    amax: int32 of the group, zero or the largest yet of what forward or backward made, as the bits of fp32, in whose order NaN
    and infinities are last; of integers the largest is the same in any order. Two lines of groups behind: of the transform of
    its columns along the group's rows, of which a tile has whole sixteens, zeros below the last.
    """
    if sums.shape[1] > COLS:
        halves = tl.split(tl.permute(tl.reshape(sums, [sums.shape[0], 2, sums.shape[1] // 2]), (0, 2, 1)))
        for i in tl.static_range(2):
            write_relu2(
                halves[i], m, n + i * (sums.shape[1] // 2), M, N, a_global_ptr, b_global_ptr, out_ptr, h_ptr, weights_ptr,
                squares_ptr, parts_ptr, amax_ptr, groups, rows, FINISH, RELU2,
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
            x = tl.where(inside, as_fp32(made), 0.0)
            tl.atomic_max(one(amax_ptr), largest(bits(x) & 0x7FFFFFFF), sem="relaxed")
            if RELU2[4] is not None:
                tl.atomic_max(one(amax_ptr + 2 * groups), turned(x, RELU2[4]), sem="relaxed")
