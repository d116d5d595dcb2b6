"""matmul in Triton against an fp64 oracle that decodes the very operands; nk.linear through Triton against the reference.

On a machine with a GPU the kernels run there, elsewhere in Triton's interpreter, which multiplies in fp32.
"""

import itertools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.matmul import _triton_block_scaled as block_scaled
from nvfp4_kernels.ops.matmul import _triton_decoded as decoded
from nvfp4_kernels.ops.matmul import triton
from nvfp4_kernels.ops.matmul._triton_tiles import PROGRAMS, side
from tests.autograd.test_linear import RECIPES, tensors
from tests.ops.test_matmul import KINDS, error, operand, values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 1e-6 if DEVICE == "cpu" else 1e-5  # tensor cores truncate the addends that they align

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of the infinities that the interpreter meets
]


def multiply(a, b, dtype=torch.float32, bias=None, out=None, accumulate=False):
    """The product in Triton, on DEVICE; the result on the CPU (`out` itself where the tests are on it)."""
    bias, target = (None if x is None else x.to(DEVICE) for x in (bias, out))
    return triton.run(a.to(DEVICE), b.to(DEVICE), bias, dtype, target, accumulate).cpu()


@pytest.mark.parametrize("a, b", list(itertools.product(KINDS, KINDS)))
def test_every_pair_of_kinds(a, b):
    for m, n, k in ((1, 1, 1), (3, 70, 97), (33, 17, 128)):
        left, right = operand(a, m, k), operand(b, n, k)
        assert error(multiply(left, right), values(left) @ values(right).t()) < LIMIT


@pytest.mark.parametrize("m, n, k", [(1, 33, 1856), (17, 5, 1300), (65, 16, 640), (16, 16, 16)])
@pytest.mark.parametrize("a", ["1x16", "bf16", "1x32"])
def test_shapes(a, m, n, k):
    left, right = operand(a, m, k), operand("16x16", n, k)
    assert error(multiply(left, right), values(left) @ values(right).t()) < LIMIT


@pytest.mark.parametrize(
    "a, b", [("1x16", "1x16"), ("bf16", "1x32"), ("fp16", "1x16"), ("fp16", "1x32"), ("fp32", "1x16")]
)
def test_large_products_decode_once(a, b):
    left, right = operand(a, 260, 48), operand(b, 257, 48)
    assert error(multiply(left, right), values(left) @ values(right).t()) < LIMIT


def test_splits_of_k_change_no_bits_between_runs():
    a, b, bias = operand("1x16", 9, 2100), operand("1x16", 20, 2100), torch.randn(20).half()
    assert decoded.tile(9, 20, 2100, "bfloat16", "wgmma").splits > 1
    truth = values(a) @ values(b).t() + bias.double()
    results = [multiply(a, b, bias=bias) for _ in range(2)]
    assert torch.equal(*results) and error(results[0], truth) < LIMIT
    out = torch.ones(9, 20)
    assert error(multiply(a, b, bias=bias, out=out, accumulate=True), truth + 1) < LIMIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_are_rounded_once(dtype):
    a, b = operand("1x16", 5, 80), operand("16x16", 37, 80)
    for bias in (None, torch.randn(37), torch.randn(37).bfloat16(), torch.randn(74).half()[::2]):
        assert torch.equal(multiply(a, b, dtype, bias), multiply(a, b, bias=bias).to(dtype))


def test_out_and_accumulate():
    a, b, bias = operand("1x16", 9, 48), operand("1x16", 20, 48), torch.randn(20)
    truth = values(a) @ values(b).t() + bias.double()
    assert error(multiply(a, b, bias=bias, out=torch.full((9, 20), 7.0)), truth) < LIMIT
    before = torch.randn(9, 20)
    added = multiply(a, b, bias=bias, out=before.clone(), accumulate=True)
    assert torch.equal(added, before + multiply(a, b, bias=bias))
    assert error(multiply(a, b, torch.float16, out=torch.empty(9, 20).half()), truth - bias.double()) < 2**-10


def test_plain_strides():
    b, wide = operand("1x16", 18, 64), torch.randn(128, 200)
    for a in (wide.t()[:40, :64], wide[::3, 1:193:3], wide[:1, :64].expand(20, 64)):
        for dtype in (torch.bfloat16, torch.float32):
            a = a.to(dtype) if a.stride(0) else a[:1].to(dtype).expand(a.shape)
            assert error(multiply(a, b), values(a) @ values(b).t()) < LIMIT
            assert error(multiply(b, a), values(b) @ values(a).t()) < LIMIT


def test_huge_scales_stay_finite():
    a, b = nk.quantize(torch.randn(8, 64) * 1e19), nk.quantize(torch.randn(8, 64) * 1e-19)
    assert error(multiply(a, b), values(a) @ values(b).t()) < LIMIT
    huge = nk.quantize(torch.randn(8, 64).clamp(-3, 3) * 1e38)
    assert error(multiply(huge, b), values(huge) @ values(b).t()) < LIMIT


