"""The functions under others' names against formulas in float64, token by token; every argument that they know."""

import math

import pytest
import torch
import torch.nn.functional as F

from nvfp4_kernels.compat.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from nvfp4_kernels.compat.mamba_ssm import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
    selective_state_update,
)


def silu(x):
    return x / (1 + torch.exp(-x))


def scan(x, dt, A, B, C, D, z, dt_bias, softplus, resets, state):
    """One row: x [seqlen, heads, headdim]. resets: tokens before which the state is zero. y, and the state after each token."""
    ys, states = [], []
    heads = x.shape[1]
    for t in range(x.shape[0]):
        state = torch.zeros_like(state) if t in resets else state
        step = dt[t] + (0 if dt_bias is None else dt_bias)
        step = torch.log(1 + torch.exp(step)) if softplus else step
        rows = []
        for h in range(heads):
            g = h // (heads // B.shape[1])
            rows.append(torch.exp(A[h] * step[h]) * state[h] + step[h] * torch.outer(x[t, h], B[t, g]))
        state = torch.stack(rows)
        y = torch.stack([state[h] @ C[t, h // (heads // B.shape[1])] for h in range(heads)])
        y = y if D is None else y + x[t] * (D if D.dim() == 2 else D[:, None])
        ys.append(y if z is None else y * silu(z[t]))
        states.append(state)
    return torch.stack(ys), states


def inputs(batch=2, length=13, heads=4, head_dim=3, groups=2, state=5):
    d = torch.float64
    return dict(
        x=torch.randn(batch, length, heads, head_dim, dtype=d), dt=torch.rand(batch, length, heads, dtype=d),
        A=-torch.rand(heads, dtype=d), B=torch.randn(batch, length, groups, state, dtype=d),
        C=torch.randn(batch, length, groups, state, dtype=d),
    )  # fmt: skip


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("initial", [True, False])
def test_chunk_scan(per_channel, softplus, packed, initial):
    v = inputs()
    D = torch.randn(4, 3, dtype=torch.float64) if per_channel else torch.randn(4, dtype=torch.float64)
    z, bias = torch.randn_like(v["x"]), torch.rand(4, dtype=torch.float64)
    first = torch.randn(2, 4, 3, 5, dtype=torch.float64) if initial else None
    seq_idx = torch.tensor([[0] * 4 + [1] * 9, [3] * 12 + [7]]) if packed else None
    y, last = mamba_chunk_scan_combined(
        **v, chunk_size=4, D=D, z=z, dt_bias=bias, initial_states=first, seq_idx=seq_idx, dt_softplus=softplus,
        return_final_states=True,
    )  # fmt: skip
    for b, resets in enumerate([{4}, {12}] if packed else [set(), set()]):
        start = torch.zeros(4, 3, 5, dtype=torch.float64) if first is None else first[b]
        row = [v[n][b] for n in ("x", "dt")] + [v["A"]] + [v[n][b] for n in ("B", "C")]
        expected, states = scan(*row, D, z[b], bias, softplus, resets, start)
        torch.testing.assert_close(y[b], expected)
        torch.testing.assert_close(last[b], states[-1])


@pytest.mark.parametrize("with_seq_idx", [True, False])
def test_states_of_packed_sequences(with_seq_idx):
    v = inputs(batch=1)
    cu_seqlens = torch.tensor([0, 4, 5, 13])
    seq_idx = torch.tensor([[0] * 4 + [1] + [2] * 8]) if with_seq_idx else None
    y, states = mamba_chunk_scan_combined(
        **v, chunk_size=4, seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=True
    )
    row = [v["x"][0], v["dt"][0], v["A"], v["B"][0], v["C"][0]]
    expected, after = scan(*row, None, None, None, False, {4, 5}, torch.zeros(4, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(y[0], expected)
    torch.testing.assert_close(states, torch.stack([after[3], after[4], after[12]]))


@pytest.mark.parametrize("norm", ["none", "before", "after"])
@pytest.mark.parametrize("mlp", [0, 6])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_split_form(norm, mlp, final, packed):
    heads, head_dim, groups, state, width, length = 4, 3, 2, 5, 4, 13
    inner, shared = heads * head_dim, groups * state
    zxbcdt = torch.randn(1, length, 2 * mlp + 2 * inner + 2 * shared + heads, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(inner + 2 * shared, width).double(), torch.randn(inner + 2 * shared).double()
    A, D, dt_bias = -torch.rand(heads).double(), torch.randn(heads).double(), torch.rand(heads).double()
    scale, out = torch.randn(inner).double(), torch.randn(7, inner + mlp).double()
    resets = {5} if packed else set()
    seq_idx = torch.tensor([[0] * 5 + [1] * 8]) if packed else None

    def expected():
        first, z, xBC, dt = zxbcdt[0].split((2 * mlp, inner, inner + 2 * shared, heads), -1)
        rows = []
        for t in range(length):
            total = bias
            for k in range(width):
                source = t - width + 1 + k
                if source >= max([0] + [r for r in resets if r <= t]):
                    total = total + weight[:, k] * xBC[source]
            rows.append(silu(total))
        x, B, C = torch.stack(rows).split((inner, shared, shared), -1)
        x = x.view(length, heads, head_dim)
        start = torch.zeros(heads, head_dim, state, dtype=torch.float64)
        gates = z.view(length, heads, head_dim) if norm == "none" else None
        y, _ = scan(
            x,
            dt,
            A,
            B.view(length, groups, state),
            C.view(length, groups, state),
            D,
            gates,
            dt_bias,
            True,
            resets,
            start,
        )
        y = y.reshape(length, inner)
        if norm != "none":
            u = y * silu(z) if norm == "before" else y
            parts = u.view(length, groups, -1)
            u = (parts / torch.sqrt((parts**2).mean(-1, keepdim=True) + 1e-3)).view(length, inner) * scale
            y = u if norm == "before" else u * silu(z)
        if mlp:
            y = torch.cat([silu(first[:, :mlp]) * first[:, mlp:], y], -1)
        return (y @ out.t())[None]

    got = mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 4, seq_idx=seq_idx, return_final_states=final,
        rmsnorm_weight=None if norm == "none" else scale, rmsnorm_eps=1e-3, outproj_weight=out, headdim=head_dim,
        ngroups=groups, norm_before_gate=norm == "after",
    )  # fmt: skip
    got = got[0] if final else got
    want = expected()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), zxbcdt)[0] for t in (got, want)))


def test_state_update_in_the_layout_of_mamba_ssm():
    v = inputs(batch=3, length=1)
    D, bias = torch.randn(4).double(), torch.rand(4).double()
    pool = torch.randn(5, 4, 3, 5).double()
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    before = pool.clone()
    y = selective_state_update(
        pool, v["x"][:, 0], v["dt"][:, 0, :, None].expand(-1, -1, 3), v["A"][:, None, None].expand(-1, 3, 5), v["B"][:, 0],
        v["C"][:, 0], D[:, None].expand(-1, 3), dt_bias=bias[:, None].expand(-1, 3), dt_softplus=True,
        state_batch_indices=slots,
    )  # fmt: skip
    for b, slot in enumerate(slots.tolist()):
        row = [v["x"][b], v["dt"][b], v["A"], v["B"][b], v["C"][b]]
        expected, after = scan(*row, D, None, bias, True, set(), before[slot])
        torch.testing.assert_close(y[b], expected[0])
        torch.testing.assert_close(pool[slot], after[0])
    assert torch.equal(pool[[1, 3]], before[[1, 3]])
    with pytest.raises(ValueError, match="A: got shape"):
        selective_state_update(
            pool[:3], v["x"][:, 0], v["dt"][:, 0, :, None].expand(-1, -1, 3), torch.randn(4, 3, 5), None, None
        )


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_norm(norm_before_gate, with_bias):
    x, z, weight = torch.randn(6, 12).double(), torch.randn(6, 12).double(), torch.randn(12).double()
    bias = torch.randn(12).double() if with_bias else None
    got = rmsnorm_fn(x, weight, bias, z, 1e-3, 4, norm_before_gate)
    u = (x if norm_before_gate else x * silu(z)).view(6, 3, 4)
    y = (u / torch.sqrt((u**2).mean(-1, keepdim=True) + 1e-3)).view(6, 12) * weight + (0 if bias is None else bias)
    torch.testing.assert_close(got, y * silu(z) if norm_before_gate else y)


def test_convolution():
    x, weight, bias = torch.randn(2, 5, 9).double(), torch.randn(5, 4).double(), torch.randn(5).double()
    plain = F.conv1d(x, weight[:, None], bias, padding=3, groups=5)[..., :9]
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias), plain)
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation="swish"), silu(plain))
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1, -1], [0] * 9])
    packed = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx)
    torch.testing.assert_close(
        packed[0, :, 3:7], F.conv1d(x[:1, :, 3:7], weight[:, None], bias, padding=3, groups=5)[0, :, :4]
    )
    assert (packed[0, :, 7:] == 0).all()
    first, rest = x[..., :5], x[..., 5:]
    start, state = causal_conv1d_fn(first, weight, bias, return_final_states=True)
    follow = causal_conv1d_fn(rest, weight, bias, initial_states=state)
    torch.testing.assert_close(torch.cat([start, follow], -1), plain)
    with pytest.raises(ValueError, match="seq_idx: got packed sequences"):
        causal_conv1d_fn(x, weight, seq_idx=seq_idx, return_final_states=True)


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("state_len", [3, 4, 7])
def test_convolution_token_by_token(ring, state_len):
    x, weight, bias = torch.randn(2, 5, 12).double(), torch.randn(5, 4).double(), torch.randn(5).double()
    plain = silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=5)[..., :12])
    pool, slots, outputs, t = torch.zeros(4, 5, state_len).double(), torch.tensor([3, 1]), [], 0
    for tokens in (1, 1, 3, 1, 2, 1, 3):
        piece = x[..., t : t + tokens]
        lengths = torch.full((2,), t, dtype=torch.int32) if ring else None
        y = causal_conv1d_update(
            piece[..., 0] if tokens == 1 else piece, pool, weight, bias, "silu", lengths, conv_state_indices=slots
        )
        outputs.append(y[..., None] if tokens == 1 else y)
        t += tokens
    torch.testing.assert_close(torch.cat(outputs, -1), plain)
    assert (pool[[0, 2]] == 0).all() and math.isfinite(float(pool.sum()))


