"""The steps and decays of all tokens, before the scan, and their gradients, after it: [tokens, heads] in and out.

Between the two every kernel reads two fp32 numbers for a token and head, [heads, 2, tokens], formed here once:
    a_i = log2(e) sum of A step over its block, up to and with i: exp(a_i - a_j) of the formulas is exp2(a_i - a_j) here
    log2(step_j): exp2(a_i - a_j + log2(step_j)) is the decay from j to i times step_j, in one exponential
A running minimum follows the sum: rounding in a parallel sum may leave a_i above a_j; so no exponent of a decay is above 0 and
no other kernel has to clamp. This moves 8 bytes a token and head beside dt, 0.5 KB a token at Nano's 64 heads (the forward
floor is 20.6 KB), and no kernel waits for a logarithm and a sum between two matrix products.
"""

from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, tl
from nvfp4_kernels.ops.selective_scan._triton_call import Call
from nvfp4_kernels.ops.selective_scan._triton_plan import locate_block

LOG2E = tl.constexpr(1.4426950408889634)


@jit
def softplus(x):
    """log(1 + exp(x)) to a few units in the last place for any x: log1p(u) = 2 atanh(u / (2 + u)) as a series.

    The approximate logarithm of the GPU is off by 2^-22 absolutely near 1, which is 1e-4 of a step of 1e-3.
    """
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)  # at most 1/3: the first term left out is 1.4e-9 of the sum
    z = s * s
    series = z / 15.0 + 1.0 / 13.0
    series = series * z + 1.0 / 11.0
    series = series * z + 1.0 / 9.0
    series = series * z + 1.0 / 7.0
    series = series * z + 1.0 / 5.0
    series = series * z + 1.0 / 3.0
    series = series * z + 1.0
    return tl.where(x == x, tl.maximum(x, 0.0) + 2.0 * s * series, x)


@jit
def least(a, b):
    return tl.minimum(a, b)


