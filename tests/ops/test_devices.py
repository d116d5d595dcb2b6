"""Each tensor of each op on another device than the rest is refused at the door: a kernel would follow a foreign pointer."""

import pytest
import torch

from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from nvfp4_kernels.ops.grouped_relu2.op import grouped_relu2, grouped_relu2_backward
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan
from nvfp4_kernels.ops.mixer_step.op import mixer_step
from nvfp4_kernels.ops.moe_step.op import moe_step
from nvfp4_kernels.ops.permute.op import permute, unpermute
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import Routing, route
from nvfp4_kernels.ops.router_logits.op import router_logits
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.state_update.op import state_update

ones = torch.ones
scanned = dict(
    x=ones(2, 3, 4, 8), dt=ones(2, 3, 4), A=-ones(4), B=ones(2, 3, 2, 16), C=ones(2, 3, 2, 16), D=ones(4),
    z=ones(2, 3, 4, 8), dt_bias=ones(4),
)  # fmt: skip
routing = route(torch.randn(4, 6), None, 2)
elsewhere = Routing(**{name: t.to("meta") for name, t in vars(routing).items()})
CALLS = {
    causal_conv1d: dict(
        x=ones(2, 5, 4), weight=ones(4, 4), bias=ones(4), initial_state=ones(2, 4, 3), cu_seqlens=torch.tensor([0, 4, 10])
    ),
    selective_scan: scanned | dict(initial_state=ones(2, 4, 8, 16), cu_seqlens=torch.tensor([0, 4, 6])),
    conv_scan: dict(
        xBC=ones(2, 3, 96), dt=ones(2, 3, 4), conv_weight=ones(96, 4), conv_bias=ones(96), A=-ones(4), D=ones(4),
        dt_bias=ones(4), conv_state=ones(2, 96, 3), initial_state=ones(2, 4, 8, 16), cu_seqlens=torch.tensor([0, 4, 6]),
    ),
    mixer_scan: dict(
        xBC=ones(2, 3, 96), z=ones(2, 3, 32), dt=ones(2, 3, 4), conv_weight=ones(96, 4), conv_bias=ones(96), A=-ones(4),
        D=ones(4), dt_bias=ones(4), norm_weight=ones(32), conv_state=ones(2, 96, 3), initial_state=ones(2, 4, 8, 16),
        cu_seqlens=torch.tensor([0, 4, 6]),
    ),
    state_update: dict(state=torch.zeros(5, 4, 8, 16, dtype=torch.bfloat16))
    | scanned
    | dict(
        indices=torch.tensor([0, 4]), intermediate=torch.zeros(2, 3, 4, 8, 16, dtype=torch.bfloat16),
        noise=torch.tensor([1, 2]),
    ),
    mixer_step: dict(
        projected=ones(2, 1, 132), windows=ones(5, 96, 3), states=ones(5, 4, 8, 16), conv_weight=ones(96, 4),
        conv_bias=ones(96), A=-ones(4), D=ones(4), dt_bias=ones(4), norm_weight=ones(32), indices=torch.tensor([0, 4]),
    ),
    gated_rms_norm: dict(x=ones(3, 8), z=ones(3, 8), weight=ones(8)),
    relu2: dict(x=ones(3, 8), weights=ones(3)),
    grouped_relu2: dict(a=ones(3, 8), b=ones(1, 5, 8), offsets=torch.tensor([0, 3]), weights=ones(3)),
    grouped_relu2_backward: dict(
        a=ones(3, 8), b=ones(1, 5, 8), offsets=torch.tensor([0, 3]), h=ones(3, 5), weights=ones(3)
    ),
    route: dict(logits=ones(4, 6), bias=ones(6)),
    router_logits: dict(x=ones(4, 8), weight=ones(6, 8)),
    permute: dict(x=ones(4, 8), routing=routing),
    unpermute: dict(y=ones(8, 8), routing=routing, weights=ones(4, 2)),
    moe_step: dict(x=ones(4, 8), router=ones(6, 8), bias=ones(6), up=ones(6, 16, 8), down=ones(6, 8, 16)),
    expert_mlp: dict(x=ones(4, 8), routing=routing, up=ones(6, 16, 8), down=ones(6, 8, 16)),
}  # fmt: skip
OPTIONS = {
    mixer_scan: dict(groups=2),
    mixer_step: dict(groups=2),
    conv_scan: dict(groups=2, state=16),
    route: dict(top_k=2),
    moe_step: dict(top_k=2),
}


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_tensors_of_another_device_are_refused(op):
    given = CALLS[op] | OPTIONS.get(op, {})
    op(**{name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in given.items()})
    first, *others = CALLS[op]
    for name in others:
        if name == "x":  # of state_update, whose devices are all measured by it
            continue
        foreign = elsewhere if name == "routing" else given[name].to("meta")
        with pytest.raises(ValueError, match=f"^{name}: got device meta; allowed: cpu"):
            op(**given | {name: foreign})
    with pytest.raises(ValueError, match="got device"):
        op(**given | {first: given[first].to("meta")})


def test_weights_of_unpermute_are_floats():
    with pytest.raises(TypeError, match="weights: got torch.int64; allowed: a floating-point tensor"):
        unpermute(ones(8, 8), routing, ones(4, 2, dtype=torch.int64))


def test_limits_of_steps_are_in_order():
    for op in (selective_scan, conv_scan, state_update, mixer_scan, mixer_step):
        with pytest.raises(ValueError, match="dt_limit: got .*; allowed: .low, high., low <= high"):
            op(**CALLS[op] | OPTIONS.get(op, {}), dt_limit=(2.0, 1.0))
