"""state_update: the state through registers once, all tokens on the way; read and written once, which is all that it costs.

A program holds some rows of one head's state. Math in fp32, no product contracted into a sum: one call with several tokens
gives the bits of several calls, and the bits that noise rounds are those of the reference's formula.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import as_rows, jit, launch, next_power_of_2, refuses_device, tl
from nvfp4_kernels.ops._triton_logistic import logistic
from nvfp4_kernels.ops._triton_numerics import philox

LARGEST = 4096  # values of a row that fit one program's registers beside B, C and the noise


def refuses(state, x, dt, A, B, C, D, z, dt_bias, indices, intermediate, noise, dt_softplus, low, high) -> str | None:
    if torch.float64 in (x.dtype, state.dtype):
        return "float64"
    if state.shape[-1] > LARGEST:
        return f"state of {state.shape[-1]} above {LARGEST}"
    for name, t in (("state", state[:1]), ("intermediate", intermediate)):
        if t is not None and not t.is_contiguous():
            return f"{name} with strides {t.stride()} inside a slot"
    return refuses_device(x)


def tile(head_dim: int, size: int, itemsize: int) -> tuple[int, int]:
    """(rows, values) of a program: 8 KB, so that 4 warps load 16 bytes a lane four times at once, and that one sequence
    still makes enough programs for every SM (Nano: 256)."""
    values = next_power_of_2(size)
    return min(next_power_of_2(head_dim), max(1, 8192 // (values * itemsize))), values


@jit
def softplus(x):
    """log(1 + e^x), to the last places of small steps too: log1p(u) = 2 atanh(u / (2 + u)), whose series ends at 1e-9."""
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    series = 0.0
    for odd in tl.static_range(15, 0, -2):
        series = series * (s * s) + 1.0 / odd
    return tl.where(x > 0.0, x, 0.0) + 2.0 * s * series


@jit
def halfwords(first, n, seed, offset, ROWS: tl.constexpr, VALUES: tl.constexpr, SIZE: tl.constexpr):
    """The noise of a tile whose rows begin at the flat indices `first`: element e takes halfword e % 8 of draw e // 8."""
    if SIZE % 8 == 0:  # whole draws side by side
        w0, w1, w2, w3 = philox((first // 8)[:, None] + tl.arange(0, VALUES // 8)[None, :], seed, offset)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last axis is the lowest bit of an element's place
        return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, VALUES])
    else:
        e = first[:, None] + n[None, :]
        w0, w1, w2, w3 = philox(e // 8, seed, offset)
        word = tl.where(e % 8 < 4, tl.where(e % 8 < 2, w0, w1), tl.where(e % 8 < 6, w2, w3))
        return tl.where(e % 2 == 0, word & 0xFFFF, word >> 16)


@jit
def stochastic(v, halves, DTYPE: tl.constexpr):
    """fp32 to bf16 or fp16, up where the part cut off plus the noise carries; NaN and Inf stay."""
    bits = v.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    if DTYPE == tl.bfloat16:
        quiet = tl.where((bits & 0x007FFFFF) != 0, 0x40, 0).to(tl.uint32)
        kept = tl.where(finite, (bits + halves) >> 16, (bits >> 16) | quiet)
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = (((bits + (halves >> 3)) >> 13) << 13).to(tl.float32, bitcast=True)
        # below 2^-14 the last place is 2^-24, whatever the exponent
        small = tl.floor(tl.abs(v) * 16777216.0 + halves.to(tl.float32) * 1.52587890625e-05) * 5.9604644775390625e-08
        rounded = tl.where(tl.abs(v) < 6.103515625e-05, tl.where(bits >> 31 == 1, -small, small), rounded)
        return tl.where(finite, rounded, v).to(tl.float16)


@jit
def update_kernel(
    state_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, dt_bias_ptr, indices_ptr, intermediate_ptr, noise_ptr,
    y_ptr, slot_stride, x_stride, dt_stride, B_stride, C_stride, z_stride, D_head, D_row,
    tokens, heads, head_dim, per_group, low, high,
    SIZE: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr, SOFTPLUS: tl.constexpr, SKIP: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, INDEXED: tl.constexpr, INTERMEDIATE: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(head_dim, ROWS)
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks) % heads
    batch = (tl.program_id(0) // (blocks * heads)).to(tl.int64)
    p, n = block * ROWS + tl.arange(0, ROWS), tl.arange(0, VALUES)
    channel, inside_p, inside_n = head * head_dim + p, p < head_dim, n < SIZE
    inside, element = inside_p[:, None] & inside_n[None, :], channel[:, None] * SIZE + n[None, :]
    slot = batch
    if INDEXED:
        slot = tl.load(indices_ptr + batch).to(tl.int64)
    if slot < 0:
        for t in range(tokens):
            out = y_ptr + (batch * tokens + t) * heads * head_dim + channel
            tl.store(out, tl.zeros([ROWS], y_ptr.dtype.element_ty), inside_p)
    else:
        state_ptr += slot * slot_stride
        current = tl.load(state_ptr + element, inside, 0.0)
        A = tl.load(A_ptr + head).to(tl.float32)
        for t in range(tokens):
            at = batch * tokens + t
            step = tl.load(dt_ptr + at * dt_stride + head).to(tl.float32)
            if BIASED:
                step += tl.load(dt_bias_ptr + head).to(tl.float32)
            if SOFTPLUS:
                step = softplus(step)
            step = tl.minimum(tl.maximum(step, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
            x = tl.load(x_ptr + at * x_stride + channel, inside_p, 0.0).to(tl.float32)
            shared = (head // per_group) * SIZE + n
            B = tl.load(B_ptr + at * B_stride + shared, inside_n, 0.0).to(tl.float32)
            C = tl.load(C_ptr + at * C_stride + shared, inside_n, 0.0).to(tl.float32)
            after = tl.exp(A * step) * current.to(tl.float32) + (step * x)[:, None] * B[None, :]
            y = tl.sum(tl.where(inside_n[None, :], after * C[None, :], 0.0), 1)
            if SKIP:
                y += x * tl.load(D_ptr + head * D_head + p * D_row, inside_p, 0.0).to(tl.float32)
            if GATED:
                z = tl.load(z_ptr + at * z_stride + channel, inside_p, 0.0).to(tl.float32)
                y *= z * logistic(z)
            tl.store(y_ptr + at * heads * head_dim + channel, y.to(y_ptr.dtype.element_ty), inside_p)
            if NOISE:
                first = (batch * heads * head_dim + channel) * SIZE
                seed, offset = tl.load(noise_ptr), tl.load(noise_ptr + 1) + t
                halves = halfwords(first, n, seed, offset, ROWS, VALUES, SIZE)
                current = stochastic(after, halves, state_ptr.dtype.element_ty)
            else:
                current = after.to(state_ptr.dtype.element_ty)
            if INTERMEDIATE:
                tl.store(intermediate_ptr + at * heads * head_dim * SIZE + element, current, inside)
        if not INTERMEDIATE:
            tl.store(state_ptr + element, current, inside)


@torch.no_grad()
def run(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    indices: Tensor | None,
    intermediate: Tensor | None,
    noise: Tensor | None,
    dt_softplus: bool,
    low: float,
    high: float,
) -> Tensor:
    batch, tokens, heads, head_dim = x.shape
    size, groups = B.shape[3], B.shape[2]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, values = tile(head_dim, size, state.element_size())
    given = dict(x=x.flatten(2), dt=dt, B=B.flatten(2), C=C.flatten(2), z=x.flatten(2) if z is None else z.flatten(2))
    x, dt, B, C, gate = (as_rows(t) for t in given.values())
    small = [x if t is None else t.contiguous() for t in (dt_bias, indices)]
    skip = x if D is None else D.contiguous()
    D_strides = (0, 0) if D is None else (skip.stride(0), skip.stride(1) if skip.dim() == 2 else 0)
    launch(
        update_kernel,
        (batch * heads * -(-head_dim // rows),),
        *(state, x, dt, A.contiguous(), B, C, skip, gate, *small),
        *(x if intermediate is None else intermediate, x if noise is None else noise, y),
        *(state.stride(0), x.stride(0), dt.stride(0), B.stride(0), C.stride(0), gate.stride(0), *D_strides),
        *(tokens, heads, head_dim, heads // groups, low, high),
        **dict(SIZE=size, ROWS=rows, VALUES=values, SOFTPLUS=dt_softplus, SKIP=D is not None, GATED=z is not None),
        **dict(BIASED=dt_bias is not None, INDEXED=indices is not None),
        **dict(INTERMEDIATE=intermediate is not None, NOISE=noise is not None),
        fusion=False,
    )
    return y
