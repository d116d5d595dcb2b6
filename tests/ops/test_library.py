"""What ops/_library.py gives every differentiable op."""

import pytest
import torch

from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import route
from nvfp4_kernels.ops.router_logits.op import router_logits
from nvfp4_kernels.ops.selective_scan.op import selective_scan


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
