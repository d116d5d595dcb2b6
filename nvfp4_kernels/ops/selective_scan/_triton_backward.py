"""The gradients of x, B, C and D, and of steps and decays but for their sums over a block: every block of tokens by itself.

With the state that a block enters and the gradient of the state it leaves in memory, blocks are independent. A program takes
one block and the heads of one group, one after the other, so that dB or dC is summed over them in registers: no atomics, and
no share of each head in memory (more than MOST heads a group are divided among programs, whose shares are added in order).

    dM_ij = decay_ij (dy_i . x_j)          decay_ij = exp(a_i - a_j) step_j for j <= i
    dx_j  = sum_i decay_ij (C_i . B_j) dy_i + weight_j B_j dS + D dy_j         weight_j = exp(a_last - a_j) step_j
    dB_j  = sum_i dM_ij C_i + weight_j x_j dS          dC_i = sum_j dM_ij B_j + exp(a_i) dy_i S

Programs are of three kinds, for what one of them sums is what fits its registers: dx and the sums over pairs of tokens; and dB
and dC, each by slices of WIDTH columns. Programs of one block run side by side, so that x, dy and the states come from memory
once and from the cache for the others.

States are most of what moves, twice 2 head_dim x state bytes a block and head. dC alone reads S, so it pays to keep S for
every second block and to make it anew for the others, one more product of those programs. The same for dS, which dx, dB and
what the state keeps need, would take three more products and a sixth of the bytes.

The gradient of A step at token k sums all that decays through k: pairs i >= k > j, what tokens i >= k read from the state and
tokens j < k give to it, and what it keeps. Each token gets the sums of its row and its column, without the diagonal, which
would cancel, and the state's terms. Never y dy - step dstep, which loses what is small beside the diagonal. In fp32 it gets
its pairs i >= k > j themselves, in the place of its row and column: there pairs of tokens behind k cancel and leave 2^-24 of
their size, which may be far above what crosses k. 16-bit operands, rounded at 2^-9 or 2^-12, have less to lose.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, tl
from nvfp4_kernels.ops._triton_numerics import one, total
from nvfp4_kernels.ops.selective_scan._triton_call import Call, strides
from nvfp4_kernels.ops.selective_scan._triton_plan import (
    against,
    exponents,
    kept_state,
    load_tile,
    locate_block,
    product,
    store_tile,
)
from nvfp4_kernels.ops.selective_scan._triton_states import advance, block_states

MOST = 16  # heads of a program: 8 or 16 are a group in Nemotron models; fewer, larger groups are shared among programs
# of sums for a token, before those of each slice: the diagonal and its column; its row without its column or, in fp32, the
# pairs that its decay parts; what it gives
PLANES = 3


@jit
def inputs_part(
    x_ptr, dy_ptr, B, scores, D_ptr, a_ptr, dstates_ptr, dx_ptr, sums_ptr, dD_ptr, left, first, last, x_head, dy_head, tokens,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, DX_TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SUMS: tl.constexpr, SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx and dD of one group of heads, and for each token the sums over pairs and what it gives to the state."""
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    q, n, p = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    # Tokens beyond the last one have its decays, and zeros for all else: nothing comes of them.
    inside, known = q < left, tl.minimum(q, left - 1)
    # A head_dim above BLOCK_P is taken in pieces, as if each were a head: all that is summed here is linear in them.
    # Loop invariants stay in the loop: there are not the registers to hold them.
    for each in tl.range(first * PIECES, last * PIECES, disable_licm=True):
        head, skipped = each // PIECES, each % PIECES * BLOCK_P
        cols = HEAD_DIM - skipped
        line = a_ptr + tl.cast(head, tl.int64) * 2 * tokens
        sums = sums_ptr + tl.cast(each, tl.int64) * SUMS * tokens + q
        a, log_step = tl.load(line + known), tl.load(line + tokens + known)
        x = load_tile(x_ptr, X_TOKEN, q, head * x_head + skipped, inside, cols, BLOCK_P)
        dy = load_tile(dy_ptr, DY_TOKEN, q, head * dy_head + skipped, inside, cols, BLOCK_P)
        between = exponents(a[None, :], a[:, None], log_step[:, None], PRECISION)
        mixed = scores * tl.exp2(tl.where(q[:, None] <= q[None, :], between, float("-inf")))
        pairs = against(x, dy, PRECISION)
        if SKIP == 1:
            tl.store(one(dD_ptr + each), total(tl.where(q[:, None] == q[None, :], pairs, 0.0)))
        elif SKIP == 2:
            met = x.to(tl.float32) * dy.to(tl.float32)
            tl.store(dD_ptr + head * HEAD_DIM + skipped + p, tl.sum(met, 0), p < cols)
        pairs *= mixed
        diagonal = tl.sum(tl.where(q[:, None] == q[None, :], pairs, 0.0), 1)
        pairs = tl.where(q[:, None] < q[None, :], pairs, 0.0)
        column = tl.sum(pairs, 1)
        tl.store(sums, diagonal + column, inside)
        if PRECISION != "tf32x3":
            tl.store(sums + tokens, tl.sum(pairs, 0) - column, inside)
        else:
            parted = tl.where(q[:, None] < q[None, :], tl.cumsum(pairs, 1, reverse=True), 0.0)
            tl.store(sums + tokens, tl.sum(parted, 0), inside)
        mixed = mixed.to(dy.dtype)
        at = (head * HEAD_DIM + skipped + p[:, None]) * STATE + n[None, :]
        dstate = tl.load(dstates_ptr + at, (p < cols)[:, None] & (n < STATE)[None, :], 0.0)
        weight = tl.exp2(tl.load(line + left - 1) - a + log_step)[:, None]
        dx = against(B, dstate, PRECISION) * weight
        tl.store(sums + 2 * tokens, tl.sum(dx * x.to(tl.float32), 1), inside)
        if SKIP == 1:
            dx += dy.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
        elif SKIP == 2:
            skip = tl.load(D_ptr + head * HEAD_DIM + skipped + p, p < cols, 0.0)
            dx += dy.to(tl.float32) * skip.to(tl.float32)[None, :]
        dx = product(mixed, dy, dx, PRECISION)
        to = dx_ptr + (head * HEAD_DIM + skipped + q[:, None] * DX_TOKEN + p[None, :])
        tl.store(to, dx.to(dy.dtype), inside[:, None] & (p < cols)[None, :])


