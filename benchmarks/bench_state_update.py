"""state_update, one token; GB/s of states read and written. Yardstick: the step of a Mamba-2 layer in plain torch.

The layer has 64 heads of 64, states of 128 and 8 groups: 2 MB of fp32 states a sequence. Each run goes through enough layers'
states to leave the caches between two uses, as a model does.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from nvfp4_kernels.ops._dispatch import implementation

HEADS, HEAD_DIM, GROUPS, STATE = 64, 64, 8, 128
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16 stochastic": torch.bfloat16}


def plain(state, x, dt, A, B, C, D, dt_bias):
    """As in transformers' torch path: steps and A expanded to the state's axes, B and C to the heads."""
    dt = F.softplus(dt[..., None].expand(x.shape) + dt_bias[:, None].to(dt.dtype))[..., None]
    decay = torch.exp(dt.float() * A[:, None, None].expand(state.shape[1:]))
    B, C = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (B, C))
    made = state * decay + (dt * B[:, :, None]) * x[..., None]
    state.copy_(made)
    y = torch.bmm(made.to(C.dtype).view(-1, HEAD_DIM, STATE), C.view(-1, STATE, 1)).view(x.shape)
    return (y + x * D[:, None]).to(x.dtype)


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("kept", STATES)
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_state_update(benchmark, copy_bandwidth, batch, kept, name):
    if name == "torch" and kept == "bf16 stochastic":
        pytest.skip("torch has no stochastic rounding")
    torch.manual_seed(0)
    layers = max(2, 32 // batch)
    states = [torch.randn(batch, HEADS, HEAD_DIM, STATE).to(STATES[kept]) for _ in range(layers)]
    x, dt = torch.randn(batch, HEADS, HEAD_DIM).bfloat16(), (torch.randn(batch, HEADS) - 4).bfloat16()
    B, C = torch.randn(2, batch, GROUPS, STATE).bfloat16()
    A, D, dt_bias = -torch.rand(HEADS) * 15 - 1, torch.randn(HEADS), torch.randn(HEADS)
    run_native = implementation("state_update", "native").run
    noise = torch.tensor([1, 2]) if kept == "bf16 stochastic" else None
    tokens = [t[:, None] for t in (x, dt, B, C)]

    def update(state):
        if name == "torch":
            return plain(state, x, dt, A, B, C, D, dt_bias)
        given = (*tokens[:2], A, *tokens[2:], D, None, dt_bias, None, None, noise)
        return run_native(state, *given, True, 0.0, math.inf)[:, 0]

    exact = plain(states[0].double(), *(t.double() for t in (x, dt, A, B, C, D, dt_bias)))
    assert (update(states[0].clone()).double() - exact).norm() < 2e-2 * exact.norm()
    benchmark.extra_info.update(
        op="state_update",
        case=f"batch {batch}, {HEADS} heads of {HEAD_DIM}, state {STATE}",
        series=f"{HEADS} heads of {HEAD_DIM}, state {STATE}",
        size=batch,
        axis="sequences",
        backend=name,
        dtype=kept,
        bytes=2 * sum(state.nbytes for state in states),
        limit_bytes=copy_bandwidth,
        yardstick=name == "torch",
    )
    benchmark.pedantic(
        lambda: [update(state) for state in states], rounds=5 if name == "torch" else 15, warmup_rounds=1
    )
