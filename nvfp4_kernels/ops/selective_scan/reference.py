"""The scan twice: `recurrence`, token by token as the paper defines it, and `run`, chunk by chunk in matrix products.

With a = cumsum(A dt) inside a chunk (Mamba-2, section 6), whose differences are formed as sums of their own:
    y_i    = exp(a_i) C_i S + sum_{j <= i} exp(a_i - a_j) dt_j (C_i . B_j) x_j + D x_i
    S_next = exp(a_last) S + sum_j exp(a_last - a_j) dt_j x_j B_j^T
`backward` is the derivative of these lines; the chunks' states and the decays, larger than the inputs, are formed again.
Shapes in here: r rows (batch x groups), c chunks, q tokens of a chunk, h heads of a group, p head_dim, n state.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nvfp4_kernels.ops._check import boundaries


def refuses(*arguments) -> str | None:
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
    step = steps(dt, dt_bias, dt_softplus, *dt_limit)
    B, C = (t.repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    state = x.new_zeros(batch, heads, head_dim, B.shape[3]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(length):
        decay = torch.exp(A * step[:, t])[:, :, None, None]
        state = decay * state + (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + x * _per_channel(D)
    return (y if z is None else y * F.silu(z)), state


def steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, low: float, high: float) -> Tensor:
    """softplus(dt + bias) in fp32 or better, clamped. logaddexp keeps the relative accuracy of small steps."""
    dt = _wide(dt) if dt_bias is None else _wide(dt) + dt_bias
    dt = torch.logaddexp(dt, torch.zeros_like(dt)) if dt_softplus else dt
    return dt.clamp(low, high)


def run(
    x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size
) -> tuple[Tensor, Tensor]:
    step = steps(dt, dt_bias, dt_softplus, low, high)
    ys, lasts = [], []
    for xs, ss, bs, cs, state in _sequences(cu_seqlens, initial_state, x, step, B, C):
        folded = _fold_all(xs, ss, A, bs, cs, chunk_size)
        states, last = _states(folded, _first(xs, bs, state))
        y = _unfold(_outputs(folded, states), xs, B.shape[2])
        ys.append((y if D is None else y + xs * _per_channel(D)).to(x.dtype))
        lasts.append(last.reshape(xs.shape[0], *xs.shape[2:], B.shape[3]))
    return torch.cat(ys, 1).reshape(x.shape).contiguous(), torch.cat(lasts).contiguous()


def backward(
    dy, dstate, x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size
) -> tuple[Tensor | None, ...]:
    """The gradients of x, dt, A, B, C, D, dt_bias and initial_state; None for those not given."""
    step = steps(dt, dt_bias, dt_softplus, low, high)
    parts = []
    inputs = zip(_sequences(cu_seqlens, initial_state, x, step, B, C), _sequences(cu_seqlens, dstate, dy), strict=True)
    for (xs, ss, bs, cs, state), (dys, dlast) in inputs:
        folded, dys_folded = _fold_all(xs, ss, A, bs, cs, chunk_size), _fold(dys, bs.shape[2], chunk_size)
        first = _first(xs, bs, state)
        states, _ = _states(folded, first)
        dlast = torch.zeros_like(first) if dlast is None else dlast.to(first.dtype).reshape(first.shape)
        *grads, dfirst = _gradients(folded, states, dys_folded, dlast)
        parts.append(
            [_unfold(g, t, B.shape[2]) for g, t in zip(grads, (xs, ss, ss, bs, cs), strict=True)]
            + [dfirst.reshape(xs.shape[0], *xs.shape[2:], B.shape[3])]
        )
    dx, dstep, drate, dB, dC = (
        torch.cat(t, 1).reshape(like.shape)
        for t, like in zip(list(zip(*parts, strict=True))[:5], (x, dt, dt, B, C), strict=True)
    )
    dinitial = None if initial_state is None else torch.cat([p[5] for p in parts]).to(initial_state.dtype)

    dD = None
    if D is not None:
        dx = dx + dy * _per_channel(D)
        dD = (_wide(dy) * _wide(x)).sum((0, 1) if D.dim() == 2 else (0, 1, 3)).to(D.dtype)
    dA = (drate * step).sum((0, 1)).to(A.dtype)  # drate: of A dt, token by token
    dstep = (dstep + drate * A) * ((step > low) & (step < high))  # clamped steps have no slope
    if dt_softplus:
        dstep = dstep * torch.sigmoid(_wide(dt) if dt_bias is None else _wide(dt) + dt_bias)
    dbias = None if dt_bias is None else dstep.sum((0, 1)).to(dt_bias.dtype)
    return dx.to(x.dtype), dstep.to(dt.dtype), dA, dB.to(B.dtype), dC.to(C.dtype), dD, dbias, dinitial


def _sequences(cu_seqlens: Tensor | None, states: Tensor | None, *tensors: Tensor):
    """(each sequence's tokens of the tensors, its state or None); all at once where each row is a sequence."""
    if cu_seqlens is None:
        yield (*tensors, states)
        return
    flat = [t.reshape(1, -1, *t.shape[2:]) for t in tensors]
    bounds = boundaries(cu_seqlens, flat[0].shape[1])
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        yield (*(t[:, start:end] for t in flat), None if states is None else states[i : i + 1])


def _fold(t: Tensor, groups: int, chunk_size: int) -> Tensor:
    """[batch, length, groups * k, ...] -> [r, c, q, k, ...]; zeros pad the last chunk: steps of 0 change no state."""
    length = t.shape[1]
    chunk = min(chunk_size, max(length, 1))
    pad = max(-(-length // chunk), 1) * chunk - length
    t = F.pad(t, (0, 0) * (t.dim() - 2) + (0, pad)).unflatten(1, (-1, chunk)).unflatten(3, (groups, -1))
    return t.movedim(3, 1).flatten(0, 1)


def _unfold(t: Tensor, like: Tensor, groups: int) -> Tensor:
    """The inverse of _fold, for a tensor whose shape begins as that of `like`."""
    batch, length = like.shape[:2]
    t = t.unflatten(0, (batch, groups)).movedim(1, 3).flatten(3, 4).flatten(1, 2)
    return t[:, :length]


def _fold_all(x, step, A, B, C, chunk_size: int) -> tuple[Tensor, ...]:
    """x [r, c, q, h, p], step and A step [r, c, q, h], B and C [r, c, q, n], in fp32 or fp64, as x asks for."""
    groups, dtype = B.shape[2], _wide(x).dtype
    x, step, rate, B, C = (_fold(t.to(dtype), groups, chunk_size) for t in (x, step, step * A, B, C))
    return x, step, rate, B.squeeze(3), C.squeeze(3)


def _first(x: Tensor, B: Tensor, state: Tensor | None) -> Tensor:
    """The state before the first token, [r, h, p, n]."""
    batch, _, heads, head_dim = x.shape
    shape = (batch * B.shape[2], heads // B.shape[2], head_dim, B.shape[3])
    return _wide(x).new_zeros(shape) if state is None else state.to(_wide(x).dtype).reshape(shape)


def _states(folded, state: Tensor) -> tuple[Tensor, Tensor]:
    """The state before each chunk, [r, c, h, p, n], and after the last."""
    x, step, rate, B, _ = folded
    _, onto, through = _decays(rate)
    made = torch.einsum("rcqh,rcqhp,rcqn->rchpn", step * onto, x, B)
    before = []
    for c in range(x.shape[1]):
        before.append(state)
        state = through[:, c] * state + made[:, c]
    return torch.stack(before, 1), state


def _outputs(folded, states: Tensor) -> Tensor:
    """y without its skip, [r, c, q, h, p]."""
    x, step, rate, B, C = folded
    entered = torch.einsum("rcqn,rchpn->rcqhp", C, states) * _decays(rate)[0][..., None]
    scores = torch.einsum("rcin,rcjn->rcij", C, B)
    mixed = _between(rate) * scores[:, :, None] * step.mT[..., None, :]
    return entered + torch.einsum("rchij,rcjhp->rcihp", mixed, x)


def _gradients(folded, states: Tensor, dy: Tensor, dlast: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x, of step and A dt (both as if the other stood still), of B, C and the first state."""
    x, step, rate, B, C = folded
    dy = dy.to(x.dtype)
    into, onto, through = _decays(rate)

    wanted = torch.einsum("rcqh,rcqhp,rcqn->rchpn", into, dy, C)
    after = []
    for c in reversed(range(x.shape[1])):
        after.append(dlast)
        dlast = through[:, c] * dlast + wanted[:, c]
    dstates = torch.stack(after[::-1], 1)  # of the state after each chunk

    between = _between(rate)
    scores = torch.einsum("rcin,rcjn->rcij", C, B)[:, :, None]
    dmixed = torch.einsum("rcihp,rcjhp->rchij", dy, x)
    weighted = step.mT[..., None, :]
    pairs = between * scores * dmixed  # [r, c, h, i, j]
    from_state = torch.einsum("rcqn,rchpn->rcqhp", B, dstates) * onto[..., None]
    given = (from_state * x).sum(-1)  # [r, c, q, h]: what a token gives to the state, of its step
    entered = torch.einsum("rcqn,rchpn,rcqhp->rcqh", C, states, dy) * into
    kept = (dstates * states * through).sum((-1, -2))

    # of the decay by token k: pairs i >= k > j, what tokens i >= k read of the state and tokens j < k give to it, what it keeps
    over = (pairs * weighted).flip(-2).cumsum(-2).flip(-2).tril(-1).sum(-1).mT
    reads = entered.flip(2).cumsum(2).flip(2)
    gives = F.pad((given * step)[:, :, :-1], (0, 0, 1, 0)).cumsum(2)
    drate = over + reads + gives + kept[:, :, None]
    dstep = pairs.sum(-2).mT + given
    dx = from_state * step[..., None] + torch.einsum("rchij,rcihp->rcjhp", between * scores * weighted, dy)
    dscores = (between * weighted * dmixed).sum(2)
    dB = torch.einsum("rcqhp,rcqh,rchpn->rcqn", x, onto * step, dstates) + torch.einsum("rcij,rcin->rcjn", dscores, C)
    dC = torch.einsum("rcqhp,rcqh,rchpn->rcqn", dy, into, states) + torch.einsum("rcij,rcjn->rcin", dscores, B)
    return dx, dstep, drate, dB[..., None, :], dC[..., None, :], dlast


def _decays(rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From before the chunk to after each token, from there to its end [r, c, q, h], and over all of it [r, c, h, 1, 1].

    Each is the exponential of a sum of its own: a difference of two sums would lose to rounding what strong decays hold.
    """
    later = F.pad(rate[:, :, 1:], (0, 0, 0, 1)).flip(2).cumsum(2).flip(2)
    return rate.cumsum(2).exp(), later.exp(), rate.sum(2).exp()[..., None, None]


def _between(rate: Tensor) -> Tensor:
    """The decay from after token j to after token i for j <= i, else 0: [r, c, h, i, j]; each by its own sum, as in _decays."""
    rate = rate.mT[..., :, None].expand(*rate.mT.shape, rate.shape[2])
    before = torch.ones(rate.shape[-2:], dtype=torch.bool, device=rate.device).tril()
    return rate.masked_fill(~before.tril(-1), 0).cumsum(-2).exp().masked_fill(~before, 0)


def _per_channel(D: Tensor) -> Tensor:
    return D if D.dim() == 2 else D[:, None]


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
