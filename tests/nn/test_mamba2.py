"""The mixer as a module: what it compiles to, and what it refuses."""

import pytest
import torch

from nvfp4_kernels.nn.mamba2 import Mamba2, Mamba2State


def mixer():
    made = Mamba2(32, heads=4, head_dim=16, state=8, groups=2)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
    return made


def test_lengths_that_vary_compile_whole():
    made = mixer()
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        x = torch.randn(2, length, 32, requires_grad=True)
        got, wanted = compiled(x), made(x)
        assert torch.equal(got, wanted)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, wanted)))


@torch.no_grad()
def test_decoding_compiles_whole():
    made = mixer().eval()

    def step(x, conv, ssm):
        return made(x, state=Mamba2State(conv, ssm))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        states = [(torch.randn(batch, 96, 3), torch.randn(batch, 4, 16, 8))]
        states.append(tuple(t.clone() for t in states[0]))
        x = torch.randn(batch, 1, 32)
        assert torch.equal(compiled(x, *states[0]), step(x, *states[1]))
        assert all(map(torch.equal, *states))


def test_errors_name_the_argument():
    made = mixer()
    with pytest.raises(ValueError, match=r"x: got shape \[5, 32\]; allowed: \[batch, length, hidden\]"):
        made(torch.zeros(5, 32))
    with pytest.raises(ValueError, match="cu_seqlens: got boundaries beside a state; allowed: one of the two"):
        made(torch.zeros(1, 5, 32), torch.tensor([0, 5]), made.new_state(1, torch.float32))
