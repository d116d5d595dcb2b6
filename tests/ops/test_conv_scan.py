"""conv_scan and the norm behind it against the mixer's three ops in sequence; states; torch.compile; errors."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _device, _triton
from nvfp4_kernels.ops.conv_scan import triton
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.selective_scan import _triton_plan
from tests import machine

HEADS, HEAD_DIM, GROUPS, STATE = 4, 16, 2, 12
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE
STATES = HEADS, HEAD_DIM, STATE
BOUNDS = [0, 64, 65, 65, 67, 137, 137]


def inputs(dtype, batch=2, length=37, sequences=None):
    """Leaves, and what the mixer gets: z, xBC and dt are pieces of one projection, as in the model; states of sequences."""
    projected = torch.randn(batch, length, INNER + CHANNELS + HEADS).to(dtype)
    parameters = (torch.randn(CHANNELS, 4) / 2, torch.randn(CHANNELS), -torch.rand(HEADS) * 4, torch.randn(HEADS),
                  torch.randn(HEADS) - 2, torch.rand(INNER) + 0.5)  # fmt: skip
    states = (
        [] if sequences is None else [torch.randn(sequences, CHANNELS, 3).to(dtype), torch.randn(sequences, *STATES)]
    )
    return [t.requires_grad_() for t in (projected, *parameters, *states)]


def in_sequence(
    z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, conv_state=None, state=None, cu_seqlens=None
):
    mixed, conv_last = nk.causal_conv1d(xBC, conv_weight, conv_bias, "silu", conv_state, True, cu_seqlens)
    x, B, C = mixed.split((INNER, GROUPS * STATE, GROUPS * STATE), -1)
    x, B, C = x.unflatten(-1, (HEADS, HEAD_DIM)), B.unflatten(-1, (GROUPS, STATE)), C.unflatten(-1, (GROUPS, STATE))
    y, last = nk.selective_scan(
        x, dt, A, B, C, D, dt_bias=dt_bias, dt_limit=(0.001, 1.0), chunk_size=16, cu_seqlens=cu_seqlens,
        initial_state=state, return_state=True,
    )  # fmt: skip
    return nk.gated_rms_norm(y.flatten(-2), z, norm_weight, 1e-5, INNER // GROUPS), conv_last, last


def at_once(
    z, xBC, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, conv_state=None, state=None, cu_seqlens=None
):
    weights = conv_weight, conv_bias, A, D, dt_bias
    y, *last = conv_scan(xBC, dt, *weights, GROUPS, STATE, (0.001, 1.0), conv_state, state, cu_seqlens, 16)
    return nk.gated_rms_norm(y.flatten(-2), z, norm_weight, 1e-5, INNER // GROUPS), *last


def results(function, leaves, **options):
    """The three outputs, and the gradients of the leaves from all of them."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    outputs = function(*leaves[0].split((INNER, CHANNELS, HEADS), -1), *leaves[1:], **options)
    given = [t for t in leaves if t is not None]
    torch.manual_seed(1)
    return [
        *(t.detach() for t in outputs),
        *torch.autograd.grad(outputs, given, [torch.randn_like(t) for t in outputs]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [None, "packed", "packed, from states"])
@pytest.mark.parametrize("biased", [False, True])
def test_mixer_is_the_three_ops_in_sequence(backend, dtype, sequences, biased):
    leaves = inputs(dtype, sequences=4 if sequences == "packed, from states" else None)
    if not biased:
        leaves[2] = None
    options = dict(cu_seqlens=torch.tensor([0, 11, 11, 50, 74])) if sequences else {}
    expected = results(in_sequence, leaves, **options)
    for got, same in zip(results(at_once, leaves, **options), expected, strict=True):
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


@pytest.mark.parametrize(
    "function, dtype", [(in_sequence, torch.float32), (in_sequence, torch.bfloat16), (at_once, torch.float32)]
)
def test_the_ops_compile_whole(backend, function, dtype):
    leaves = inputs(dtype, sequences=2)
    expected = results(in_sequence, leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, same in zip(results(compiled, leaves), expected, strict=True):
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


@pytest.mark.skipif(_triton.triton is None or not (_triton.INTERPRETED or machine.ON), reason="no Triton interpreter")
@pytest.mark.parametrize(
    "bounds, stated, width, head_dim, dtype",
    [
        (None, False, 4, 5, torch.float32),
        (None, True, 2, 16, torch.float32),
        (BOUNDS, True, 4, 80, torch.float16),
        (BOUNDS, False, 3, 16, torch.float32),
    ],
)
def test_segments_convolved_on_the_way(monkeypatch, bounds, stated, width, head_dim, dtype):
    """Bit for bit the two ops; a segment, 64 tokens here, ends with its sequence, and one is shorter than the convolution."""
    monkeypatch.setattr(_triton_plan, "SEGMENT", 64)
    monkeypatch.setattr(_device, "multiprocessors", lambda device: 1000)
    passes = []
    monkeypatch.setattr(triton, "convolved", lambda *given, plain=triton.convolved: passes.append(1) or plain(*given))
    heads, groups, state, length = 2, 1 if head_dim == 80 else 2, 33, 137 if bounds else 128
    inner, shared, sequences = heads * head_dim, groups * state, len(bounds) - 1 if bounds else 1
    channels = inner + 2 * shared
    xBC, dt = torch.randn(1, length, channels + heads).to(dtype).split((channels, heads), -1)
    weight, bias = torch.randn(channels, width) / 2, torch.randn(channels) if stated else None
    A, D, dt_bias = -torch.rand(heads) * 4, torch.randn(heads), torch.randn(heads) - 2
    conv_state = torch.randn(sequences, channels, width - 1).to(dtype) if stated else None
    initial = torch.randn(sequences, heads, head_dim, state) if stated else None
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if bounds else None
    with nk.backend("triton"):
        given = xBC, dt, weight, bias, A, D, dt_bias, groups, state
        got = conv_scan(*given, conv_state=conv_state, initial_state=initial, cu_seqlens=cu_seqlens)
        mixed, conv_last = nk.causal_conv1d(xBC, weight, bias, "silu", conv_state, True, cu_seqlens)
        x, B, C = mixed.split((inner, shared, shared), -1)
        x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
        y, last = nk.selective_scan(
            x, dt, A, B, C, D, dt_bias=dt_bias, initial_state=initial, return_state=True, cu_seqlens=cu_seqlens
        )
    assert passes and all(map(torch.equal, got, (y, conv_last, last))) and y.isfinite().all()


@pytest.mark.skipif(_triton.triton is None or not (_triton.INTERPRETED or machine.ON), reason="no Triton interpreter")
def test_triton_backward():
    leaves = inputs(torch.float32, 1, 20, sequences=1)
    with nk.backend("triton"):
        assert all(map(torch.equal, results(at_once, leaves), results(in_sequence, leaves)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(xBC=torch.zeros(1, 3, 113)), "xBC: got 113 channels; allowed: a multiple of 4 and 2"),
        (dict(xBC=torch.zeros(3, 112)), r"xBC: got shape \[3, 112\]; allowed: \[batch, length, channels\]"),
        (dict(xBC=torch.zeros(1, 3, 112).int()), "xBC: got torch.int32; allowed: a floating-point tensor"),
        (dict(groups=3), "groups: got 3; allowed: a divisor of the 4 heads"),
        (dict(dt=torch.zeros(1, 3, 3)), r"dt: got shape \[1, 3, 3\]; allowed: \[1, 3, 4\]"),
        (dict(conv_weight=torch.zeros(112, 5)), "conv_weight: got width 5; allowed: 2, 3, 4"),
        (dict(D=torch.zeros(4, 5)), r"D: got shape \[4, 5\]; allowed: \[4, 16\]"),
        (dict(conv_state=torch.zeros(2, 112, 3)), r"conv_state: got shape \[2, 112, 3\]; allowed: \[1, 112, 3\]"),
        (dict(chunk_size=0), "chunk_size: got 0; allowed: at least 1"),
    ],
)
def test_errors(change, message):
    given = dict(
        xBC=torch.zeros(1, 3, 112), dt=torch.zeros(1, 3, 4), conv_weight=torch.zeros(112, 4), conv_bias=None,
        A=-torch.ones(4), D=None, dt_bias=None, groups=2, state=12,
    )  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        conv_scan(**given | change)


def test_opcheck():
    projected, *weights, _, conv_state, state = inputs(torch.float32, 1, 5, sequences=2)
    _, xBC, dt = projected.detach().requires_grad_().split((INNER, CHANNELS, HEADS), -1)
    rest = conv_state, state, torch.tensor([0, 2, 5]), GROUPS, STATE, 0.0, math.inf, 16
    torch.library.opcheck(torch.ops.nvfp4.conv_scan.default, (xBC, dt, *weights, *rest))
