"""The scan twice: `recurrence`, token by token as the paper defines it, and `run`, chunk by chunk in matrix products.

With a = cumsum(A dt) inside a chunk and u = dt x (Mamba-2, section 6):
    y_i    = exp(a_i) C_i S + sum_{j <= i} exp(a_i - a_j) (C_i . B_j) u_j + D x_i
    S_next = exp(a_last) S + sum_j exp(a_last - a_j) u_j B_j^T
The decays are masked before the exponential sees them, so that no discarded value can overflow, and gradients stay finite.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)  # exp2 takes a quarter of exp's time on a CPU
# No decay within a chunk falls below 2^-64, which vanishes beside 1 even in fp64: subnormal factors, which A dt reaches soon,
# make a multiplication on a CPU ten times slower.
LEAST = -64.0


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
    step_chunks = fold(step)
    decay = fold(step * A).cumsum(2)  # [batch * groups, chunks, chunk, heads / groups]
    if initial_state is None:
        state = decay.new_zeros(batch * groups, heads // groups * head_dim, size)
    else:
        state = initial_state.to(decay.dtype).reshape(batch * groups, -1, size)
    skip = None if D is None else D.to(decay.dtype).reshape(groups, heads // groups, -1)
    y, state = _Chunks.apply(fold(x), step_chunks, decay, fold(B).squeeze(3), fold(C).squeeze(3), skip, state, restarts)
    y = y.unflatten(0, (batch, groups)).movedim(1, 3).reshape(batch, chunks * chunk, heads, head_dim)[:, :length]
    return y, state.view(batch, heads, head_dim, size)


class _Chunks(torch.autograd.Function):
    """x [r, c, q, h, p], step and decay [r, c, q, h], B and C [r, c, q, n], skip [g, h, 1 or p] or None, state [r, h * p, n].

    r: batch x groups, c: chunks, q: tokens of a chunk, h: heads of a group, p: head_dim, n: state; k: r x c. Backward keeps the
    inputs and the chunks' states alone and forms the decays [k, h, q, q] again, since they are larger than all of these.
    """

    @staticmethod
    def forward(ctx, x, step, decay, B, C, skip, state, restarts):
        r, c, q, h, p = x.shape
        narrow = x.dtype if x.dtype == torch.bfloat16 else decay.dtype  # of the operands of the products over p and q
        x, step, B, C = (t.reshape(r * c, q, *t.shape[3:]) for t in (x, step, B, C))
        into, out, through, between = _decays(decay, restarts)
        u = (x * step[..., None]).to(narrow)
        made = torch.bmm((u * out[..., None]).to(narrow).flatten(2).mT, B.to(narrow))  # [k, h * p, n]
        states, last = _pass_on(made.view(r, c, h * p, -1), through.repeat_interleave(p, 2)[..., None], state)
        states = states.to(narrow).flatten(0, 1)
        y = torch.bmm(C.to(narrow), states.mT).view_as(x) * into[..., None]
        mixed = between.mul_(_scores(C, B)).to(narrow)  # [k, h, q, q]
        y += torch.bmm(mixed.flatten(0, 1), _by_head(u)).view(-1, h, q, p).transpose(1, 2)
        if skip is not None:
            y += x * _expand(skip, r, c)
        ctx.save_for_backward(x, step, decay, B, C, skip, states, restarts)
        return y.to(x.dtype).view(r, c, q, h, p), last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dlast):
        x, step, decay, B, C, skip, states, restarts = ctx.saved_tensors
        r, c, q, h, p = dy.shape
        narrow, dy = states.dtype, dy.reshape(r * c, q, h, p)
        into, out, through, between = _decays(decay, restarts)
        B_, C_, dy_ = B.to(narrow), C.to(narrow), dy.to(narrow)
        u = (x * step[..., None]).to(narrow)

        dy_into = (dy * into[..., None]).to(narrow)
        wanted = torch.bmm(dy_into.flatten(2).mT, C_).view(r, c, h * p, -1)
        dstates, dstate = _pass_back(wanted, through.repeat_interleave(p, 2)[..., None], dlast)
        kept = _wide(dstates.view(r, c, h, -1)).mul(states.view(r, c, h, -1)).sum(-1).mul_(through)  # [r, c, h]
        dstates = dstates.to(narrow).flatten(0, 1)

        u_heads, dy_heads, scores = _by_head(u), _by_head(dy_), _scores(C, B)
        mixed = (between * scores).to(narrow)
        dbetween = between.mul_(torch.bmm(dy_heads, u_heads.mT).view_as(between))
        dscores = dbetween.sum(1).to(narrow)
        pairs = dbetween.mul_(scores)  # [k, h, i, j]: what each pair of tokens adds to the loss's slope in a_i - a_j
        from_state = torch.bmm(B_, dstates.mT).view_as(x) * out[..., None]
        left = torch.linalg.vecdot(u.to(from_state.dtype), from_state)  # [k, q, h]
        entered = torch.linalg.vecdot(
            torch.bmm(C_, states.mT).view_as(x).to(from_state.dtype), dy_into.to(from_state.dtype)
        )
        ddecay = (pairs.sum(3) - pairs.sum(2)).transpose(1, 2).add_(entered).sub_(left)
        ddecay[:, -1] += left.sum(1) + kept.view(-1, h)

        du = from_state.add_(torch.bmm(mixed.flatten(0, 1).mT, dy_heads).view(-1, h, q, p).transpose(1, 2))
        dstep = torch.linalg.vecdot(du, x.to(du.dtype))
        dx = du.mul_(step[..., None])
        dskip = None
        if skip is not None:
            dx += dy * _expand(skip, r, c)
            dskip = (dy * x.to(du.dtype)).sum(1).view(-1, skip.shape[0], c, h, p).sum((0, 2))
            dskip = dskip if skip.shape[2] == p else dskip.sum(2, keepdim=True)
        dB = torch.bmm((u * out[..., None]).to(narrow).flatten(2), dstates) + torch.bmm(dscores.mT, C_)
        dC = torch.bmm(dy_into.flatten(2), states) + torch.bmm(dscores, B_)
        grads = (dx.to(x.dtype), dstep, ddecay, dB.to(B.dtype), dC.to(C.dtype))
        return *(g.view(r, c, q, *g.shape[2:]) for g in grads), dskip, dstate, None


def _decays(decay: Tensor, restarts: Tensor | None) -> tuple[Tensor, ...]:
    """From a = cumsum(A dt), [r, c, q, h]: exp of a_i [k, q, h], of a_last - a_j [k, q, h], of a_last [r, c, h], and of
    a_i - a_j for j <= i, else 0, [k, h, i, j]. Each is 0 where a sequence starts in between."""
    r, c, q, h = decay.shape
    a = decay * LOG2E
    into, out = a.clamp(LEAST, 0).exp2_(), (a[:, :, -1:] - a).clamp_(LEAST, 0).exp2_()
    through = into[:, :, -1].clone()
    a = a.view(r * c, q, h).transpose(1, 2)
    between = (a[..., :, None] - a[..., None, :]).clamp_(LEAST, 0).exp2_().tril_()
    if restarts is not None:
        before = torch.cat([restarts[:, :1, 0], restarts[:, :-1, -1]], 1)[..., None]  # of the token before each chunk
        into *= (restarts == before)[..., None]
        out *= (restarts == restarts[..., -1:])[..., None]
        through *= restarts[..., -1:] == before
        flat = restarts.reshape(r * c, 1, q)
        between *= flat[..., :, None] == flat[..., None, :]
    return into.flatten(0, 1), out.flatten(0, 1), through, between


def _scores(C: Tensor, B: Tensor) -> Tensor:
    """C_i . B_j for every pair of a chunk, [k, 1, i, j], shared by the heads: too few products to round for speed."""
    return torch.bmm(_wide(C), _wide(B).mT)[:, None]


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


def _expand(skip: Tensor, r: int, c: int) -> Tensor:
    """[g, h, 1 or p] -> [k, 1, h, 1 or p]."""
    g, h, p = skip.shape
    return skip[None, :, None].expand(r // g, g, c, h, p).reshape(r * c, 1, h, p)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
