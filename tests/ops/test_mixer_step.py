"""mixer_step: the bits of its three ops; a recurrence written out in float64; slots; several tokens as one by one; errors."""

import math

import pytest
import torch
import torch.nn.functional as F

import nvfp4_kernels as nk
from nvfp4_kernels.ops.mixer_step.op import mixer_step

# (batch, slots, tokens, heads, groups, head_dim, state, width)
SIZES = [(1, 1, 1, 8, 1, 64, 32, 4), (3, 5, 1, 4, 2, 16, 16, 4), (2, 2, 5, 6, 3, 80, 128, 3), (4, 9, 2, 1, 1, 1, 1, 2)]


def drawn(size, dtype=torch.float32, state_dtype=torch.float32, bias=True):
    batch, slots, tokens, heads, groups, head_dim, state, width = size
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    return dict(
        projected=torch.randn(batch, tokens, inner + channels + heads).to(dtype),
        windows=torch.randn(slots, channels, width - 1).to(dtype),
        states=torch.randn(slots, heads, head_dim, state).to(state_dtype),
        conv_weight=torch.randn(channels, width) / 2,
        conv_bias=torch.randn(channels) if bias else None,
        A=-torch.rand(heads) * 4,
        D=torch.randn(heads),
        dt_bias=torch.randn(heads),
        norm_weight=torch.randn(inner),
        groups=groups,
    )


def slots_of(size):
    return None if size[0] == size[1] else torch.randperm(size[1])[: size[0]]


