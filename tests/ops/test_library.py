"""What ops/_library.py gives every differentiable op."""

import pytest
import torch

from nvfp4_kernels.ops import _dispatch
from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import route
from nvfp4_kernels.ops.router_logits.op import router_logits
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.state_update.op import state_update
from nvfp4_kernels.testing.cases import cases


def scan(x):
    B = torch.ones(*x.shape[:2], 1, 16)
    return selective_scan(x.unflatten(-1, (2, 4)), torch.zeros(*x.shape[:2], 2), -torch.ones(2), B, B)


def convolved_scan(x):
    return conv_scan(x, x[..., :2], torch.ones(8, 4), None, -torch.ones(2), None, None, groups=1, state=2)[0]


OPS = {
    "relu2": relu2,
    "gated_rms_norm": lambda x: gated_rms_norm(x, None, torch.ones(8)),
    "causal_conv1d": lambda x: causal_conv1d(x, torch.ones(8, 4)),
    "selective_scan": scan,
    "conv_scan": convolved_scan,
    "router_logits": lambda x: router_logits(x[0], torch.ones(5, 8)),
    "route": lambda x: route(x[0], None, 2).weights,
}


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused(backend, op):
    """And not left out: torch goes on without them, with a warning at most, and the sum is short of a part."""
    x = torch.randn(2, 6, 8, requires_grad=True)
    (dx,) = torch.autograd.grad(OPS[op](x).square().sum(), x, create_graph=True)
    assert torch.isfinite(dx).all() and dx.any()
    with pytest.raises(RuntimeError, match=f"nk.{op}: got a second derivative"):
        torch.autograd.grad(dx.square().sum() + x.sum(), x)


def test_results_lie_where_the_operands_do_whatever_the_default_device():
    x, weight, dt = torch.randn(1, 6, 8, requires_grad=True), torch.randn(5, 8), torch.zeros(1, 6, 2)
    A, B = -torch.ones(2), torch.ones(1, 6, 1, 16)

    def results():
        scanned = selective_scan(x.unflatten(-1, (2, 4)), dt, A, B, B)
        logits = router_logits(x[0], weight)
        return scanned, logits, *torch.autograd.grad(scanned.sum() + logits.sum(), x)

    want = results()
    with torch.device("meta"):  # as torch.set_default_device
        got = results()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def experts(x):
    return expert_mlp(x, route(torch.ones(6, 4), None, 2), torch.ones(4, 8, 8), torch.ones(4, 8, 8))


@pytest.mark.parametrize("op", ["relu2", "gated_rms_norm", "router_logits", "route", "expert_mlp"])
def test_decoding_skips_the_dispatcher_where_nobody_watches(op, monkeypatch):
    call = (OPS | {"expert_mlp": lambda x: experts(x[0])})[op]
    x = torch.randn(2, 6, 8)
    watched = call(x)
    monkeypatch.setattr(torch.ops.nvfp4, op, None)
    with torch.no_grad():
        assert torch.equal(call(x), watched)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        call(x)


@pytest.mark.parametrize("op", _dispatch.TABLE)
def test_autocast_does_not_reach_inside(op):
    """Where torch's products would take the fp32 that the op has promised, a router's logits on GPUs among them."""
    case = cases(op)[0]
    given = case.make()
    with _dispatch.backend("reference"):
        wanted = case.run(**given)
        with torch.autocast("cpu", torch.bfloat16):
            made = case.run(**given)
    tensors = {name: value for name, value in wanted.items() if isinstance(value, torch.Tensor)}
    for name, value in tensors.items():
        assert made[name].dtype == value.dtype and torch.equal(made[name].nan_to_num(), value.nan_to_num()), name


@torch.no_grad()
def test_autocast_does_not_reach_inside_past_the_dispatcher():
    with _dispatch.backend("reference"), torch.autocast("cpu", torch.bfloat16):
        assert router_logits(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.float32


def scan_operands(lead, heads=4, head_dim=6, groups=2, state=5):
    """Those of the scan and of its update: x, dt, A, B, C, D, z and dt_bias."""
    shapes = dict(
        x=(*lead, heads, head_dim), dt=(*lead, heads), A=(heads,), B=(*lead, groups, state), C=(*lead, groups, state)
    )
    shapes |= dict(D=(heads,), z=(*lead, heads, head_dim), dt_bias=(heads,))
    return {name: torch.rand(shape) for name, shape in shapes.items()}


# each op, and its operands for any number of tokens
OPERANDS = {
    "selective_scan": (
        selective_scan, lambda n: scan_operands((2, n)) | dict(initial_state=torch.rand(2, 4, 6, 5))
    ),
    "state_update": (state_update, lambda n: scan_operands((n,)) | dict(state=torch.rand(n, 4, 6, 5))),
    "causal_conv1d": (
        causal_conv1d,
        lambda n: dict(
            x=torch.rand(2, n, 6), weight=torch.rand(6, 4), bias=torch.rand(6), initial_state=torch.rand(2, 6, 3)
        ),
    ),
    "conv_scan": (
        lambda **given: conv_scan(**given, groups=2, state=5),
        lambda n: dict(
            xBC=torch.rand(2, n, 44), dt=torch.rand(2, n, 4), conv_weight=torch.rand(44, 4), conv_bias=torch.rand(44),
            A=-torch.rand(4), D=torch.rand(4), dt_bias=torch.rand(4), conv_state=torch.rand(2, 44, 3),
            initial_state=torch.rand(2, 4, 6, 5),
        ),
    ),
    "mixer_scan": (
        lambda **given: mixer_scan(**given, groups=2),
        lambda n: dict(
            xBC=torch.rand(2, n, 44), z=torch.rand(2, n, 24), dt=torch.rand(2, n, 4), conv_weight=torch.rand(44, 4),
            conv_bias=torch.rand(44), A=-torch.rand(4), D=torch.rand(4), dt_bias=torch.rand(4), norm_weight=torch.rand(24),
            conv_state=torch.rand(2, 44, 3), initial_state=torch.rand(2, 4, 6, 5),
        ),
    ),
    "gated_rms_norm": (gated_rms_norm, lambda n: dict(x=torch.rand(n, 8), z=torch.rand(n, 8), weight=torch.rand(8))),
    "relu2": (relu2, lambda n: dict(x=torch.rand(n, 8), weights=torch.rand(n))),
    "router_logits": (router_logits, lambda n: dict(x=torch.rand(n, 8), weight=torch.rand(5, 8))),
    "route": (
        lambda logits, bias: route(logits, bias, 2).weights, lambda n: dict(logits=torch.rand(n, 5), bias=torch.rand(5))
    ),
}  # fmt: skip


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("op", OPERANDS)
def test_numbers_of_tokens_that_vary_compile_whole(op):
    """One graph for all of them, as torch makes at the second one that it meets: the checks name no size of theirs."""
    call, operands = OPERANDS[op]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 8):
            given = operands(tokens)
            copies = {name: t.clone() for name, t in given.items()}
            assert torch.equal(first(compiled(**given)), first(call(**copies)))


@pytest.mark.parametrize("op", OPERANDS)
def test_every_operand_is_a_floating_point_tensor(op):
    call, operands = OPERANDS[op]
    for name, t in operands(3).items():
        for wrong in (0.5, [1.0], t.numpy(), t.int(), t.to(torch.complex64), t.to_sparse()):
            with pytest.raises(TypeError, match=f"^{name}: got .*; allowed: "):
                call(**(operands(3) | {name: wrong}))