@jit
def steps_kernel(
    dt_ptr, A_ptr, bias_ptr, a_ptr, table_ptr, firsts_ptr, dt_row, dt_token, dt_head, segments, length, tokens,
    heads, low, high,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    _, row, start, left, _, _ = locate_block(
        table_ptr, firsts_ptr, tl.program_id(0), segments, length, BLOCK, SEGMENT, PACKED
    )
    q, head = tl.arange(0, BLOCK)[:, None], tl.program_id(1) * HEADS + tl.arange(0, HEADS)[None, :]
    inside = (q < left) & (head < heads)
    step = tl.load(dt_ptr + row * dt_row + (start + q) * dt_token + head * dt_head, inside, 0.0).to(tl.float32)
    if BIAS:
        step += tl.load(bias_ptr + head, head < heads, 0.0).to(tl.float32)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(step == step, tl.minimum(tl.maximum(step, low), high), step)
    rate = tl.load(A_ptr + head, head < heads, 0.0).to(tl.float32) * LOG2E
    # of what 2^-160 takes nothing is left in fp32; a sum of larger ones would lose the digits of the small ones after them
    decay = step * rate
    a = tl.cumsum(tl.where(inside, tl.where(decay < -160.0, -160.0, decay), 0.0), 0)
    a = tl.where(a == a, tl.associative_scan(a, 0, least), a)
    at = a_ptr + head.to(tl.int64) * 2 * tokens + row * length + start + q
    tl.store(at, a, inside)
    tl.store(at + tokens, tl.log2(step), inside)


@jit
def gradients_kernel(
    sums_ptr, dt_ptr, A_ptr, bias_ptr, ddt_ptr, partial_ptr, table_ptr, firsts_ptr, dt_row, dt_token, dt_head, segments,
    length, tokens, heads, low, high,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr, PIECES: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ddt, and this block's share of dA and ddt_bias, from the sums that the backward pass left for each token."""
    _, row, start, left, _, _ = locate_block(
        table_ptr, firsts_ptr, tl.program_id(0), segments, length, BLOCK, SEGMENT, PACKED
    )
    q, head = tl.arange(0, BLOCK)[None, :], tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = (q < left) & (head < heads)
    raw = tl.load(dt_ptr + row * dt_row + (start + q) * dt_token + head * dt_head, inside, 0.0).to(tl.float32)
    if BIAS:
        raw += tl.load(bias_ptr + head, head < heads, 0.0).to(tl.float32)
    step = raw
    if SOFTPLUS:
        step = softplus(raw)
    step = tl.where(step == step, tl.minimum(tl.maximum(step, low), high), step)
    A = tl.load(A_ptr + head, head < heads, 0.0).to(tl.float32)

    later = tl.zeros([HEADS, BLOCK], tl.float32)  # counts for a token's own decay and those before it
    given = tl.zeros([HEADS, BLOCK], tl.float32)  # counts for the decays after it
    parted = tl.zeros([HEADS, BLOCK], tl.float32)  # counts for its own decay alone
    dstep = tl.zeros([HEADS, BLOCK], tl.float32)
    for piece in range(PIECES):  # unrolled, its loads would all be held in registers at once
        # _triton_backward's PLANES, then those of slices: what a token reads from the state, and a block keeps of it
        sums = sums_ptr + (head.to(tl.int64) * PIECES + piece) * SUMS * tokens + row * length + start + q
        gives = tl.load(sums + 2 * tokens, inside, 0.0)
        given += gives
        dstep += tl.load(sums, inside, 0.0) + gives
        if PRECISION != "tf32x3":
            later += tl.load(sums + tokens, inside, 0.0)
        else:
            parted += tl.load(sums + tokens, inside, 0.0)
        for part in range(3, SUMS):
            later += tl.load(sums + part * tokens, inside, 0.0)
    drate = tl.cumsum(later, 1, reverse=True) + (tl.cumsum(given, 1) - given)
    if PRECISION == "tf32x3":
        drate += parted
    # a step of 0 has no slope: it is clamped, or so far down the softplus that this has none
    dstep = dstep / tl.maximum(step, 1e-37) + A * drate
    ddt = tl.where((step > low) & (step < high), dstep, dstep * 0.0)
    if SOFTPLUS:
        ddt *= tl.sigmoid(raw)
    ddt = tl.where(inside, ddt, 0.0)
    tl.store(ddt_ptr + (row * length + start + q) * heads + head, ddt.to(ddt_ptr.dtype.element_ty), inside)
    share = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * heads + head
    tl.store(share, tl.sum(tl.where(inside, drate * step, 0.0), 1)[:, None], head < heads)
    tl.store(share + heads, tl.sum(ddt, 1)[:, None], head < heads)


def _programs(call: Call) -> tuple[tuple[int, int], dict]:
    """The grid, and what both kernels are compiled for: 32 heads a program, so that rows of dt are read 64 bytes at a time."""
    heads = min(32, next_power_of_2(call.heads))
    rules = dict(SOFTPLUS=call.dt_softplus, BIAS=call.dt_bias is not None, HEADS=heads)
    return (call.plan.block_items, -(-call.heads // heads)), rules | call.plan.constants


def decays(call: Call) -> Tensor:
    """a and b, [heads, 2, tokens]."""
    a = call.new(call.heads, 2, call.tokens)
    grid, constants = _programs(call)
    launch(
        steps_kernel,
        grid,
        *(call.dt, call.A, call.A if call.dt_bias is None else call.dt_bias, a, call.plan.table, call.plan.firsts),
        *(*call.dt.stride(), *call.sizes[:-1], call.low, call.high),
        **constants,
    )
    return a


def gradients(call: Call, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ddt, and dA and ddt_bias in fp32. sums: [heads * pieces, SUMS, tokens], as the backward pass leaves them."""
    ddt = call.new(*call.dt.shape, dtype=call.dt.dtype)
    grid, constants = _programs(call)
    partial = call.new(grid[0], 2, call.heads)
    launch(
        gradients_kernel,
        grid,
        *(sums, call.dt, call.A, call.A if call.dt_bias is None else call.dt_bias, ddt, partial, call.plan.table),
        *(call.plan.firsts, *call.dt.stride(), *call.sizes[:-1], call.low, call.high),
        **constants,
        PIECES=call.pieces,
        SUMS=sums.shape[1],
        PRECISION=call.precision,
        num_warps=8,  # with 4 its tiles would not fit the registers
    )
    dA, dbias = partial.sum(0)
    return ddt, dA, dbias
