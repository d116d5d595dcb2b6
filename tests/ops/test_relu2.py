"""relu2, with and without row weights."""

import pytest
import torch

from nvfp4_kernels.ops import _dispatch
from nvfp4_kernels.ops.relu2.op import relu2


@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients(weighted):
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True) if weighted else None
    y = relu2(x, weights)
    for r in range(5):
        for c in range(7):
            value = max(x[r, c].item(), 0.0) ** 2 * (weights[r].item() if weighted else 1.0)
            assert y[r, c].item() == pytest.approx(value, rel=1e-12)
    tensors = (x, weights) if weighted else (x,)
    assert torch.autograd.gradcheck(relu2, tensors)


def test_the_weighted_product_is_rounded_once(backend):
    x, weights = torch.randn(64, 32).bfloat16(), torch.rand(64)
    exact = x.double().clamp(min=0) ** 2 * weights.double()[:, None]
    assert ((relu2(x, weights).double() - exact).abs() <= 1.01 * 2**-8 * exact).all()


def test_input_is_left_alone_and_nan_stays(backend):
    x = torch.tensor([[-1.0, 2.0, float("nan")]])
    before = x.clone()
    y = relu2(x)
    assert torch.equal(x[:, :2], before[:, :2]) and y[0, :2].tolist() == [0.0, 4.0] and y[0, 2].isnan()
    x, weights = x.requires_grad_(), torch.ones(1, requires_grad=True)
    dx, dweights = torch.autograd.grad(relu2(x, weights), (x, weights), torch.ones(1, 3))
    assert dx[0, :2].tolist() == [0.0, 4.0] and dx[0, 2].isnan() and dweights.isnan()


@pytest.mark.parametrize("shape", [(1, 1), (17, 1856), (5, 48), (0, 7), (3, 0), (4, 3, 33), (19,), ()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_values_and_gradients(backend, isa, shape, dtype):
    x, dy = torch.randn(2, *shape).to(dtype)
    x.requires_grad_()
    r, d = x.detach().double().clamp(min=0), dy.double()
    unit, least = 1.01 * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for weights in (None, torch.rand(shape[0], requires_grad=True)) if len(shape) == 2 else (None,):
        w = 1 if weights is None else weights.detach().double()[:, None]
        y = relu2(x, weights)
        assert ((y.double() - r * r * w).abs() <= unit * r * r * w + least).all()
        dx, *rest = torch.autograd.grad(y, (x,) if weights is None else (x, weights), dy)
        wanted = 2 * r * w * d
        assert ((dx.double() - wanted).abs() <= 2 * unit * wanted.abs() + least).all()
        for dweights in rest:
            assert ((dweights.double() - (r * r * d).sum(1)).abs() <= 1e-6 * (r * r * d).abs().sum(1)).all()


def test_strides(backend):
    x = torch.randn(9, 20)
    torch.testing.assert_close(relu2(x.t()), x.t().clamp(min=0) ** 2)
    torch.testing.assert_close(relu2(x[::2, 1::3]), x[::2, 1::3].clamp(min=0) ** 2)


def test_registered_op_is_sound():
    torch.library.opcheck(
        torch.ops.nvfp4.relu2, (torch.randn(3, 4, requires_grad=True), torch.rand(3, requires_grad=True))
    )
    torch.library.opcheck(torch.ops.nvfp4.relu2, (torch.randn(3, 4, requires_grad=True), None))


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="x: got torch.int64"):
        relu2(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weights: got shape \[3\]; allowed: \[2\]"):
        relu2(torch.zeros(2, 4), torch.zeros(3))


def test_triton_refuses_what_no_grid_holds():
    implementation = _dispatch.implementation("relu2", "triton")
    x = torch.empty(1, device="meta").expand(65535 * 1024 + 1)
    assert "67107840 values" in implementation.refuses(x, None)
    assert implementation.refuses(torch.ones(()), None) == "a tensor without axes"
