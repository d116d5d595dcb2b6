"""The mixer's one function against its three ops in sequence, and torch.compile through the three."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.mixer import mixer

HEADS, HEAD_DIM, GROUPS, STATE = 4, 16, 2, 12
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE


def inputs(dtype, batch=2, length=37):
    """Leaves, and what the mixer gets: z, xBC and dt are pieces of one projection, as in the model."""
    projected = torch.randn(batch, length, INNER + CHANNELS + HEADS).to(dtype)
    parameters = (torch.randn(CHANNELS, 4) / 2, torch.randn(CHANNELS), -torch.rand(HEADS) * 4, torch.randn(HEADS),
                  torch.randn(HEADS) - 2, torch.rand(INNER) + 0.5)  # fmt: skip
    return [t.requires_grad_() for t in (projected, *parameters)]


def in_sequence(z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, cu_seqlens=None):
    mixed = nk.causal_conv1d(xBC, conv_weight, conv_bias, cu_seqlens=cu_seqlens)
    x, B, C = mixed.split((INNER, GROUPS * STATE, GROUPS * STATE), -1)
    x, B, C = x.unflatten(-1, (HEADS, HEAD_DIM)), B.unflatten(-1, (GROUPS, STATE)), C.unflatten(-1, (GROUPS, STATE))
    y = nk.selective_scan(
        x, dt, A, B, C, D, dt_bias=dt_bias, dt_limit=(0.001, 1.0), chunk_size=16, cu_seqlens=cu_seqlens
    )
    return nk.gated_rms_norm(y.flatten(-2), z, norm_weight, 1e-5, INNER // GROUPS)


def at_once(*tensors, cu_seqlens=None):
    return mixer(*tensors, cu_seqlens, GROUPS, STATE, (0.001, 1.0), 16, 1e-5)


def results(function, leaves, dout, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    out = function(*leaves[0].split((INNER, CHANNELS, HEADS), -1), *leaves[1:], **options)
    given = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, given, dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_mixer_is_the_three_ops_in_sequence(backend, dtype, packed, biased):
    leaves = inputs(dtype)
    if not biased:
        leaves[2] = None
    dout = torch.randn(2, 37, INNER).to(dtype)
    options = dict(cu_seqlens=torch.tensor([0, 11, 11, 50, 74])) if packed else {}
    expected = results(in_sequence, leaves, dout, **options)
    for got, same in zip(results(at_once, leaves, dout, **options), expected, strict=True):
        assert got.dtype == same.dtype and torch.isfinite(got).all() and got.any()
        if backend == "native":
            assert torch.equal(got, same)
        else:  # autograd may add up the reference's gradients in another order
            torch.testing.assert_close(got, same)


def test_mixer_keeps_its_input_and_the_scan_alone():
    """Nothing of the convolution's output, [tokens, channels], is kept for backward."""
    leaves, kept = inputs(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        at_once(*leaves[0].split((INNER, CHANNELS, HEADS), -1), *leaves[1:])
    own = {t.untyped_storage().data_ptr() for t in leaves}
    made = {t.untyped_storage().data_ptr(): t.numel() for t in kept if t is not None}
    assert sum(count for place, count in made.items() if place not in own) == 2 * 37 * INNER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_ops_compile_whole(backend, dtype):
    leaves = inputs(dtype)
    dout = torch.randn(2, 37, INNER).to(dtype)
    expected = results(in_sequence, leaves, dout)
    compiled = torch.compile(in_sequence, fullgraph=True, backend="aot_eager")
    for got, same in zip(results(compiled, leaves, dout), expected, strict=True):
        assert got.isfinite().all() and torch.equal(got, same)


def test_a_token_at_a_time_compiles_whole(backend):
    """The generating step: the convolution with its state, then state_update in place."""
    conv, state = torch.randn(2, CHANNELS, 3), torch.randn(2, HEADS, HEAD_DIM, STATE)
    projected, *parameters = (t.detach() for t in inputs(torch.float32, 2, 1))
    conv_weight, conv_bias, A, D, dt_bias, norm_weight = parameters

    def step(z, xBC, dt, conv, state):
        mixed, conv = nk.causal_conv1d(xBC, conv_weight, conv_bias, initial_state=conv, return_state=True)
        x, B, C = mixed[:, 0].split((INNER, GROUPS * STATE, GROUPS * STATE), -1)
        x, B, C = x.unflatten(-1, (HEADS, HEAD_DIM)), B.unflatten(-1, (GROUPS, STATE)), C.unflatten(-1, (GROUPS, STATE))
        y = nk.state_update(state, x, dt[:, 0], A, B, C, D, dt_bias=dt_bias, dt_limit=(0.0, math.inf))
        return nk.gated_rms_norm(y.flatten(-2), z[:, 0], norm_weight, 1e-5, INNER // GROUPS), conv

    given = projected.split((INNER, CHANNELS, HEADS), -1)
    states = [state.clone(), state.clone()]
    expected = step(*given, conv, states[0])
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*given, conv, states[1])
    assert all(map(torch.equal, got, expected)) and torch.equal(*states) and not torch.equal(states[0], state)
