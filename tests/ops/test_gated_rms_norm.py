"""gated_rms_norm against the formula in float64, group by group."""

import pytest
import torch

from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm


def oracle(x, z, weight, eps, group_size, norm_before_gate):
    gate = 1 if z is None else z * torch.sigmoid(z)
    u = x if norm_before_gate else x * gate
    parts = []
    for start in range(0, x.shape[-1], group_size):
        part = u[..., start : start + group_size]
        square = (part * part).sum(-1, keepdim=True) / group_size
        parts.append(part / torch.sqrt(square + eps))
    y = torch.cat(parts, -1) * weight
    return y * gate if norm_before_gate else y


@pytest.mark.parametrize("group_size", [None, 1, 4, 12])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_values_and_gradients(group_size, gated, norm_before_gate):
    x, z = torch.randn(2, 3, 12, dtype=torch.float64), torch.randn(2, 3, 12, dtype=torch.float64)
    weight = torch.randn(12, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in ((x, z, weight) if gated else (x, weight))]

    def run(x, *rest):
        z, weight = rest if gated else (None, *rest)
        return gated_rms_norm(x, z, weight, 1e-3, group_size, norm_before_gate)

    expected = oracle(x, z if gated else None, weight, 1e-3, group_size or 12, norm_before_gate)
    torch.testing.assert_close(run(*tensors), expected)
    dy = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(run(*tensors), tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(run, tensors)


def test_one_rounding_in_bf16():
    x, z, weight = torch.randn(50, 64).bfloat16(), torch.randn(50, 64).bfloat16(), torch.rand(64) + 0.5
    y = gated_rms_norm(x, z, weight, 1e-5, 16)
    exact = oracle(x.double(), z.double(), weight.double(), 1e-5, 16, False)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 1.01 * 2**-8 * exact.abs()).all()  # half a unit in the last of 8 bits


def test_strided_gate_and_zero_row():
    wide = torch.randn(4, 24, requires_grad=True)
    x = torch.zeros(4, 12, requires_grad=True)
    y = gated_rms_norm(x, wide[:, 12:], torch.ones(12))
    y.sum().backward()
    assert (y == 0).all() and x.grad.isfinite().all() and wide.grad.isfinite().all()


def test_result_is_contiguous_whatever_x_is(backend):
    """What the op's fake promises to a compiler."""
    x, z = torch.randn(3, 5, 8).transpose(0, 1), torch.randn(8, 5).t()
    assert gated_rms_norm(x, x, torch.ones(8)).is_contiguous()
    assert gated_rms_norm(z, None, torch.ones(8)).is_contiguous()
    torch.library.opcheck(torch.ops.nvfp4.gated_rms_norm, (z, None, torch.ones(8), 1e-5, 8, False))


def test_errors_name_the_argument():
    x = torch.zeros(2, 12)
    with pytest.raises(ValueError, match="group_size: got 5; allowed: a divisor of 12"):
        gated_rms_norm(x, x, torch.ones(12), group_size=5)
    with pytest.raises(ValueError, match="weight: got shape"):
        gated_rms_norm(x, x, torch.ones(11))
    with pytest.raises(TypeError, match="z: got torch.bfloat16; allowed: torch.float32"):
        gated_rms_norm(x, x.bfloat16(), torch.ones(12))
