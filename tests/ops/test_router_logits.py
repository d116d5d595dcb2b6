"""router_logits against float64, and what a token's logits may depend on."""

import pytest
import torch

from nvfp4_kernels.ops.router_logits.op import router_logits

ops = torch.ops.nvfp4


def close(got, a, b, unit):
    """got = a @ b up to fp32 sums and one rounding of the result to `unit`."""
    a, b = a.detach().double(), b.detach().double()
    exact, magnitude = a @ b, a.abs() @ b.abs()
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= unit * exact.abs() + 2e-6 * magnitude + 1e-40).all()


@pytest.mark.parametrize("tokens, hidden, experts", [(1, 48, 8), (17, 131, 6), (37, 200, 129), (300, 70, 3), (4, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_gradients(backend, isa, tokens, hidden, experts, dtype):
    x = torch.randn(tokens, 2 * hidden).to(dtype)[:, :hidden].requires_grad_()  # rows apart
    weight, dlogits = torch.randn(experts, hidden, requires_grad=True), torch.randn(tokens, experts)
    logits = router_logits(x, weight)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    assert logits.dtype == torch.float32 and dx.dtype == dtype and dweight.dtype == torch.float32
    close(logits, x, weight.t(), 0)
    close(dx, dlogits, weight, 1.01 * torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    close(dweight, dlogits.t(), x, 0)


def test_float64():
    x, weight = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    assert torch.autograd.gradcheck(router_logits, (x, weight))


@pytest.mark.parametrize("tokens, hidden, experts", [(0, 5, 3), (3, 0, 4), (2, 5, 0)])
def test_nothing_to_sum(backend, tokens, hidden, experts):
    x, weight = torch.randn(tokens, hidden, requires_grad=True), torch.randn(experts, hidden, requires_grad=True)
    logits = router_logits(x, weight)
    assert logits.shape == (tokens, experts) and not logits.any()
    dx, dweight = torch.autograd.grad(logits.sum(), (x, weight))
    assert dx.shape == x.shape and dweight.shape == weight.shape and not dx.any() | dweight.any()


def test_nan_stays_with_its_token(backend):
    x, weight = torch.randn(6, 33), torch.randn(5, 33)
    x[2, 32] = float("nan")
    assert router_logits(x, weight).isnan().all(1).tolist() == [False, False, True, False, False, False]


def test_bits_depend_on_neither_company_nor_threads(isa):
    x, weight, dlogits = torch.randn(530, 333).bfloat16(), torch.randn(21, 333), torch.randn(530, 21)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        logits, (dx, dweight) = ops.router_logits(x, weight), ops.router_logits_backward(dlogits, x, weight)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.router_logits(x, weight), logits)
            for rows in (slice(0, 1), slice(3, 8), slice(101, 530)):
                assert torch.equal(router_logits(x[rows], weight), logits[rows])
                assert torch.equal(ops.router_logits_backward(dlogits[rows], x[rows], weight)[0], dx[rows])
            assert torch.equal(ops.router_logits_backward(dlogits, x, weight)[1], dweight)
    finally:
        torch.set_num_threads(before)


def test_backward_keeps_the_input_alone():
    x, weight = torch.randn(64, 32).bfloat16().requires_grad_(), torch.randn(8, 32, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        router_logits(x, weight)
    assert sorted(kept) == sorted((x.data_ptr(), weight.data_ptr()))


def test_opcheck_and_compile():
    x, weight = torch.randn(6, 40).bfloat16().requires_grad_(), torch.randn(5, 40, requires_grad=True)
    torch.library.opcheck(ops.router_logits, (x, weight))
    compiled = torch.compile(router_logits, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), router_logits(x, weight))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 3, 4)), ValueError, r"x: got shape \[2, 3, 4\]; allowed: \[tokens, hidden\]"),
        (
            dict(x=torch.zeros(2, 4, dtype=torch.int64)),
            TypeError,
            "x: got torch.int64; allowed: a floating-point tensor",
        ),
        (dict(weight=torch.zeros(3, 5)), ValueError, r"weight: got shape \[3, 5\]; allowed: \[experts, 4\]"),
        (dict(weight=None), TypeError, "weight: got NoneType; allowed"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        router_logits(**(dict(x=torch.zeros(2, 4), weight=torch.zeros(3, 4)) | change))
