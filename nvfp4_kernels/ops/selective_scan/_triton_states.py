"""The passing of states, apart from the outputs: what segments add, borders of segments, states of blocks.

Two kinds of state walk: S, forward, from x, B and the decay from a token to the end of its block; and its gradient, backward,
from dy, C and the decay from the block's start to the token. Both are S = exp(a_last) S + sum_j weight_j u_j v_j^T.
"""

from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, tl
from nvfp4_kernels.ops.selective_scan._triton_call import Call, strides
from nvfp4_kernels.ops.selective_scan._triton_plan import (
    base_of,
    kept_state,
    load_state,
    load_tile,
    locate,
    product,
    store_tile,
)


@jit
def advance(state, u, weight, v, decay, PRECISION: tl.constexpr):
    """decay * state + sum_j weight_j u_j v_j^T, [head_dim, state]."""
    scaled = (u.to(tl.float32) * weight[:, None]).to(u.dtype)
    return product(tl.trans(scaled), v, state * decay, PRECISION)


@jit
def walk(
    u_ptr, v_ptr, a_ptr, tokens, state, states_ptr, number, count, cols, hop,
    U_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, BACKWARD: tl.constexpr, STORE: tl.constexpr, WHOLE: tl.constexpr,
    STATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    EVERY: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """The state after `count` tokens, or before them (BACKWARD), and the sum of their a.

    STORE: the states that EVERY-th blocks enter (BACKWARD: that each leaves) go to states_ptr, `hop` apart; number: of the
    first block in its sequence.
    """
    through = 0.0
    blocks = tl.cdiv(count, BLOCK)
    for k in tl.range(0, blocks, disable_licm=True):
        block = k
        if BACKWARD:
            block = blocks - 1 - k
        if STORE:
            if BACKWARD:
                store_tile(states_ptr + tl.cast(block, tl.int64) * hop, STATE, state, cols, STATE)
            else:
                kept = tl.cast((number % EVERY + block) // EVERY, tl.int64)
                rows = tl.where((number + block) % EVERY == 0, cols, 0)
                store_tile(states_ptr + kept * hop, STATE, state, rows, STATE)
        base, t, left = base_of(block, count, WHOLE, BLOCK, SEGMENT)
        inside = t < left
        u = load_tile(u_ptr + base * U_TOKEN, U_TOKEN, t, 0, inside, cols, BLOCK_P)
        v = load_tile(v_ptr + base * V_TOKEN, V_TOKEN, t, 0, inside, STATE, BLOCK_N).to(u.dtype)
        a_last = tl.load(a_ptr + tl.minimum(count, block * BLOCK + BLOCK) - 1)
        if BACKWARD:
            weight = tl.load(a_ptr + base + t, inside, float("-inf"))
        else:
            log_step = tl.load(a_ptr + tokens + base + t, inside, float("-inf"))
            weight = a_last - tl.load(a_ptr + base + t, inside, 0.0) + log_step
        state = advance(state, u, tl.exp2(weight), v, tl.exp2(a_last), PRECISION)
        through += a_last
    return state, through


@jit
def states_kernel(
    x_ptr, dy_ptr, B_ptr, C_ptr, a_ptr, borders_ptr, through_ptr, first_ptr, last_ptr, states_ptr, dstates_ptr,
    end_ptr, table_ptr, firsts_ptr, x_row, x_head, dy_row, dy_head, B_row, B_group, C_row, C_group, segments, length,
    tokens, heads, heads_per_group,
    X_TOKEN: tl.constexpr, DY_TOKEN: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, KINDS: tl.constexpr, STORE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, WHOLE: tl.constexpr, BORDERED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, EVERY: tl.constexpr, SEGMENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A segment (WHOLE: a sequence) of one head, up to BLOCK_P channels of it, and one kind.

    STORE: from the border on, and the states of blocks are kept; end_ptr takes the gradient of the initial state.
    Else: from zero, and what comes of it goes to the next border, where combine_kernel adds what came before; of a sequence's
    last segment, where that is full and KINDS 1, to end_ptr.
    """
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    piece = program % PIECES
    head = program // PIECES % heads
    kind = program // PIECES // heads % KINDS
    item = program // PIECES // heads // KINDS
    sequence, row, number, start, end, block = locate(
        table_ptr, firsts_ptr, item, segments, length, BLOCK, SEGMENT, WHOLE, PACKED
    )
    stop = end
    if not WHOLE:
        stop = tl.minimum(end, start + SEGMENT)
    work = sequence >= 0
    if not STORE:
        if kind == 0:
            work = work & (start + SEGMENT < end + (1 if KINDS == 1 else 0))
        else:
            work = work & (number > 0)
    if not work:
        return
    group = head // heads_per_group
    cols = HEAD_DIM - piece * BLOCK_P
    own = ((sequence * heads + head) * HEAD_DIM + piece * BLOCK_P) * STATE
    slot = tl.cast(item, tl.int64) * heads + head
    border = (slot * HEAD_DIM + piece * BLOCK_P) * STATE
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    a_ptr += tl.cast(head, tl.int64) * 2 * tokens + row * length + start
    count = (stop - start).to(tl.int32)
    hop = heads * (HEAD_DIM * STATE)
    number *= SEGMENT // BLOCK
    inner = head * (HEAD_DIM * STATE) + piece * BLOCK_P * STATE
    if kind == 0:
        if STORE and FIRST:
            state += load_state(first_ptr + own, tl.where(number == 0, cols, 0), STATE, BLOCK_P, BLOCK_N)
        if STORE and BORDERED:
            state += load_state(borders_ptr + border, tl.where(number > 0, cols, 0), STATE, BLOCK_P, BLOCK_N)
        state, through = walk(
            x_ptr + row * x_row + head * x_head + piece * BLOCK_P + start * X_TOKEN,
            B_ptr + row * B_row + group * B_group + start * B_TOKEN, a_ptr, tokens, state,
            states_ptr + kept_state(sequence, block, number, EVERY) * hop + inner, number, count, cols, hop, X_TOKEN,
            B_TOKEN, False, STORE, WHOLE, STATE, BLOCK_P, BLOCK_N, PRECISION, BLOCK, EVERY, SEGMENT,
        )  # fmt: skip
        if not STORE:
            tl.store(through_ptr + slot, through)
            if stop < end:
                store_tile(borders_ptr + border + hop, STATE, state, cols, STATE)
            elif KINDS == 1:  # of two kinds no segment comes here that is a sequence's last, and there is no end_ptr
                store_tile(end_ptr + own, STATE, state, cols, STATE)
    else:
        border += tl.cast(segments, tl.int64) * hop
        if STORE and LAST:
            state += load_state(last_ptr + own, tl.where(stop == end, cols, 0), STATE, BLOCK_P, BLOCK_N)
        if STORE and BORDERED:
            state += load_state(borders_ptr + border, tl.where(stop < end, cols, 0), STATE, BLOCK_P, BLOCK_N)
        state, through = walk(
            dy_ptr + row * dy_row + head * dy_head + piece * BLOCK_P + start * DY_TOKEN,
            C_ptr + row * C_row + group * C_group + start * C_TOKEN, a_ptr, tokens, state,
            dstates_ptr + block * hop + inner, number, count, cols, hop, DY_TOKEN, C_TOKEN, True, STORE, WHOLE, STATE,
            BLOCK_P, BLOCK_N, PRECISION, BLOCK, EVERY, SEGMENT,
        )  # fmt: skip
        if not STORE:
            tl.store(through_ptr + tl.cast(segments, tl.int64) * heads + slot, through)
            store_tile(borders_ptr + border - hop, STATE, state, cols, STATE)
        elif FIRST:
            store_tile(end_ptr + own, STATE, state, tl.where(number == 0, cols, 0), STATE)


@jit
def combine_kernel(
    borders_ptr, through_ptr, first_ptr, last_ptr, end_ptr, table_ptr, firsts_ptr, segments, length, heads, size,
    KINDS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, EACH: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """EACH numbers of one state through the borders of a sequence, one after the other: border = decay * border + own."""
    parts = tl.cdiv(size, EACH)
    program = tl.program_id(0)
    e = program % parts * EACH + tl.arange(0, EACH)
    inside = e < size
    head = program // parts % heads
    kind = program // parts // heads % KINDS
    sequence = (program // parts // heads // KINDS).to(tl.int64)
    if PACKED:
        slot = tl.load(firsts_ptr + sequence).to(tl.int64)
        count = (tl.load(firsts_ptr + sequence + 1) - slot).to(tl.int32)
        tokens = tl.load(table_ptr + 3 * segments + slot) - tl.load(table_ptr + 2 * segments + slot)
    else:
        count = tl.maximum(tl.cdiv(length, SEGMENT), 1)
        slot = sequence * count
        tokens = sequence * 0 + length
    own = (sequence * heads + head) * size + e
    border = tl.zeros([EACH], tl.float32)
    direction = 1
    if kind == 0:
        if FIRST:
            border += tl.load(first_ptr + own, inside, 0.0).to(tl.float32)
    else:
        if LAST:
            border += tl.load(last_ptr + own, inside, 0.0).to(tl.float32)
        direction = -1
        slot += count - 1
    through_ptr += (kind * tl.cast(segments, tl.int64) + slot) * heads + head
    borders_ptr += ((kind * tl.cast(segments, tl.int64) + slot) * heads + head) * size + e
    hop = direction * tl.cast(heads, tl.int64)
    made = tl.load(borders_ptr + hop * size, e < tl.where(count > 1, size, 0), 0.0)
    for k in range(1, count):
        borders_ptr += hop * size
        following = tl.load(
            borders_ptr + hop * size, e < tl.where(k + 1 < count, size, 0), 0.0
        )  # under way while this one is added
        border = tl.fma(border, tl.exp2(tl.load(through_ptr)), made)
        tl.store(borders_ptr, border, inside)
        through_ptr += hop
        made = following
    if KINDS == 1:
        if (tokens > 0) & (tokens % SEGMENT == 0):
            made = tl.load(end_ptr + own, inside, 0.0)
            tl.store(end_ptr + own, tl.fma(border, tl.exp2(tl.load(through_ptr)), made), inside)


def _launch(call: Call, a: Tensor, dy, borders, through, last, states, dstates, end, kinds: int, store: bool) -> None:
    x, B, C = call.x, call.B, call.C
    dy = x if dy is None else dy
    whole = call.plan.whole and store
    launch(
        states_kernel,
        ((call.plan.items if store else call.plan.segments) * kinds * call.heads * call.pieces,),
        *(
            x,
            dy,
            B,
            C,
            a,
            borders,
            through,
            call.initial,
            last,
            states,
            dstates,
            end,
            call.plan.table,
            call.plan.firsts,
        ),
        *(*strides(x, dy, B, C), *call.sizes),
        **dict(X_TOKEN=x.stride(1), DY_TOKEN=dy.stride(1), B_TOKEN=B.stride(1), C_TOKEN=C.stride(1)),
        **dict(KINDS=kinds, STORE=store, FIRST=call.initial is not None, LAST=last is not None, WHOLE=whole),
        **dict(BORDERED=borders is not None, EVERY=call.plan.every),
        **call.constants,
        num_warps=call.tile.warps,
        num_stages=call.tile.states,
    )


def combine(call: Call, found: Tensor, through: Tensor, last: Tensor | None = None, end: Tensor | None = None) -> None:
    """What segments add, [kinds, segments, heads, head_dim, state], and the sums of their a become what `borders` gives."""
    size = call.head_dim * call.state
    launch(
        combine_kernel,
        (call.plan.sequences * len(found) * call.heads * -(-size // 1024),),
        *(
            found,
            through,
            call.initial,
            last,
            end,
            call.plan.table,
            call.plan.firsts,
            call.plan.segments,
            call.x.shape[1],
        ),
        *(call.heads, size),
        **dict(KINDS=len(found), FIRST=call.initial is not None, LAST=last is not None, EACH=1024),
        **dict(SEGMENT=call.plan.segment, PACKED=call.plan.table is not None),
    )


def borders(call: Call, a: Tensor, end: Tensor | None = None, dy: Tensor | None = None, last: Tensor | None = None):
    """The states at the borders between segments, fp32 [kinds, segments, heads, head_dim, state]: what a segment starts from
    and, with dy, the gradient of what it ends with, given last, the gradient of the final state.

    Without dy the final state of sequences of whole segments, which is a border too, goes to `end`.
    """
    kinds = 1 if dy is None else 2
    found = call.new(kinds, call.plan.segments, call.heads, call.head_dim, call.state)
    through = call.new(kinds, call.plan.segments, call.heads)
    _launch(call, a, dy, found, through, last, call.x, call.x, end, kinds, False)
    combine(call, found, through, last, end)
    return found


def block_states(call: Call, a: Tensor, dy: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The state that each EVERY-th block enters, where kept_state says, and the gradient of the one each block leaves,
    [blocks, heads, head_dim, state] in x's dtype; and the gradient of the initial state, fp32, where there is one."""
    shape = call.heads, call.head_dim, call.state
    states, dstates = (call.new(n, *shape, dtype=call.x.dtype) for n in (call.plan.kept_states, call.plan.blocks))
    dinitial = None if call.initial is None else call.new(*call.initial.shape)
    found = borders(call, a, None, dy, last) if call.plan.bordered else None
    _launch(call, a, dy, found, None, last, states, dstates, dinitial, 2, True)
    return states, dstates, dinitial