def test_nothing_to_multiply():
    b = operand("1x16", 5, 32)
    assert multiply(torch.ones(0, 32), b).shape == (0, 5)
    assert multiply(torch.ones(4, 32), operand("1x16", 0, 32)).shape == (4, 0)


@pytest.mark.parametrize("g", [float("nan"), float("inf")])
def test_bad_global_scale_gives_nan(g):
    b = operand("1x16", 5, 32)
    bad = nk.NVFP4Tensor(b.codes, b.scales, torch.tensor(g), b.shape)
    assert multiply(torch.ones(2, 32), bad).isnan().all() and multiply(bad, b).isnan().all()


def test_special_values_of_plain_operands_pass_through():
    b, a = nk.quantize(torch.rand(5, 32) + 1), torch.ones(4, 32).bfloat16()
    a[0, 3], a[1, 4] = float("inf"), float("nan")
    y = multiply(a, b)
    assert torch.isinf(y[0]).all() and y[1].isnan().all() and torch.isfinite(y[2:]).all()


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_all_scale_bytes(kind):
    """Every E4M3 scale, negative ones and subnormals too; NaN scales give NaN."""
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1)
    codes = torch.randint(0, 256, (256, 8), dtype=torch.uint8)
    b = nk.NVFP4Tensor(codes, scales.view(torch.float8_e4m3fn), torch.tensor(1.0), (256, 16))
    a = operand(kind, 16, 16)
    y, truth = multiply(a, b).double(), values(a) @ values(b).t()
    bad = truth.isnan()
    assert bad.any() and y[bad].isnan().all()
    assert ((y - truth).abs() <= 1e-5 * truth.abs().amax(0).clamp(min=1e-3))[~bad].all()


@pytest.mark.skipif(not _triton.INTERPRETED, reason="a device takes the product that it has")
@pytest.mark.parametrize("cores", ["tcgen05", "mma.sync"])
@pytest.mark.parametrize("m, n, k", [(1, 20, 16), (17, 33, 80), (20, 40, 2304), (130, 5, 320)])
def test_block_scaled_indices(m, n, k, cores):
    """The kernel for FP4 tensor cores, its one instruction replaced by decoding: addresses, masks, splits and scales."""
    a, b, bias = operand("1x16", m, k), operand("16x16", n, k), torch.randn(n)
    out = torch.empty(m, n)
    block_scaled.multiply(side(a), side(b), bias, out, False, cores)
    assert error(out, values(a) @ values(b).t() + bias.double()) < LIMIT


def test_tiles_fill_the_device_and_fit_it():
    """Shared memory as Triton allocates it at least: both operands, as they are loaded, for each stage but one."""
    for M, N, K in itertools.product((1, 16, 33, 192, 300, 8192), (16, 4096), (64, 4096, 14336)):
        for compute, bytes_a_value in (("bfloat16", 2), ("float16", 2), ("tf32", 4), ("float32", 4)):
            for instruction, limit in (("mma.sync", 99 << 10), ("wgmma", 227 << 10), ("tcgen05", 227 << 10)):
                t = decoded.tile(M, N, K, compute, instruction)
                assert (t.m + t.n) * t.k * bytes_a_value * (t.stages - 1) <= limit
                assert t.splits == 1 or -(-M // t.m) * -(-N // t.n) * t.splits <= PROGRAMS
        for cores in ("tcgen05", "mma.sync"):
            t = block_scaled.tile(M, N, K, cores)
            assert (t.m + t.n) * t.k * 9 // 16 * t.stages <= 99 << 10 or cores == "tcgen05"


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "four over six", "weight only"])
def test_linear_equals_the_reference(name):
    """Forward and backward of a whole recipe: the saved codes to the bit, the products to fp32's rounding."""
    recipe, (x, w, b, dy) = RECIPES[name], tensors(dtype=torch.bfloat16)
    results, saved = {}, {}
    for backend in ("triton", "reference"):
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in (x, w, b)]
        kept = saved.setdefault(backend, [])
        with (
            nk.backend(backend),
            torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t),
        ):
            y = nk.linear(*leaves, recipe, noise=torch.tensor([3, 10], device=DEVICE))
            y.backward(dy.to(DEVICE))
        results[backend] = y.detach(), *(t.grad for t in leaves)
    for mine, theirs in zip(saved["triton"], saved["reference"], strict=True):
        assert torch.equal(*(part.contiguous().flatten().view(torch.uint8) for part in (mine, theirs)))
    for mine, theirs, rounding in zip(
        results["triton"], results["reference"], (2**-8, 2**-8, LIMIT, LIMIT), strict=True
    ):
        assert mine.dtype == theirs.dtype and error(mine.float(), theirs.double()) < rounding
