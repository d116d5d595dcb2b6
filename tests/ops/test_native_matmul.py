"""The native matmul on every instruction set against an fp64 oracle that decodes the very operands."""

import itertools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.matmul import native
from tests.ops.test_matmul import KINDS, error, operand, values


def multiply(a, b, dtype=torch.float32, bias=None, out=None, accumulate=False):
    return native.run(a, b, bias, dtype, out, accumulate)


@pytest.mark.parametrize("a, b", list(itertools.product(KINDS, KINDS)))
def test_every_pair_of_kinds(isa, a, b):
    for m, n, k in ((1, 1, 1), (3, 70, 97), (33, 40, 300)):
        left, right = operand(a, m, k), operand(b, n, k)
        assert error(multiply(left, right), values(left) @ values(right).t()) < 1e-6


@pytest.mark.parametrize("m, n, k", [(1, 33, 160), (2, 5, 1856), (8, 64, 128), (9, 17, 31), (25, 100, 512),
                                     (33, 16, 16), (65, 48, 3000), (200, 600, 64), (7, 1, 4500), (40, 70, 4500)])  # fmt: skip
def test_shapes(isa, m, n, k):
    for a in ("1x16", "bf16", "fp32"):
        left, right = operand(a, m, k), operand("1x16", n, k)
        assert error(multiply(left, right), values(left) @ values(right).t()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_rounded_once(isa, dtype):
    """bf16 and fp16 results are the fp32 results, bias added, rounded to nearest even; all bias dtypes."""
    for m in (5, 40):
        a, b = operand("1x16", m, 80), operand("16x16", 37, 80)
        for bias in (None, torch.randn(37), torch.randn(37).bfloat16(), torch.randn(37).half()):
            wide = multiply(a, b, bias=bias)
            assert torch.equal(multiply(a, b, dtype, bias), wide.to(dtype))


def test_accumulate_adds_after_the_product(isa):
    for m in (3, 50):
        a, b, bias = operand("1x16", m, 48), operand("1x16", 20, 48), torch.randn(20)
        before = torch.randn(m, 20)
        out = before.clone()
        assert multiply(a, b, bias=bias, out=out, accumulate=True) is out
        assert torch.equal(out, before + multiply(a, b, bias=bias))


def test_plain_strides(isa):
    b = operand("1x16", 18, 64)
    wide = torch.randn(128, 200)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for a in (wide.t()[:40, :64], wide[::3, 1:193:3], wide[:1, :64].expand(50, 64), wide[5:6, :64]):
            a = a.to(dtype) if a.stride(0) else a[:1].to(dtype).expand(a.shape)
            assert error(multiply(a, b), values(a) @ values(b).t()) < 1e-6
            assert error(multiply(b, a), values(b) @ values(a).t()) < 1e-6


def test_threads_and_position_change_nothing(isa):
    """Each sum runs over k in one order: no result depends on the number of threads or on the rows around it."""
    a, b = operand("1x16", 150, 700), operand("1x16", 170, 700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(multiply(a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
    last = nk.NVFP4Tensor(a.codes[100:], a.scales[100:], a.global_scale, (50, 700))
    assert torch.equal(multiply(last, b), results[0][100:])


def test_nothing_to_multiply(isa):
    b = operand("1x16", 5, 32)
    assert multiply(torch.ones(0, 32), b).shape == (0, 5)
    assert multiply(torch.ones(4, 32), operand("1x16", 0, 32)).shape == (4, 0)
    assert torch.equal(
        multiply(torch.ones(4, 0), torch.ones(3, 0), bias=torch.arange(3.0)), torch.arange(3.0).expand(4, 3)
    )


@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("g", [float("nan"), float("inf")])
def test_bad_global_scale_gives_nan(isa, g, m):
    b = operand("1x16", 5, 32)
    bad = nk.NVFP4Tensor(b.codes, b.scales, torch.tensor(g), b.shape)
    assert multiply(torch.ones(m, 32), bad).isnan().all()


@pytest.mark.parametrize("m", [2, 40])
def test_special_values_of_plain_operands_pass_through(isa, m):
    b = nk.quantize(torch.rand(5, 32) + 1)
    a = torch.ones(m, 32)
    a[0, 3], a[1, 4] = float("inf"), float("nan")
    y = multiply(a, b)
    assert torch.isinf(y[0]).all() and y[1].isnan().all() and torch.isfinite(y[2:]).all()


@pytest.mark.parametrize("m", [1, 40])
def test_all_scale_bytes(isa, m):
    """Every E4M3 scale, negative ones and subnormals too; NaN scales give NaN."""
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    codes = torch.randint(0, 256, (256, 8), dtype=torch.uint8)
    b = nk.NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0), (256, 16))
    a = torch.randn(m, 16).bfloat16()
    y, truth = multiply(a, b).double(), values(a) @ values(b).t()
    bad = truth.isnan()
    assert bad.any() and y[bad].isnan().all()
    assert ((y - truth).abs() <= 1e-5 * truth.abs().amax(0).clamp(min=1e-3))[~bad].all()