def exact(given, indices, eps=1e-5):
    """y, windows and states after it, in float64, token by token and head by head."""
    g = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    windows, states, groups = g["windows"].clone(), g["states"].clone(), g["groups"]
    _, heads, head_dim, state = states.shape
    inner, channels = heads * head_dim, windows.shape[1]
    y = torch.zeros(*g["projected"].shape[:2], inner, dtype=torch.float64)
    for row in range(len(y)):
        slot = row if indices is None else int(indices[row])
        if slot < 0:
            continue
        for t in range(y.shape[1]):
            z, xBC, dt = g["projected"][row, t].split((inner, channels, heads))
            seen = torch.cat([windows[slot], xBC[:, None]], 1)
            windows[slot] = seen[:, 1:]
            made = F.silu((seen * g["conv_weight"]).sum(1) + (0 if g["conv_bias"] is None else g["conv_bias"]))
            x, B, C = made.split((inner, groups * state, groups * state))
            step = F.softplus(dt + g["dt_bias"])
            out = torch.empty(heads, head_dim, dtype=torch.float64)
            for h in range(heads):
                of = slice(h // (heads // groups) * state, (h // (heads // groups) + 1) * state)
                head = x[h * head_dim : (h + 1) * head_dim]
                states[slot, h] = torch.exp(g["A"][h] * step[h]) * states[slot, h] + step[h] * head[:, None] * B[of]
                out[h] = states[slot, h] @ C[of] + g["D"][h] * head
            u = (out.flatten() * F.silu(z)).view(groups, -1)
            y[row, t] = (u / torch.sqrt(u.square().mean(1, keepdim=True) + eps)).flatten() * g["norm_weight"]
    return y, windows, states


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_against_the_recurrence(backend, size, bias):
    given, indices = drawn(size, bias=bias), slots_of(size)
    wanted = exact(given, indices)
    y = mixer_step(**given, indices=indices)
    for got, want in zip((y, given["windows"], given["states"]), wanted, strict=True):
        assert (got.double() - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_the_bits_of_the_three_ops(backend, size, dtype, state_dtype):
    given, indices = drawn(size, dtype, state_dtype), slots_of(size)
    _, _, _, heads, groups, head_dim, state, _ = size
    inner, shared = heads * head_dim, groups * state
    slots = torch.arange(size[0]) if indices is None else indices
    states, window = given["states"].clone(), given["windows"][slots]
    z, xBC, dt = given["projected"].split((inner, inner + 2 * shared, heads), -1)
    xBC, window = nk.causal_conv1d(xBC, given["conv_weight"], given["conv_bias"], "silu", window, True)
    x, B, C = xBC.split((inner, shared, shared), -1)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, heads), (B, groups), (C, groups)))
    y = nk.state_update(states, x, dt, given["A"], B, C, given["D"], dt_bias=given["dt_bias"], indices=indices)
    y = nk.gated_rms_norm(y.flatten(-2), z, given["norm_weight"], 1e-5, inner // groups)
    assert torch.equal(mixer_step(**given, indices=indices), y)
    assert torch.equal(given["states"], states) and torch.equal(given["windows"][slots], window)


def test_rows_without_a_slot_and_slots_without_a_row(backend):
    size = (3, 4, 2, 4, 2, 16, 16, 4)
    given = drawn(size)
    before = {name: given[name].clone() for name in ("windows", "states")}
    indices = torch.tensor([2, -1, 0], dtype=torch.int32)
    wanted = exact(given, indices)[0]
    y = mixer_step(**given, indices=indices)
    assert not y[1].any()
    assert (y.double() - wanted).norm() <= 2e-5 * wanted.norm()
    for name, t in before.items():
        assert torch.equal(given[name][[1, 3]], t[[1, 3]])
        assert not torch.equal(given[name][[0, 2]], t[[0, 2]])


def test_tokens_at_once_are_tokens_one_by_one(backend):
    size = (2, 2, 5, 4, 2, 16, 32, 4)
    given = drawn(size, torch.bfloat16)
    alone = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    y = mixer_step(**given)
    for t in range(5):
        assert torch.equal(mixer_step(**alone | {"projected": alone["projected"][:, t : t + 1]}), y[:, t : t + 1])
    assert torch.equal(alone["states"], given["states"]) and torch.equal(alone["windows"], given["windows"])


def test_dt_limit_and_eps(backend):
    given = drawn(SIZES[1])
    copies = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    indices = torch.tensor([0, 1, 2])
    y = mixer_step(**given, indices=indices, dt_limit=(0.01, 0.02), eps=0.5)
    capped = dict(copies)
    raw = torch.log(torch.expm1(torch.full((4,), 0.02)))  # softplus(raw) = 0.02
    big = F.softplus(copies["projected"][..., -4:] + copies["dt_bias"]) > 0.02
    assert big.any()
    inner_dt = torch.where(big, raw - copies["dt_bias"], copies["projected"][..., -4:])
    low = F.softplus(inner_dt + copies["dt_bias"]) < 0.01
    inner_dt = torch.where(low, torch.log(torch.expm1(torch.full((4,), 0.01))) - copies["dt_bias"], inner_dt)
    capped["projected"] = torch.cat([copies["projected"][..., :-4], inner_dt], -1)
    wanted = exact(capped, indices, eps=0.5)[0]
    assert (y.double() - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(projected=torch.zeros(1, 1, 5)), r"projected: got shape \[1, 1, 5\]; allowed: \[1, 1, 1096\]"),
        (dict(windows=torch.zeros(1, 576, 2)), r"windows: got shape \[1, 576, 2\]; allowed: \[1, 576, 3\]"),
        (dict(windows=torch.zeros(1, 576, 3).half()), "windows: got torch.float16; allowed: torch.float32"),
        (dict(windows=torch.zeros(1, 3, 576).mT), "windows: got strides .*; allowed: contiguous memory"),
        (dict(states=torch.zeros(2, 8, 64, 32)), "states: got 2 slots; allowed: 1, the batch"),
        (dict(groups=3), "groups: got 3; allowed: a divisor of the 8 heads"),
        (dict(A=torch.zeros(3)), r"A: got shape \[3\]; allowed: \[8\]"),
        (dict(indices=torch.zeros(1)), "indices: got torch.float32; allowed: int32, int64"),
        (dict(indices=torch.tensor([7])), "indices: got a slot beyond the 1 of states"),
        (dict(conv_weight=torch.zeros(576, 5)), "conv_weight: got width 5; allowed: 2, 3, 4"),
    ],
)
def test_errors(change, message):
    given = drawn(SIZES[0]) | change
    before = given["states"].clone()
    with pytest.raises((TypeError, ValueError), match=message):
        mixer_step(**given)
    assert torch.equal(given["states"], before)


def test_opcheck():
    given = drawn(SIZES[1])
    groups = given.pop("groups")
    arguments = (*given.values(), torch.tensor([3, 0, 1]), groups, 0.0, math.inf, 1e-5)
    torch.library.opcheck(torch.ops.nvfp4.mixer_step.default, arguments)
