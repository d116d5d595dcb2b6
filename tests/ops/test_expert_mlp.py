"""expert_mlp against a loop over tokens and choices in fp64."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.packed import pack
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.route.op import Routing, route
from tests.ops.test_grouped_matmul import drawn, error, stack
from tests.oracles.experts_brute import decode, moe

CASES = {  # tokens, experts, top_k
    "decode": (1, 8, 3),
    "17 tokens": (17, 8, 3),
    "top_k is all": (9, 4, 4),
    "no tokens": (0, 8, 2),
    "many": (150, 6, 2),
    "one expert": (20, 1, 1),
}


def routed(tokens, experts, top_k, bias=None):
    return route(torch.randn(tokens, experts), bias, top_k, 2.5)


def truth(x, routing, up, down):
    return moe(x.double(), routing.indices, routing.weights.double(), up, down)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_plain(backend, case, dtype):
    tokens, experts, top_k = CASES[case]
    x, routing = drawn(tokens, 48, dtype=dtype), routed(tokens, experts, top_k)
    up, down = drawn(experts, 80, 48, dtype=dtype) / 8, drawn(experts, 48, 80, dtype=dtype) / 8
    y = expert_mlp(x, routing, up, down)
    assert y.dtype == dtype and y.shape == x.shape
    # two roundings to dtype: hidden values and result
    assert error(y, truth(x, routing, up.double(), down.double())) <= max(2 * torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size, width", [(48, 80), (1856, 48), (48, 1856)])
def test_nvfp4(backend, case, size, width):
    tokens, experts, top_k = CASES[case]
    routing, up, down = routed(tokens, experts, top_k), stack(experts, width, size), stack(experts, size, width)
    for dtype in (torch.bfloat16, torch.float32):
        x = drawn(tokens, size, dtype=dtype) / 64
        y = expert_mlp(x, routing, up, down)
        bound = max(2 * torch.finfo(dtype).eps, 2e-6)
        assert error(y, truth(x, routing, decode(*up[:3]), decode(*down[:3]))) <= bound


@pytest.mark.parametrize("bias", [[0, 9, 0, 9, 0, 0], [9, 0, 0, 0, 0, 9]])
def test_all_tokens_to_the_same_experts(backend, bias):
    routing = routed(40, 6, 2, torch.tensor(bias, dtype=torch.float32))
    assert sorted(routing.sizes()) == [0, 0, 0, 0, 40, 40]
    x, up, down = drawn(40, 32), drawn(6, 16, 32), drawn(6, 32, 16)
    assert error(expert_mlp(x, routing, up, down), truth(x, routing, up.double(), down.double())) < 1e-6


def test_every_instruction_set(isa):
    for tokens in (1, 5, 64):
        routing, up, down = routed(tokens, 8, 3), stack(8, 48, 64), stack(8, 64, 48)
        for dtype in (torch.bfloat16, torch.float32):
            x = drawn(2 * tokens, 128, dtype=dtype)[::2, :64] / 8  # rows apart
            with nk.backend("native"):
                y = expert_mlp(x, routing, up, down)
            assert error(y, truth(x, routing, decode(*up[:3]), decode(*down[:3]))) <= max(
                2 * torch.finfo(dtype).eps, 1e-6
            )


def test_run_to_run_and_threads(backend):
    routing, x = routed(70, 6, 3), drawn(70, 64, dtype=torch.bfloat16)
    up, down, before = stack(6, 48, 64), stack(6, 64, 48), torch.get_num_threads()
    first = expert_mlp(x, routing, up, down)
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            assert backend == "reference" or torch.equal(expert_mlp(x, routing, up, down), first)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(expert_mlp(x, routing, up, down), first)


def test_registered_op_is_sound():
    routing, x, up, down = routed(5, 4, 2), drawn(5, 16), drawn(4, 8, 16), drawn(4, 16, 8)
    slots = routing.weights, routing.offsets, routing.inverse, routing.order
    packed = [(*pack(*s[:2]), s.global_scales) for s in (stack(4, 32, 16), stack(4, 16, 32))]
    for stacks in ((up, None, None, down, None, None), packed[0] + packed[1]):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.nvfp4.expert_mlp, (x, *slots, *stacks), test_utils=checks)


def test_errors_name_the_argument():
    routing, x, up, down = routed(5, 4, 2), drawn(5, 16), drawn(4, 8, 16), drawn(4, 16, 8)
    with pytest.raises(ValueError, match=r"x: got shape \[4, 16\]; allowed: \[5, size\]"):
        expert_mlp(x[:4], routing, up, down)
    with pytest.raises(ValueError, match=r"down: got shape \[4, 8, 16\]; allowed: \[4, 16, 8\]"):
        expert_mlp(x, routing, up, up)
    with pytest.raises(ValueError, match=r"up: got shape \[3, 8, 16\]; allowed: \[4, 8, 16\]"):
        expert_mlp(x, routing, up[:3], down)
    with pytest.raises(RuntimeError, match="up: got a tensor that requires grad"):
        expert_mlp(x, routing, up.requires_grad_(), down)
    with pytest.raises(RuntimeError, match="routing: got a tensor that requires grad"):
        expert_mlp(x, route(torch.randn(5, 4, requires_grad=True), None, 2), up.detach(), down)
    wrong = Routing(routing.indices, routing.weights, routing.offsets, routing.inverse + 5, routing.order)
    with pytest.raises(ValueError, match="routing: got rows out of range"), nk.backend("native"):
        expert_mlp(x, wrong, up.detach(), down)
