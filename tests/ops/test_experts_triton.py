"""route, permute, relu2 and grouped_matmul in Triton against fp64 and the reference."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.permute.op import permute, unpermute
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route import triton as route_triton
from nvfp4_kernels.ops.route.op import route
from tests.ops.test_grouped_matmul import LOADS, error, offsets, stack
from tests.oracles.experts_brute import decode, grouped, grouped_sums, moe

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of the NaNs that the interpreter meets
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 1e-6 if DEVICE == "cpu" else 1e-5  # tensor cores truncate the addends that they align
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("triton"):
        yield


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).to(DEVICE)


def by_reference(call, *arguments):
    with nk.backend("reference"):
        return call(*arguments)


@pytest.mark.parametrize(
    "tokens, experts, top_k, n_group, topk_group",
    [(9, 8, 2, 1, 1), (3, 128, 6, 1, 1), (2, 512, 32, 1, 1), (7, 64, 5, 8, 3), (5, 6, 2, 6, 4), (2, 17, 17, 1, 1),
     (40, 20, 3, 4, 2), (0, 8, 2, 1, 1)],
)  # fmt: skip
@pytest.mark.parametrize("normalize", [True, False])
def test_route(tokens, experts, top_k, n_group, topk_group, normalize):
    logits, bias = 3 * drawn(tokens, experts), drawn(experts)
    options = (bias, top_k, 2.5, n_group, topk_group, normalize)
    dweights, results = drawn(tokens, top_k), []
    for name in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        with nk.backend(name):
            routing = route(leaf, *options)
            results.append((routing, torch.autograd.grad(routing.weights, leaf, dweights)[0]))
    (got, gradient), (wanted, expected) = results
    for name in ("indices", "offsets", "inverse", "order"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    torch.testing.assert_close(got.weights, wanted.weights, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_order_over_several_programs():
    tokens = 3 * route_triton.SLOTS + 5
    routing = route(drawn(tokens, 5), None, 2)
    slots = [(int(e), t * 2 + c) for t, row in enumerate(routing.indices) for c, e in enumerate(row)]
    assert routing.order.tolist() == [slot for _, slot in sorted(slots)]
    assert torch.equal(routing.order[routing.inverse.flatten()], torch.arange(2 * tokens, device=DEVICE))
    assert routing.offsets.tolist() == [sum(e < k for e, _ in slots) for k in range(6)]


def test_ties_go_by_index_and_nan_comes_first():
    logits = torch.zeros(3, 40)
    logits[1, [5, 30]], logits[2, [7, 9]] = 1.0, torch.tensor([-math.nan, math.nan])  # of either sign
    routing = route(logits.to(DEVICE), None, 4)
    assert routing.indices.tolist() == [[0, 1, 2, 3], [5, 30, 0, 1], [7, 9, 0, 1]]
    assert routing.weights[:2].isfinite().all() and routing.weights[2].isnan().all()
    assert route(logits.to(DEVICE), None, 3, 1.0, 4, 1).indices.tolist() == [[0, 1, 2], [5, 0, 1], [7, 9, 0]]
    negative = torch.tensor([-5.0, -3.0, -4.0, 0.0, -0.0, 2.0], device=DEVICE)
    assert route(torch.zeros(1, 6, device=DEVICE), negative, 6).indices.tolist() == [[5, 3, 4, 1, 2, 0]]


@pytest.mark.parametrize("tokens, features", [(9, 4), (1, 33), (0, 8), (6, 1100)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_permute(tokens, features, dtype):
    routing = by_reference(route, drawn(tokens, 5), None, 3)
    x = drawn(tokens, 2 * features, dtype=dtype)[:, :features].requires_grad_()
    y, weights = drawn(3 * tokens, features, dtype=dtype).requires_grad_(), drawn(tokens, 3).requires_grad_()
    dy, dout = drawn(3 * tokens, features, dtype=dtype), drawn(tokens, features, dtype=dtype)

    def everything():
        rows, out, plain = permute(x, routing), unpermute(y, routing, weights), unpermute(y, routing)
        gradients = torch.autograd.grad(rows, x, dy), torch.autograd.grad(out, (y, weights), dout)
        return rows, out, plain, *gradients[0], *gradients[1], *torch.autograd.grad(plain, y, dout)

    unit = 2 * torch.finfo(dtype).eps  # Triton's interpreter truncates to bf16
    for got, wanted in zip(everything(), by_reference(everything), strict=True):
        assert got.dtype == wanted.dtype and (got.double() - wanted.double()).norm() <= unit * wanted.double().norm()


@pytest.mark.parametrize("shape", [(1, 1), (17, 48), (3, 2100), (0, 7), (2, 3, 33), (19,)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_relu2(shape, dtype):
    x, dy = drawn(*shape, dtype=dtype).requires_grad_(), drawn(*shape, dtype=dtype)
    unit = 2 * torch.finfo(dtype).eps
    for weights in (None, drawn(shape[0]).abs().requires_grad_()) if len(shape) == 2 else (None,):
        leaves = (x,) if weights is None else (x, weights)

        def everything(weights=weights, leaves=leaves):
            y = relu2(x, weights)
            return y, *torch.autograd.grad(y, leaves, dy)

        for got, wanted in zip(everything(), by_reference(everything), strict=True):
            assert (
                got.dtype == wanted.dtype and (got.double() - wanted.double()).norm() <= unit * wanted.double().norm()
            )
    bad = torch.tensor([[float("nan"), -1.0]], device=DEVICE, requires_grad=True)
    y = relu2(bad)
    assert y.isnan().tolist() == torch.autograd.grad(y.sum(), bad)[0].isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_grouped_matmul(load, dtype):
    sizes = LOADS[load]
    o = offsets(sizes).to(DEVICE)
    a, plain, quantized = (
        drawn(sum(sizes), 80, dtype=dtype),
        drawn(len(sizes), 33, 80, dtype=dtype),
        stack(len(sizes), 33, 80),
    )
    on_device = Stack(*(part.to(DEVICE) for part in quantized[:3]))
    wide = a.cpu().double()
    assert error(grouped_matmul(a, plain, o, torch.float32).cpu(), grouped(wide, plain.cpu().double(), sizes)) < LIMIT
    assert (
        error(grouped_matmul(a, on_device, o, torch.float32).cpu(), grouped(wide, decode(*quantized[:3]), sizes))
        < LIMIT
    )
    dy = drawn(sum(sizes), 33, dtype=dtype)
    dx = grouped_matmul(dy, plain.transpose(1, 2), o, torch.float32).cpu()
    assert error(dx, grouped(dy.cpu().double(), plain.cpu().double().transpose(1, 2), sizes)) < LIMIT
    dw = grouped_matmul(dy.t(), a.t(), o, torch.float32).cpu()
    assert error(dw, grouped_sums(dy.cpu().t().double(), wide.t(), sizes)) < LIMIT
    assert not any(dw[e].any() for e, size in enumerate(sizes) if size == 0)
    rounded = grouped_matmul(a, plain, o)
    assert torch.equal(rounded, grouped_matmul(a, plain, o, torch.float32).to(dtype))


def test_plain_grouped_matmul_of_whole_tiles():
    """Both operands come by asynchronous copies, forward and, gathered and not, in both gradients."""
    sizes, dtype = [70, 0, 90], torch.bfloat16
    o, rows = offsets(sizes).to(DEVICE), torch.arange(160, device=DEVICE).flip(0)
    a, b, dy = drawn(160, 128, dtype=dtype), drawn(3, 64, 128, dtype=dtype), drawn(160, 64, dtype=dtype)
    wide, wide_b, wide_dy = (x.cpu().double() for x in (a, b, dy))
    assert error(grouped_matmul(a, b, o, torch.float32).cpu(), grouped(wide, wide_b, sizes)) < LIMIT
    dx = grouped_matmul(dy, b.transpose(1, 2), o, torch.float32).cpu()
    assert error(dx, grouped(wide_dy, wide_b.transpose(1, 2), sizes)) < LIMIT
    dw = grouped_sums(wide_dy.t(), wide.t(), sizes)
    assert error(grouped_matmul(dy.t(), a.t(), o, torch.float32).cpu(), dw) < LIMIT
    assert error(grouped_matmul(dy.t(), a.flip(0).t(), o, torch.float32, rows=rows).cpu(), dw) < LIMIT


@pytest.mark.parametrize("n, k", [(300, 48), (48, 1856), (130, 64)])
def test_grouped_matmul_of_odd_sizes(n, k):
    sizes = [20, 0, 3]
    o, a, quantized = offsets(sizes).to(DEVICE), drawn(23, k, dtype=torch.bfloat16), stack(3, n, k)
    y = grouped_matmul(a, Stack(*(part.to(DEVICE) for part in quantized[:3])), o, torch.float32)
    assert error(y.cpu(), grouped(a.cpu().double(), decode(*quantized[:3]), sizes)) < LIMIT


def test_a_bad_global_scale_is_its_groups_own():
    b = stack(2, 5, 32)
    b = Stack(b.values.to(DEVICE), b.scales.to(DEVICE), torch.tensor([1.0, float("inf")], device=DEVICE))
    y = grouped_matmul(torch.ones(7, 32, device=DEVICE), b, offsets([3, 4]).to(DEVICE))
    assert y[:3].isfinite().all() and y[3:].isnan().all()


@pytest.mark.parametrize("tokens, top_k", [(1, 2), (17, 3), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_expert_mlp(tokens, top_k, dtype):
    routing = by_reference(route, drawn(tokens, 4), None, top_k)
    x, up, down = drawn(tokens, 32, dtype=dtype), stack(4, 48, 32), drawn(4, 32, 48, dtype=dtype)
    on_device = Stack(*(part.to(DEVICE) for part in up[:3]))
    y = expert_mlp(x, routing, on_device, down).cpu()
    weights = routing.weights.cpu().double()
    wanted = moe(x.cpu().double(), routing.indices.cpu(), weights, decode(*up[:3]), down.cpu().double())
    assert y.dtype == dtype and error(y, wanted) <= max(3 * torch.finfo(dtype).eps, 10 * LIMIT)