def test_state_update_clamps_no_step():
    """Without softplus steps may be negative, and mamba_ssm takes them as they are."""
    state, dt, A = (
        torch.randn(1, 2, 3, 4, dtype=torch.float64),
        torch.tensor([[-0.5, 0.25]]).double(),
        -torch.rand(2).double(),
    )
    x, B = torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 1, 4, dtype=torch.float64)
    expected = torch.exp(A * dt)[..., None, None] * state + (dt[..., None] * x)[..., None] * B[:, :, None]
    selective_state_update(state, x, dt[..., None].expand(-1, -1, 3), A[:, None, None].expand(-1, 3, 4), B, B)
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("slots", [[3, 0, 1], [2, -1, 0], [-1, 3, -1], [-1, -1, -1]])
def test_convolution_of_slots(slots):
    """Negative slots: nothing is stored, and zeros come out; no gradients, whatever asks for them."""
    state, x = torch.randn(5, 6, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    weight, before = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), state.clone()
    y = causal_conv1d_update(x, state, weight, conv_state_indices=torch.tensor(slots, dtype=torch.int32))
    assert not y.requires_grad and not state.requires_grad
    expected = before.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[slot] = torch.cat([before[slot, :, 1:], x[row, :, None]], 1)
            torch.testing.assert_close(y[row], (expected[slot] * weight.detach()).sum(1))
        else:
            assert (y[row] == 0).all()
    assert torch.equal(state, expected)


