"""The Hadamard transform against an explicit matrix in fp64."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS

BACKENDS = ("reference", "native")


def matrix(signs):
    """diag(signs) H16 / 4, H16[i, j] = (-1) ** popcount(i & j)."""
    h = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(16)] for i in range(16)], dtype=torch.float64)
    s = torch.tensor([-1.0 if signs >> i & 1 else 1.0 for i in range(16)], dtype=torch.float64)
    return s[:, None] * h / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("signs", [0, DEFAULT_SIGNS, 0x8001])
def test_equals_the_matrix(signs, dtype, backend):
    x = torch.randn(7, 80).to(dtype)
    truth = (x.double().unflatten(-1, (-1, 16)) @ matrix(signs)).flatten(-2)
    with nk.backend(backend):
        y = nk.hadamard(x, signs)
    assert y.dtype == torch.bfloat16
    # one rounding to bf16 of sums whose fp32 error is far below it
    assert ((y.double() - truth).abs() <= truth.abs() * 2**-8 + 1e-6).all()
    if dtype == torch.bfloat16:
        rounded = truth.float().bfloat16()
        assert (y == rounded).float().mean() > 0.999


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_is_the_identity(backend):
    x = torch.randn(5, 64)
    with nk.backend(backend):
        assert torch.allclose(nk.hadamard(nk.hadamard(x, 0).float(), 0).float(), x, atol=0.03)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_extremes_and_strides(backend):
    with nk.backend(backend):
        assert nk.hadamard(torch.randn(2, 3, 17)).shape == (2, 3, 32)
        for x in (torch.full((2, 16), 3.3e38), torch.full((2, 16), 1e-40), torch.full((2, 16), -3e38)):
            for signs in (0, 0xFFFF, DEFAULT_SIGNS):
                assert torch.isfinite(nk.hadamard(x, signs)).all()
        x = torch.randn(9, 80)
        assert torch.equal(nk.hadamard(x[:, :32]), nk.hadamard(x)[:, :32])
        assert torch.equal(nk.hadamard(x[::2]), nk.hadamard(x)[::2])
        x = torch.randn(64, 9).bfloat16()
        assert torch.equal(nk.hadamard(x.t()), nk.hadamard(x.t().contiguous()))
    assert torch.equal(nk.hadamard(x.t(), [1] * 16), nk.hadamard(x.t(), 0))
