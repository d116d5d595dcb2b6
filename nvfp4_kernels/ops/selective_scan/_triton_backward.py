"""The gradients of x, B, C and D, and of steps and decays but for their sums over a block: every block of tokens by itself.

With the state that a block enters and the gradient of the state it leaves in memory, blocks are independent. A program takes
one block and the heads of one group, one after the other, so that dB or dC is summed over them in registers: no atomics, and
no share of each head in memory (more than MOST heads a group are divided among programs, whose shares are added in order).
Two programs take a block: one its square's columns j (tokens that give: dx, dB), one its rows i (tokens that read: dC). The
sums of both would not fit the registers; side by side, the second reads x and dy from the cache.

    dM_ij = decay_ij (dy_i . x_j)          decay_ij = exp(a_i - a_j) step_j for j <= i
    dx_j  = sum_i decay_ij (C_i . B_j) dy_i + weight_j B_j dS + D dy_j         weight_j = exp(a_last - a_j) step_j
    dB_j  = sum_i dM_ij C_i + weight_j x_j dS          dC_i = sum_j dM_ij B_j + exp(a_i) dy_i S

The gradient of A step at token k sums all that decays through k: pairs i >= k > j, what tokens i >= k read from the state and
tokens j < k give to it, and what it keeps. Each token gets the sums of its row and its column, without the diagonal, which
would cancel, and the state's terms. Never y dy - step dstep, which loses what is small beside the diagonal.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, tl
from nvfp4_kernels.ops.selective_scan._triton_call import Call, strides
from nvfp4_kernels.ops.selective_scan._triton_plan import exponents, load_tile, locate_block, store_tile
from nvfp4_kernels.ops.selective_scan._triton_states import block_states

MOST = 16  # heads of a program: 8 or 16 are a group in Nemotron models; fewer, larger groups are shared among programs


@jit
def rows_part(
    x_ptr, dy_ptr, B, C, a_ptr, states_ptr, dstates_ptr, sums_ptr, dD_ptr, left, first, last, x_head, dy_head, tokens,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC of one group; dD; and for each token the sums of its row and the diagonal."""
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    q, n, p = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = q < left
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)
    own = tl.sum(tl.where(q[:, None] == q[None, :], scores, 0.0), 1)
    dC = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    # A head_dim above BLOCK_P is taken in pieces, as if each were a head: all that is summed here is linear in them.
    # Loop invariants stay in the loop: there are not the registers to hold them.
    for each in tl.range(first * PIECES, last * PIECES, disable_licm=True):
        head, skipped = each // PIECES, each % PIECES * BLOCK_P
        cols = HEAD_DIM - skipped
        line = a_ptr + tl.cast(head, tl.int64) * 2 * tokens
        at = (head * HEAD_DIM + skipped + p[:, None]) * STATE + n[None, :]
        held = (p < cols)[:, None] & (n < STATE)[None, :]
        state = tl.load(states_ptr + at, held, 0.0)
        read = tl.dot(C, tl.trans(state), input_precision=PRECISION)
        a = tl.load(line + q, inside, float("-inf"))
        into = tl.exp2(a)
        dy = load_tile(dy_ptr, DY_TOKEN, q, head * dy_head + skipped, inside, cols, BLOCK_P)
        later = tl.sum(read * dy.to(tl.float32), 1) * into
        dC = tl.dot((dy.to(tl.float32) * into[:, None]).to(dy.dtype), state, dC, input_precision=PRECISION)
        dstate = tl.load(dstates_ptr + at, held, 0.0)
        kept = tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
        later += tl.where(q == left - 1, kept * into, 0.0)

        x = load_tile(x_ptr, X_TOKEN, q, head * x_head + skipped, inside, cols, BLOCK_P)
        a_from = tl.load(line + q, inside, 0.0)
        log_step = tl.load(line + tokens + q, inside, float("-inf"))
        dscores = tl.dot(dy, tl.trans(x), input_precision=PRECISION)
        met = tl.sum(tl.where(q[:, None] == q[None, :], dscores, 0.0), 1)
        if SKIP == 1:
            tl.store(dD_ptr + each, tl.sum(met, 0))
        elif SKIP == 2:
            dD = tl.sum(x.to(tl.float32) * dy.to(tl.float32), 0)
            tl.store(dD_ptr + head * HEAD_DIM + skipped + p, dD, p < cols)
        between = exponents(a[:, None], a_from[None, :], log_step[None, :], PRECISION)
        dscores *= tl.exp2(tl.where(q[:, None] >= q[None, :], between, float("-inf")))
        dC = tl.dot(dscores.to(x.dtype), B, dC, input_precision=PRECISION)
        pairs = tl.where(q[:, None] > q[None, :], dscores * scores, 0.0)
        sums = sums_ptr + tl.cast(each, tl.int64) * 4 * tokens + q
        tl.store(sums, later + tl.sum(pairs, 1), inside)
        tl.store(sums + tokens, met * own * tl.exp2(log_step), inside)
        tl.store(sums + 2 * tokens, tl.sum(pairs, 0), inside)
    return dC