@jit
def shared_part(
    u_ptr, v_ptr, own_ptr, other_ptr, a_ptr, states_ptr, dstates_ptr, sums_ptr, left, odd, first, last, u_head, v_head,
    tokens, columns,
    READS: tl.constexpr, U_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, OWN_TOKEN: tl.constexpr, OTHER_TOKEN: tl.constexpr,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, EVERY: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WIDTH columns of dC (READS: u, v are dy, x; own, other C, B; states S) or of dB (x, dy; B, C; dS). READS: and for each
    token what it reads from the state, and, at the last, what the block keeps of it, as far as these columns go."""
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    q, n, p = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, BLOCK_P)
    inside, known = q < left, tl.minimum(q, left - 1)
    dtype = u_ptr.dtype.element_ty
    other = load_tile(other_ptr, OTHER_TOKEN, q, 0, inside, columns, WIDTH).to(dtype)
    # From shared memory, where wgmma and tcgen05 take their operands, what all heads share is read at no cost, and another
    # product is cheaper than a second tile of sums. mma.sync takes it through registers: loaded late, it holds few.
    if READS and WIDE:
        own = load_tile(own_ptr, OWN_TOKEN, q, 0, inside, columns, WIDTH).to(dtype)
    # A block of an odd number makes S anew from the block before. That has no tokens for one of an even number, and keeps all.
    if READS and EVERY == 2:
        before, start = q < odd * BLOCK, v_ptr - BLOCK * V_TOKEN
        other_before = load_tile(other_ptr - BLOCK * OTHER_TOKEN, OTHER_TOKEN, q, 0, before, columns, WIDTH).to(dtype)
    gradient = tl.zeros([BLOCK, WIDTH], tl.float32)
    for each in tl.range(first * PIECES, last * PIECES, disable_licm=True):
        head, skipped = each // PIECES, each % PIECES * BLOCK_P
        cols = HEAD_DIM - skipped
        line = a_ptr + tl.cast(head, tl.int64) * 2 * tokens
        a, log_step = tl.load(line + known), tl.load(line + tokens + known)
        end = tl.load(line + left - 1)
        at = (head * HEAD_DIM + skipped + p[:, None]) * STATE + n[None, :]
        held = (p < cols)[:, None] & (n < columns)[None, :]
        u = load_tile(u_ptr, U_TOKEN, q, head * u_head + skipped, inside, cols, BLOCK_P)
        v = load_tile(v_ptr, V_TOKEN, q, head * v_head + skipped, inside, cols, BLOCK_P)
        pairs = against(u, v, PRECISION)
        if READS:
            between = exponents(a[:, None], a[None, :], log_step[None, :], PRECISION)
            pairs *= tl.exp2(tl.where(q[:, None] >= q[None, :], between, float("-inf")))
        else:
            between = exponents(a[None, :], a[:, None], log_step[:, None], PRECISION)
            pairs *= tl.exp2(tl.where(q[:, None] <= q[None, :], between, float("-inf")))
        gradient = product(pairs.to(dtype), other, gradient, PRECISION)
        state = tl.load(states_ptr + at, held, 0.0)
        if READS and EVERY == 2:
            line -= BLOCK
            gives = tl.load(line + tokens + q, before, float("-inf")) - tl.load(line + q, before, 0.0)
            through = tl.load(line + BLOCK - 1, odd == 1, 0.0)
            x = load_tile(start, V_TOKEN, q, head * v_head + skipped, before, cols, BLOCK_P)
            state = advance(
                state.to(tl.float32), x, tl.exp2(through + gives), other_before, tl.exp2(through), PRECISION
            )
            state = state.to(dtype)
        if READS:
            dstate = tl.load(dstates_ptr + at, held, 0.0)
            kept = total(state.to(tl.float32) * dstate.to(tl.float32)) * tl.exp2(end)
        weight = tl.exp2(a if READS else exponents(end, a, log_step, PRECISION))[:, None]
        if READS and not WIDE:
            own = load_tile(own_ptr, OWN_TOKEN, q, 0, inside, columns, WIDTH)
            made = product(u, state, None, PRECISION) * weight
            met = tl.sum(made * own.to(tl.float32), 1)
            gradient += made
        else:
            scaled = u.to(tl.float32) * weight
            if READS:
                met = tl.sum(against(own, state, PRECISION) * scaled, 1)
            gradient = product(scaled.to(dtype), state, gradient, PRECISION)
        if READS:
            met += tl.where(q == left - 1, kept, 0.0)
            tl.store(sums_ptr + tl.cast(each, tl.int64) * SUMS * tokens + q, met, inside)
    return gradient


@jit
def backward_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, D_ptr, a_ptr, states_ptr, dstates_ptr, dx_ptr, dB_ptr, dC_ptr, sums_ptr, dD_ptr,
    table_ptr, firsts_ptr, x_row, x_head, dy_row, dy_head, B_row, B_group, C_row, C_group, segments, length,
    tokens, heads, heads_per_group,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, DX_TOKEN: tl.constexpr,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    WIDE: tl.constexpr, SHARES: tl.constexpr, KINDS: tl.constexpr, FIRST: tl.constexpr, SUMS: tl.constexpr,
    SKIP: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, EVERY: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """KINDS kinds of programs, from FIRST on: 0 dx and sums, then the slices of dB, then those of dC."""
    SLICES: tl.constexpr = (STATE + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    kind = FIRST + program % KINDS
    share = program // KINDS % SHARES
    groups = heads // heads_per_group
    group = program // KINDS // SHARES % groups
    item = program // KINDS // SHARES // groups
    sequence, row, start, left, block, number = locate_block(
        table_ptr, firsts_ptr, item, segments, length, BLOCK, SEGMENT, PACKED
    )
    if left <= 0:
        return
    each = tl.cdiv(heads_per_group, SHARES)
    first = group * heads_per_group + share * each
    last = tl.minimum(first + each, (group + 1) * heads_per_group)
    at = row * length + start
    x_ptr += row * x_row + start * X_TOKEN
    dy_ptr += row * dy_row + start * DY_TOKEN
    B_ptr += row * B_row + group * B_group + start * B_TOKEN
    C_ptr += row * C_row + group * C_group + start * C_TOKEN
    a_ptr += at
    sums_ptr += at
    states_ptr += kept_state(sequence, block, number, EVERY) * heads * (HEAD_DIM * STATE)
    dstates_ptr += block * heads * (HEAD_DIM * STATE)
    if FIRST == 0:
        if kind == 0:
            q = tl.arange(0, BLOCK)
            dtype = x_ptr.dtype.element_ty
            B = load_tile(B_ptr, B_TOKEN, q, 0, q < left, STATE, BLOCK_N).to(dtype)
            C = load_tile(C_ptr, C_TOKEN, q, 0, q < left, STATE, BLOCK_N).to(dtype)
            scores = against(B, C, PRECISION)
            dD_size: tl.constexpr = HEAD_DIM if SKIP == 2 else (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
            inputs_part(
                x_ptr, dy_ptr, B, scores, D_ptr, a_ptr, dstates_ptr, dx_ptr + at * DX_TOKEN, sums_ptr,
                dD_ptr + tl.cast(item, tl.int64) * heads * dD_size, left, first, last, x_head, dy_head, tokens, X_TOKEN,
                DY_TOKEN, DX_TOKEN, HEAD_DIM, STATE, BLOCK, BLOCK_P, BLOCK_N, SUMS, SKIP, PRECISION,
            )  # fmt: skip
    if kind >= 1:
        part = (kind - 1) % SLICES
        skipped = part * WIDTH
        columns = WIDTH if STATE % WIDTH == 0 else STATE - skipped
        to = ((share * tl.cast(tokens, tl.int64) + at) * groups + group) * STATE + skipped
        odd = (number % 2).to(tl.int32)
        B_ptr += skipped
        C_ptr += skipped
        states_ptr += skipped
        dstates_ptr += skipped
        if kind < 1 + SLICES:
            dB = shared_part(
                x_ptr, dy_ptr, B_ptr, C_ptr, a_ptr, dstates_ptr, dstates_ptr, sums_ptr, left, odd, first, last, x_head,
                dy_head, tokens, columns, False, X_TOKEN, DY_TOKEN, B_TOKEN, C_TOKEN, HEAD_DIM, STATE, BLOCK, BLOCK_P, WIDTH,
                WIDE, EVERY, SUMS, PRECISION,
            )  # fmt: skip
            store_tile(dB_ptr + to, groups * STATE, dB, left, columns)
        else:
            sums_ptr += (SUMS - SLICES + part) * tl.cast(tokens, tl.int64)
            dC = shared_part(
                dy_ptr, x_ptr, C_ptr, B_ptr, a_ptr, states_ptr, dstates_ptr, sums_ptr, left, odd, first, last, dy_head,
                x_head, tokens, columns, True, DY_TOKEN, X_TOKEN, C_TOKEN, B_TOKEN, HEAD_DIM, STATE, BLOCK, BLOCK_P, WIDTH,
                WIDE, EVERY, SUMS, PRECISION,
            )  # fmt: skip
            store_tile(dC_ptr + to, groups * STATE, dC, left, columns)


def backward(call: Call, a: Tensor, dy: Tensor, last: Tensor | None):
    """dx, dB, dC, dD and the gradient of the initial state (None for those not given); and sums for _triton_steps.gradients."""
    states, dstates, dinitial = block_states(call, a, dy, last)
    x, B, C, plan = call.x, call.B, call.C, call.plan
    shares = -(-(call.heads // call.groups * call.pieces) // MOST)
    dx = call.new(*x.shape, dtype=x.dtype)
    dB, dC = (call.new(shares, *t.shape, dtype=t.dtype if shares == 1 else torch.float32) for t in (B, C))
    slices = call.tile.slices(call.state)
    sums = call.new(call.heads * call.pieces, PLANES + slices, call.tokens)
    dD = None
    if call.skip:  # programs without a block leave their share as it is
        each = (call.heads, call.pieces if call.skip == 1 else call.head_dim)
        dD = (torch.empty if plan.table is None else torch.zeros)(plan.block_items, *each, device=x.device)
    if call.tile.together:
        launches = [(0, 1 + 2 * slices, 4, call.tile.backward)]
    else:  # dx and sums alone need 8 warps' registers, and then fill a multiprocessor
        launches = [(0, 1, 8, call.tile.states), (1, 2 * slices, 4, call.tile.backward)]
    for first, count, warps, stages in launches:
        launch(
            backward_kernel,
            (plan.block_items * call.groups * shares * count,),
            *(x, dy, B, C, call.D, a, states, dstates, dx, dB, dC, sums, sums if dD is None else dD, plan.table),
            *(plan.firsts, *strides(x, dy, B, C), *call.sizes),
            **dict(X_TOKEN=x.stride(1), DY_TOKEN=dy.stride(1), B_TOKEN=B.stride(1), C_TOKEN=C.stride(1)),
            **dict(DX_TOKEN=dx.stride(1), WIDTH=call.tile.width, WIDE=call.tile.width > 32, SHARES=shares, KINDS=count),
            **dict(FIRST=first, EVERY=plan.every, SUMS=sums.shape[1], SKIP=call.skip),
            **call.constants,
            num_warps=warps,
            num_stages=stages,
        )
    dB, dC = (g[0] if shares == 1 else g.sum(0).to(t.dtype) for g, t in ((dB, B), (dC, C)))
    if dD is not None:
        dD = dD.sum((0, 2) if call.skip == 1 else 0).to(call.D.dtype)
    return dx, dB, dC, dD, dinitial, sums
