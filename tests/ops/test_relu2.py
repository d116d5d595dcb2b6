"""relu2, with and without row weights."""

import pytest
import torch

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


def test_the_weighted_product_is_rounded_once():
    x, weights = torch.randn(64, 32).bfloat16(), torch.rand(64)
    exact = x.double().clamp(min=0) ** 2 * weights.double()[:, None]
    assert ((relu2(x, weights).double() - exact).abs() <= 1.01 * 2**-8 * exact).all()


def test_input_is_left_alone_and_nan_stays():
    x = torch.tensor([[-1.0, 2.0, float("nan")]])
    before = x.clone()
    y = relu2(x)
    assert torch.equal(x[:, :2], before[:, :2]) and y[0, :2].tolist() == [0.0, 4.0] and y[0, 2].isnan()


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="x: got torch.int64"):
        relu2(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weights: got shape \[3\]; allowed: \[2\]"):
        relu2(torch.zeros(2, 4), torch.zeros(3))
