"""The scan twice: `recurrence`, token by token as the paper defines it, and `run`, chunk by chunk in matrix products.

With a = cumsum(A dt) inside a chunk (Mamba-2, section 6):
    y_i    = exp(a_i) C_i S + sum_{j <= i} exp(a_i - a_j) dt_j (C_i . B_j) x_j + D x_i
    S_next = exp(a_last) S + sum_j exp(a_last - a_j) dt_j x_j B_j^T
dt_j rides in the exponent and D on the diagonal of the sum's matrix, which saves passes over tensors as large as x.
Exponents are clamped before the exponential sees them: no discarded value can overflow, and gradients stay finite.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)  # exp2 takes a quarter of exp's time on a CPU
# Factors within a chunk stay within 2^-64, which vanishes beside 1 even in fp64, and 2^64: subnormal numbers, which A dt
# reaches soon, make a multiplication on a CPU ten times slower. The upper end is met only where the result is discarded.
RANGE = (-64.0, 64.0)
BLOCK = 2**19


def refuses(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, return_state, cu_seqlens, chunk_size
) -> str | None:
    return None


def recurrence(
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=True,
    dt_limit=(0.0, math.inf),
    initial_state=None,
    dtype=torch.float64,
) -> tuple[Tensor, Tensor]:
    """y and the last state, in `dtype`, one token after the other: what `run` must equal up to rounding."""
    x, dt, A, B, C, D, z, dt_bias = (None if t is None else t.to(dtype) for t in (x, dt, A, B, C, D, z, dt_bias))
    batch, length, heads, head_dim = x.shape
    step = steps(dt, dt_bias, dt_softplus, dt_limit)
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state = x.new_zeros(batch, heads, head_dim, B.shape[3]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(length):
        decay = torch.exp(A * step[:, t])[:, :, None, None]
        state = decay * state + (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + x * (D if D.dim() == 2 else D[:, None])
    return (y if z is None else y * F.silu(z)), state


def steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """softplus(dt + bias) in fp32 or better, clamped. logaddexp keeps the relative accuracy of small steps."""
    dt = dt if dt.dtype == torch.float64 else dt.float()
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.logaddexp(dt, torch.zeros_like(dt)) if dt_softplus else dt
    return dt if tuple(dt_limit) == (0.0, math.inf) and dt_softplus else dt.clamp(*dt_limit)


def run(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, return_state, cu_seqlens, chunk_size
) -> Tensor | tuple[Tensor, Tensor]:
    step = steps(dt, dt_bias, dt_softplus, dt_limit)
    if cu_seqlens is not None and (initial_state is not None or return_state):
        y, state = _each_sequence(x, step, A, B, C, D, initial_state, cu_seqlens.tolist(), chunk_size)
    else:
        y, state = _chunked(x, step, A, B, C, D, initial_state, _restarts(x, cu_seqlens), chunk_size)
    y = y if z is None else (y * F.silu(z if z.dtype == torch.float64 else z.float())).to(x.dtype)
    return (y, state) if return_state else y


def _restarts(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """int [batch, length]: how many sequences have started in the row so far, its own start not counted; None if none does."""
    batch, length = x.shape[:2]
    if cu_seqlens is None:
        return None
    starts = torch.zeros(batch * length + 1, dtype=torch.int32, device=x.device)
    starts[cu_seqlens.long()] = 1
    starts = starts[:-1].view(batch, length)
    starts[:, 0] = 0
    return starts.cumsum(1, dtype=torch.int32) if starts.any() else None


def _each_sequence(x, step, A, B, C, D, initial_state, bounds: list[int], chunk_size: int) -> tuple[Tensor, Tensor]:
    """Sequences one by one: the path for those that carry a state in or out, which training does not."""
    flat = [t.reshape(1, -1, *t.shape[2:]) for t in (x, step, B, C)]
    ys, states = [], []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        xs, ss, bs, cs = (t[:, start:end] for t in flat)
        state = None if initial_state is None else initial_state[i : i + 1]
        y, state = _chunked(xs, ss, A, bs, cs, D, state, None, chunk_size)
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1).view_as(x), torch.cat(states)


def _chunked(x, step, A, B, C, D, initial_state, restarts, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Fold groups into the batch and cut the time axis; the last chunk is padded with steps of 0, which change no state."""
    batch, length, heads, head_dim = x.shape
    groups, size = B.shape[2:]
    chunk = min(chunk_size, max(length, 1))
    chunks = max(-(-length // chunk), 1)
    pad = chunks * chunk - length

    def fold(t: Tensor) -> Tensor:  # [batch, length, groups * k, ...] -> [batch * groups, chunks, chunk, k, ...]
        t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)) if pad else t
        t = t.unflatten(2, (groups, -1)).unflatten(1, (chunks, chunk))
        return t.movedim(3, 1).flatten(0, 1)

    if restarts is not None:
        restarts = F.pad(restarts, (0, pad), value=int(restarts.max()) + 1) if pad else restarts
        restarts = restarts.view(batch, chunks, chunk).repeat_interleave(groups, 0)
    if initial_state is None:
        state = step.new_zeros(batch * groups, heads // groups * head_dim, size)
    else:
        state = initial_state.to(step.dtype).reshape(batch * groups, -1, size)
    # cumsum within a sequence: as a product with the mask, so that what came before the sequence costs it no digits
    decay = torch.matmul(_seen(chunk, restarts, x.device).to(step.dtype), fold(step * A))
    skip = None
    if D is not None and D.dim() == 1:
        skip = (
            D.to(step.dtype).view(groups, 1, -1).expand(batch, groups, chunks, -1).reshape(batch * groups, chunks, -1)
        )
    y, state = _Chunks.apply(fold(x), fold(step), decay, fold(B).squeeze(3), fold(C).squeeze(3), skip, state, restarts)
    y = y.unflatten(0, (batch, groups)).movedim(1, 3).reshape(batch, chunks * chunk, heads, head_dim)[:, :length]
    y = (y + x * D).to(x.dtype) if D is not None and D.dim() == 2 else y
    return y, state.view(batch, heads, head_dim, size)


class _Chunks(torch.autograd.Function):
    """x [r, c, q, h, p], step and decay [r, c, q, h], B and C [r, c, q, n], skip [r, c, h] or None, state [r, h * p, n].

    r: batch x groups, c: chunks, q: tokens of a chunk, h: heads of a group, p: head_dim, n: state. Rows are done a few at a
    time, which bounds what is formed in between. Backward keeps the inputs and the chunks' states alone and forms the decays
    [r, c, h, q, q] again, since they are larger than all of these.
    """

    @staticmethod
    def forward(ctx, x, step, decay, B, C, skip, state, restarts):
        inputs = (x, step, decay, B, C, skip, restarts)
        parts = [_forward(*_take(inputs, rows), state[rows]) for rows in _blocks(x)]
        y, states, last = map(_join, zip(*parts, strict=True))
        ctx.save_for_backward(*inputs, states)
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        inputs = ctx.saved_tensors
        parts = [_backward(*_take(inputs, rows), dy[rows], dlast[rows]) for rows in _blocks(dy)]
        dx, dstep, ddecay, dB, dC, dskip, dstate = map(_join, zip(*parts, strict=True))
        return dx, dstep, ddecay, dB, dC, dskip, dstate, None


def _blocks(x: Tensor) -> list[slice]:
    """Slices of rows of about 2^19 elements of x."""
    rows = max(1, BLOCK // max(x[0].numel(), 1)) if x.shape[0] else 1
    return [slice(i, i + rows) for i in range(0, max(x.shape[0], 1), rows)]


def _take(tensors, rows: slice) -> list[Tensor | None]:
    return [None if t is None else t[rows] for t in tensors]


def _join(parts) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def _forward(x, step, decay, B, C, skip, restarts, state) -> tuple[Tensor, Tensor, Tensor]:
    """y [r, c, q, h, p], the state before each chunk [r, c, h * p, n] and after the last."""
    r, c, q, h, p = x.shape
    narrow = x.dtype if x.dtype == torch.bfloat16 else decay.dtype  # of the operands of the products over p, q and n
    x, B, C = x.reshape(r * c, q, h, p), B.reshape(r * c, q, -1), C.reshape(r * c, q, -1)
    into, onto, through = _decays(decay, step, restarts)
    made = torch.bmm(_scaled(x, onto).to(narrow).flatten(2).mT, B.to(narrow))  # [r * c, h * p, n]
    states, last = _pass_on(made.view(r, c, h * p, -1), through.repeat_interleave(p, 2)[..., None], state)
    states = states.to(narrow)
    mixed = _between(decay, step).mul_(_scores(C, B, restarts))
    mixed = _add_skip(mixed, skip).to(narrow).flatten(0, 1)  # [r * c * h, q, q]
    y = _scaled(torch.bmm(C.to(narrow), states.flatten(0, 1).mT).view_as(x), into)
    y += torch.bmm(mixed, _by_head(x.to(narrow))).view(-1, h, q, p).transpose(1, 2)
    return y.to(x.dtype).view(r, c, q, h, p), states, last


def _backward(x, step, decay, B, C, skip, restarts, states, dy, dlast) -> tuple[Tensor | None, ...]:
    """The gradients of x, step, decay, B, C, skip and the first state."""
    r, c, q, h, p = dy.shape
    narrow, wide = states.dtype, decay.dtype
    x, dy, B, C = (t.reshape(r * c, q, *t.shape[3:]) for t in (x, dy, B, C))
    B_, C_, states = B.to(narrow), C.to(narrow), states.flatten(0, 1)
    into, onto, through = _decays(decay, step, restarts)

    dy_into = _scaled(dy, into).to(narrow)  # [r * c, q, h, p]
    wanted = torch.bmm(dy_into.flatten(2).mT, C_).view(r, c, h * p, -1)
    dstates, dstate = _pass_back(wanted, through.repeat_interleave(p, 2)[..., None], dlast)
    kept = (dstates.view(r * c, h, -1) * states.view(r * c, h, -1)).sum(-1).mul_(through.flatten(0, 1))  # [r * c, h]
    dstates = dstates.to(narrow).flatten(0, 1)

    x_heads, dy_heads = _by_head(x.to(narrow)), _by_head(dy.to(narrow))
    between, scores = _between(decay, step), _scores(C, B, restarts)
    mixed = _add_skip(between * scores, skip).to(narrow).flatten(0, 1)
    dmixed = torch.bmm(dy_heads, x_heads.mT).view_as(between)
    dskip = None if skip is None else dmixed.diagonal(dim1=2, dim2=3).sum(2, dtype=wide).view_as(skip)
    dscores = between.mul_(dmixed.to(wide)).sum(1)
    dscores = dscores.mul_(_seen(q, restarts, dy.device).view(-1, q, q)).to(narrow)
    pairs = between.mul_(scores)  # [r * c, h, i, j]: each pair's share in the slope of the loss in a_i - a_j + log dt_j
    given, taken = pairs.sum(3).transpose(1, 2), pairs.sum(2).transpose(1, 2)  # [r * c, q, h]

    from_state = torch.bmm(B_, dstates.mT).view_as(x)
    left = _dot(x, from_state).mul_(onto[..., 0])
    entered = _dot(torch.bmm(C_, states.mT).view_as(x), dy_into)
    ddecay = (given - taken).add_(entered).sub_(left)
    ddecay[:, -1] += left.sum(1) + kept
    dstep = (taken + left).div_(step.reshape(left.shape).clamp(min=2.0 ** RANGE[0]))
    dx = _scaled(from_state, onto)
    dx += torch.bmm(mixed.mT, dy_heads).view(-1, h, q, p).transpose(1, 2)
    dB = torch.bmm(_scaled(x, onto).to(narrow).flatten(2), dstates) + torch.bmm(dscores.mT, C_)
    dC = torch.bmm(dy_into.flatten(2), states) + torch.bmm(dscores, B_)
    grads = (dx.to(x.dtype), dstep, ddecay, dB.to(B.dtype), dC.to(C.dtype))
    return *(g.reshape(r, c, q, *g.shape[2:]) for g in grads), dskip, dstate


def _decays(decay: Tensor, step: Tensor, restarts: Tensor | None) -> tuple[Tensor, ...]:
    """From a = cumsum(A dt), [r, c, q, h]: exp(a_i) [k, q, h, 1], exp(a_last - a_j) dt_j [k, q, h, 1], exp(a_last) [r, c, h].
    Each is 0 where a sequence starts in between."""
    a = decay * LOG2E
    into, onto = a.clamp(*RANGE).exp2_(), (a[:, :, -1:] - a).clamp_(*RANGE).exp2_().mul_(step)
    through = into[:, :, -1].clone()
    if restarts is not None:
        before = torch.cat([restarts[:, :1, 0], restarts[:, :-1, -1]], 1)[..., None]  # of the token before each chunk
        into *= (restarts == before)[..., None]
        onto *= (restarts == restarts[..., -1:])[..., None]
        through *= restarts[..., -1:] == before
    return into.flatten(0, 1)[..., None], onto.flatten(0, 1)[..., None], through


def _between(decay: Tensor, step: Tensor) -> Tensor:
    """exp(a_i - a_j) dt_j, [k, h, i, j]; finite and of no meaning for j > i."""
    to = (decay * LOG2E).flatten(0, 1).transpose(1, 2)
    since = to - step.log2().flatten(0, 1).transpose(1, 2)
    return (to[..., :, None] - since[..., None, :]).clamp_(*RANGE).exp2_()


def _scores(C: Tensor, B: Tensor, restarts: Tensor | None) -> Tensor:
    """C_i . B_j for j <= i of one sequence, else 0: [k, 1, i, j], shared by the heads. Too few products to round for speed."""
    seen = _seen(C.shape[1], restarts, C.device).view(-1, *C.shape[1:2] * 2)
    return torch.where(seen, torch.bmm(_wide(C), _wide(B).mT), 0)[:, None]


def _seen(q: int, restarts: Tensor | None, device: torch.device) -> Tensor:
    """bool [..., i, j]: whether i sees j, which comes no later and belongs to the same sequence."""
    seen = torch.ones(q, q, dtype=torch.bool, device=device).tril()
    return seen if restarts is None else seen & (restarts[..., :, None] == restarts[..., None, :])


def _add_skip(mixed: Tensor, skip: Tensor | None) -> Tensor:
    """Adds D [..., h] to the diagonals of mixed [k, h, i, j], in place."""
    if skip is not None:
        mixed.diagonal(dim1=2, dim2=3).add_(skip.reshape(*mixed.shape[:2], 1))
    return mixed


def _scaled(t: Tensor, factor: Tensor) -> Tensor:
    """t * factor as a new tensor in fp32 (fp64), the copy multiplied in place: a third of the time of a mixed product."""
    return t.to(factor.dtype, copy=True).mul_(factor)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[k, q, h] from [k, q, h, p], summed in fp32."""
    return (a * b).sum(-1, dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)


def _pass_on(made: Tensor, through: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [r, c, h * p, n], and after the last."""
    before = torch.empty(made.shape, dtype=state.dtype, device=state.device)
    for chunk in range(made.shape[1]):
        before[:, chunk] = state
        state = torch.addcmul(made[:, chunk].to(state.dtype), through[:, chunk], state)
    return before, state


def _pass_back(wanted: Tensor, through: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the state after each chunk, and of the first."""
    after = torch.empty(wanted.shape, dtype=dlast.dtype, device=dlast.device)
    for chunk in reversed(range(wanted.shape[1])):
        after[:, chunk] = dlast
        dlast = torch.addcmul(wanted[:, chunk].to(dlast.dtype), through[:, chunk], dlast)
    return after, dlast


def _by_head(t: Tensor) -> Tensor:
    """[k, q, h, p] -> [k * h, q, p]."""
    return t.transpose(1, 2).flatten(0, 1)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
