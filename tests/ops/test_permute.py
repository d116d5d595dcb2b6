"""permute and unpermute against loops over tokens and choices."""

import pytest
import torch

from nvfp4_kernels.ops.permute.op import permute, unpermute
from nvfp4_kernels.ops.route.op import route


@pytest.fixture
def routing():
    return route(torch.randn(9, 5, dtype=torch.float64), None, 3)


def test_rows_follow_their_slots(routing):
    x = torch.randn(9, 4, dtype=torch.float64)
    rows = permute(x, routing)
    for token in range(9):
        for choice in range(3):
            assert torch.equal(rows[routing.inverse[token, choice]], x[token])


@pytest.mark.parametrize("weighted", [True, False])
def test_sums_come_back(routing, weighted):
    y = torch.randn(27, 4, dtype=torch.float64)
    weights = routing.weights if weighted else None
    out = unpermute(y, routing, weights)
    for token in range(9):
        total = torch.zeros(4, dtype=torch.float64)
        for choice in range(3):
            total += y[routing.inverse[token, choice]] * (weights[token, choice] if weighted else 1)
        torch.testing.assert_close(out[token], total)


def test_gradcheck(routing):
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(27, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, routing), x)
    assert torch.autograd.gradcheck(lambda y, w: unpermute(y, routing, w), (y, weights))
    assert torch.autograd.gradcheck(lambda y: unpermute(y, routing), y)


def test_there_and_back_is_top_k_times_the_token(routing):
    x = torch.randn(9, 4).bfloat16()
    torch.testing.assert_close(unpermute(permute(x, routing), routing), 3 * x, rtol=2**-7, atol=0)


def test_errors_name_the_argument(routing):
    with pytest.raises(ValueError, match=r"x: got shape \[8, 4\]; allowed: \[9, features\]"):
        permute(torch.zeros(8, 4), routing)
    with pytest.raises(ValueError, match="y: got shape"):
        unpermute(torch.zeros(26, 4), routing)
    with pytest.raises(ValueError, match="weights: got shape"):
        unpermute(torch.zeros(27, 4), routing, torch.zeros(9, 2))