@pytest.mark.parametrize("with_seq_idx", [True, False])
def test_states_where_sequences_are_empty(with_seq_idx):
    """The first sequence that has tokens starts from the initial state; empty ones leave zeros."""
    v = inputs(batch=1, length=6)
    first, bounds = torch.randn(1, 4, 3, 5, dtype=torch.float64), [0, 0, 2, 2, 6, 6]
    seq_idx = torch.tensor([[5, 5, 8, 8, 8, 8]]) if with_seq_idx else None
    out, final, states = mamba_chunk_scan_combined(
        **v, chunk_size=4, initial_states=first, seq_idx=seq_idx, cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        return_final_states=True, return_varlen_states=True,
    )  # fmt: skip
    ys, after = scan(
        *(v[name][0] for name in ("x", "dt")), v["A"], v["B"][0], v["C"][0], None, None, None, False, {2}, first[0]
    )
    zeros = torch.zeros_like(after[0])
    torch.testing.assert_close(out[0], ys)
    torch.testing.assert_close(final[0], after[5])
    torch.testing.assert_close(states, torch.stack([zeros, after[1], zeros, after[5], zeros]))


def test_one_group_may_go_without_an_axis():
    v = inputs(batch=2, length=1, groups=1)
    given = dict(x=v["x"][:, 0], dt=v["dt"][:, 0, :, None].expand(-1, -1, 3), A=v["A"][:, None, None].expand(-1, 3, 5))
    states = [torch.ones(2, 4, 3, 5).double() for _ in range(2)]
    y = [
        selective_state_update(state, **given, B=v["B"][:, 0].view(shape), C=v["C"][:, 0].view(shape))
        for state, shape in zip(states, ((2, 1, 5), (2, 5)), strict=True)
    ]
    assert torch.equal(*y) and torch.equal(*states)