@jit
def columns_part(
    x_ptr, dy_ptr, B, C, D_ptr, a_ptr, dstates_ptr, dx_ptr, sums_ptr, left, first, last, x_head, dy_head, tokens,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, DX_TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB of one group; dx; and for each token the sum of its column and what it gives to the state."""
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    q, n, p = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    inside = q < left
    scores = tl.dot(B, tl.trans(C), input_precision=PRECISION)
    dB = tl.zeros([BLOCK, BLOCK_N], tl.float32)
    for each in tl.range(first * PIECES, last * PIECES, disable_licm=True):
        head, skipped = each // PIECES, each % PIECES * BLOCK_P
        cols = HEAD_DIM - skipped
        at = (head * HEAD_DIM + skipped + p[:, None]) * STATE + n[None, :]
        dstate = tl.load(dstates_ptr + at, (p < cols)[:, None] & (n < STATE)[None, :], 0.0)
        dx = tl.dot(B, tl.trans(dstate), input_precision=PRECISION)
        line = a_ptr + tl.cast(head, tl.int64) * 2 * tokens
        a_from = tl.load(line + q, inside, 0.0)
        log_step = tl.load(line + tokens + q, inside, float("-inf"))
        weight = tl.exp2(tl.load(line + left - 1) - a_from + log_step)
        x = load_tile(x_ptr, X_TOKEN, q, head * x_head + skipped, inside, cols, BLOCK_P)
        dx *= weight[:, None]
        given = tl.sum(dx * x.to(tl.float32), 1)
        dB = tl.dot((x.to(tl.float32) * weight[:, None]).to(x.dtype), dstate, dB, input_precision=PRECISION)
        dy = load_tile(dy_ptr, DY_TOKEN, q, head * dy_head + skipped, inside, cols, BLOCK_P)
        if SKIP == 1:
            dx += dy.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
        elif SKIP == 2:
            skip = tl.load(D_ptr + head * HEAD_DIM + skipped + p, p < cols, 0.0)
            dx += dy.to(tl.float32) * skip.to(tl.float32)[None, :]
        a = tl.load(line + q, inside, float("-inf"))
        between = exponents(a[None, :], a_from[:, None], log_step[:, None], PRECISION)
        decay = tl.exp2(tl.where(q[:, None] <= q[None, :], between, float("-inf")))
        mixed = (decay * scores).to(x.dtype)
        dscores = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay
        dx = tl.dot(mixed, dy, dx, input_precision=PRECISION)
        dB = tl.dot(dscores.to(x.dtype), C, dB, input_precision=PRECISION)
        to = dx_ptr + (head * HEAD_DIM + skipped + q[:, None] * DX_TOKEN + p[None, :])
        tl.store(to, dx.to(x.dtype), inside[:, None] & (p < cols)[None, :])
        tl.store(sums_ptr + (tl.cast(each, tl.int64) * 4 + 3) * tokens + q, given, inside)
    return dB


@jit
def backward_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, a_ptr, states_ptr, dstates_ptr, dx_ptr, dB_ptr, dC_ptr, sums_ptr, dD_ptr,
    table_ptr, firsts_ptr, x_row, x_head, dy_row, dy_head, B_row, B_group, C_row, C_group, segments, length,
    tokens, heads, heads_per_group,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, DX_TOKEN: tl.constexpr,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SHARES: tl.constexpr,
    SKIP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    groups = heads // heads_per_group
    program = tl.program_id(0)
    share = program // 2 % SHARES
    group = program // 2 // SHARES % groups
    item = program // 2 // SHARES // groups
    row, start, left, block = locate_block(table_ptr, firsts_ptr, item, segments, length, BLOCK, SEGMENT, PACKED)
    if left <= 0:
        return
    q = tl.arange(0, BLOCK)
    inside = q < left
    B_ptr += row * B_row + group * B_group + start * B_TOKEN
    C_ptr += row * C_row + group * C_group + start * C_TOKEN
    dtype = x_ptr.dtype.element_ty
    B = load_tile(B_ptr, B_TOKEN, q, 0, inside, STATE, BLOCK_N).to(dtype)
    C = load_tile(C_ptr, C_TOKEN, q, 0, inside, STATE, BLOCK_N).to(dtype)
    each = tl.cdiv(heads_per_group, SHARES)
    first = group * heads_per_group + share * each
    last = tl.minimum(first + each, (group + 1) * heads_per_group)
    at = row * length + start
    x_ptr += row * x_row + start * X_TOKEN
    dy_ptr += row * dy_row + start * DY_TOKEN
    dstates_ptr += block * heads * (HEAD_DIM * STATE)
    to = ((share * tl.cast(tokens, tl.int64) + at) * groups + group) * STATE
    if program % 2 == 0:
        dB = columns_part(
            x_ptr, dy_ptr, B, C, D_ptr, a_ptr + at, dstates_ptr, dx_ptr + at * DX_TOKEN, sums_ptr + at, left, first,
            last, x_head, dy_head, tokens, X_TOKEN, DY_TOKEN, DX_TOKEN, HEAD_DIM, STATE, BLOCK, BLOCK_P, BLOCK_N, SKIP,
            PRECISION,
        )  # fmt: skip
        store_tile(dB_ptr + to, groups * STATE, dB, left, STATE)
    else:
        dD_size: tl.constexpr = HEAD_DIM if SKIP == 2 else (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
        dC = rows_part(
            x_ptr, dy_ptr, B, C, a_ptr + at, states_ptr + block * heads * (HEAD_DIM * STATE), dstates_ptr, sums_ptr + at,
            dD_ptr + tl.cast(item, tl.int64) * heads * dD_size, left, first, last, x_head, dy_head, tokens, X_TOKEN,
            DY_TOKEN, HEAD_DIM, STATE, BLOCK, BLOCK_P, BLOCK_N, SKIP, PRECISION,
        )  # fmt: skip
        store_tile(dC_ptr + to, groups * STATE, dC, left, STATE)


def backward(call: Call, a: Tensor, dy: Tensor, last: Tensor | None):
    """dx, dB, dC, dD and the gradient of the initial state (None for those not given); and sums for _triton_steps.gradients."""
    states, dstates, dinitial = block_states(call, a, dy, last)
    x, B, C, plan = call.x, call.B, call.C, call.plan
    shares = -(-(call.heads // call.groups * call.pieces) // MOST)
    dx = call.new(*x.shape, dtype=x.dtype)
    dB, dC = (call.new(shares, *t.shape, dtype=t.dtype if shares == 1 else torch.float32) for t in (B, C))
    sums = call.new(call.heads * call.pieces, 4, call.tokens)
    dD = None
    if call.skip:  # programs without a block leave their share as it is
        each = (call.heads, call.pieces if call.skip == 1 else call.head_dim)
        dD = (torch.empty if plan.table is None else torch.zeros)(plan.block_items, *each, device=x.device)
    launch(
        backward_kernel,
        (plan.block_items * call.groups * shares * 2,),
        *(x, dy, B, C, call.D, a, states, dstates, dx, dB, dC, sums, sums if dD is None else dD, plan.table),
        *(plan.firsts, *strides(x, dy, B, C), *call.sizes),
        **dict(
            X_TOKEN=x.stride(1), DY_TOKEN=dy.stride(1), B_TOKEN=B.stride(1), C_TOKEN=C.stride(1), DX_TOKEN=dx.stride(1)
        ),
        **dict(SHARES=shares, SKIP=call.skip),
        **call.constants,
        num_warps=call.tile.warps,
        num_stages=call.tile.backward,
    )
    dB, dC = (g[0] if shares == 1 else g.sum(0).to(t.dtype) for g, t in ((dB, B), (dC, C)))
    if dD is not None:
        dD = dD.sum((0, 2) if call.skip == 1 else 0).to(call.D.dtype)
    return dx, dB, dC, dD, dinitial, sums