X, SCAN = torch.zeros(2, 5, 6), inputs(length=6)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: mamba_chunk_scan_combined(**SCAN, chunk_size=4, seq_idx=torch.zeros(1, 6)),
            r"seq_idx: got shape \[1, 6\]",
        ),
        (lambda: mamba_chunk_scan_combined(**SCAN, chunk_size=4, seq_idx=[0]), "seq_idx: got list"),
        (
            lambda: mamba_chunk_scan_combined(
                **SCAN, chunk_size=4, seq_idx=torch.zeros(2, 6), initial_states=torch.zeros(1, 4, 3, 5)
            ),
            r"initial_states: got shape \[1, 4, 3, 5\]; allowed: \[2, 4, 3, 5\]",
        ),
        (lambda: causal_conv1d_fn(X[0], torch.zeros(5, 4)), r"x: got shape \[5, 6\]; allowed: \[batch, dim, seqlen\]"),
        (
            lambda: causal_conv1d_fn(
                X, torch.zeros(5, 4), return_final_states=True, final_states_out=torch.zeros(2, 5, 4)
            ),
            r"final_states_out: got shape \[2, 5, 4\]; allowed: \[2, 5, 3\]",
        ),
        (
            lambda: causal_conv1d_update(X, torch.zeros(3, 5, 3), torch.zeros(5, 4)),
            r"conv_state: got shape \[3, 5, 3\]",
        ),
        (lambda: causal_conv1d_update(X, None, torch.zeros(5, 4)), "conv_state: got NoneType"),
        (
            lambda: causal_conv1d_update(X, torch.zeros(2, 5, 7), torch.zeros(5, 4), cache_seqlens=torch.tensor([1])),
            r"cache_seqlens: got shape \[1\]; allowed: \[2\]",
        ),
        (
            lambda: causal_conv1d_update(X, torch.zeros(9, 5, 3), torch.zeros(5, 4), conv_state_indices=[1, 2]),
            "conv_state_indices: got list",
        ),
        (lambda: rmsnorm_fn(X, torch.ones(6), torch.ones(5)), r"bias: got shape \[5\]; allowed: \[6\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_nothing_is_ignored():
    v, w = inputs(batch=1, length=6), torch.randn(5, 4)
    with pytest.raises(ValueError, match="cu_seqlens: got other sequences"):
        mamba_chunk_scan_combined(
            **v,
            chunk_size=4,
            seq_idx=torch.zeros(1, 6).int(),
            cu_seqlens=torch.tensor([0, 3, 6]),
            return_varlen_states=True,
        )
    with pytest.raises(ValueError, match="final_states_out: got a tensor"):
        causal_conv1d_fn(torch.randn(1, 5, 6), w, final_states_out=torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="conv_state_indices: got shape"):
        causal_conv1d_update(torch.randn(2, 5), torch.zeros(4, 5, 3), w, conv_state_indices=torch.tensor([0, 1, 2]))
    split = (torch.randn(1, 2, 48), torch.randn(32, 4), None, torch.zeros(4), -torch.ones(4))
    with pytest.raises(ValueError, match="headdim: got 4; allowed: 3"):
        mamba_split_conv1d_scan_combined(*split, torch.ones(4, 3), 4, headdim=4, ngroups=2)
    with pytest.raises(ValueError, match="outproj_bias: got a tensor"):
        mamba_split_conv1d_scan_combined(*split, torch.ones(4), 4, headdim=3, ngroups=2, outproj_bias=torch.zeros(6))
