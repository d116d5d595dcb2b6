"""matmul against an fp64 oracle that decodes the very operands, for every pair of operand kinds and both backends."""

import itertools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS

BACKENDS = ("reference", "native")
KINDS = ("1x16", "16x16", "1x32", "bf16", "fp16", "fp32")
PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def operand(kind, rows, cols):
    x = torch.randn(rows, cols) * torch.exp(2 * torch.randn(rows, 1))
    return x.to(PLAIN[kind]) if kind in PLAIN else nk.quantize(x, block=kind)


def values(x):
    """fp64 values, decoded with Python arithmetic on codes and scales rather than by the package's dequantize."""
    if isinstance(x, torch.Tensor):
        return x.double()
    scales = x.scales.view(torch.uint8)
    if isinstance(x, nk.MXFP8Tensor):
        blocks = x.codes.double().unflatten(-1, (-1, 32)) * torch.exp2(scales.double() - 127).unsqueeze(-1)
    else:
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
        codes = torch.stack([x.codes & 15, x.codes >> 4], -1).flatten(-2).long()
        blocks = table[codes].unflatten(-1, (-1, 16)) * x.scales.double().unsqueeze(-1) * x.global_scale.double()
    return blocks.flatten(-2)[:, : x.shape[-1]]


def error(y, truth):
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a, b", list(itertools.product(KINDS, KINDS)))
def test_every_pair_of_kinds(a, b, backend):
    left, right = operand(a, 33, 72), operand(b, 21, 72)
    truth = values(left) @ values(right).t()
    with nk.backend(backend):
        assert error(nk.matmul(left, right, torch.float32), truth) < 1e-6
        bf16 = nk.matmul(left, right, torch.bfloat16)
    assert bf16.dtype == torch.bfloat16 and error(bf16, truth) < 2**-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "m, n, k", [(1, 1, 1), (1, 17, 16), (17, 1, 40), (5, 300, 1856), (130, 67, 200), (64, 64, 4096)]
)
def test_shapes(m, n, k, backend):
    a, b = operand("1x16", m, k), operand("16x16", n, k)
    with nk.backend(backend):
        assert error(nk.matmul(a, b, torch.float32), values(a) @ values(b).t()) < 1e-6
        plain = torch.randn(m, k).bfloat16()
        assert error(nk.matmul(plain, b, torch.float32), values(plain) @ values(b).t()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_out_and_accumulate(backend):
    a, b, bias = operand("1x16", 9, 48), operand("1x16", 20, 48), torch.randn(20).bfloat16()
    truth = values(a) @ values(b).t() + bias.double()
    with nk.backend(backend):
        assert error(nk.matmul(a, b, torch.float32, bias=bias), truth) < 1e-6
        out = torch.full((9, 20), 7.0)
        assert nk.matmul(a, b, bias=bias, out=out) is out and error(out, truth) < 1e-6
        nk.matmul(a, b, bias=bias, out=out, accumulate=True)
        assert error(out, 2 * truth) < 1e-6
        half = torch.empty(9, 20, dtype=torch.float16)
        nk.matmul(a, b, out=half)
        assert error(half, truth - bias.double()) < 2**-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_axes_and_strides(backend):
    a, b = torch.randn(3, 5, 64), operand("1x16", 12, 64)
    with nk.backend(backend):
        y = nk.matmul(a, b, torch.float32)
        assert y.shape == (3, 5, 12) and error(y.flatten(0, 1), a.flatten(0, 1).double() @ values(b).t()) < 1e-6
        turned = torch.randn(64, 30)[:, ::2].t()
        assert error(nk.matmul(turned, b, torch.float32), turned.double() @ values(b).t()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_scales_stay_finite(backend):
    """The global scales multiply the finished sum: operands near 1e19 and 1e-19 give the plain product."""
    x, w = torch.randn(8, 64), torch.randn(8, 64)
    a, b = nk.quantize(x * 1e19), nk.quantize(w * 1e-19)
    with nk.backend(backend):
        assert error(nk.matmul(a, b, torch.float32), values(a) @ values(b).t()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_cancels(backend):
    """Both operands through the same Hadamard transform: the product is that of the originals, to quantization error."""
    x, w = torch.randn(40, 256).bfloat16(), torch.randn(24, 256).bfloat16()
    with nk.backend(backend):
        y = nk.matmul(nk.quantize(x, hadamard=DEFAULT_SIGNS), nk.quantize(w, hadamard=DEFAULT_SIGNS), torch.float32)
    assert error(y, x.double() @ w.double().t()) < 0.15


A, B = nk.quantize(torch.ones(4, 32)), nk.quantize(torch.ones(8, 32))


@pytest.mark.parametrize(
    "call, error_type, words",
    [
        (lambda: nk.matmul(A, nk.quantize(torch.ones(8, 48))), ValueError, "K = 32 and K = 48"),
        (lambda: nk.matmul(torch.ones(4, 0), torch.ones(8, 0)), ValueError, "a: got shape"),
        (lambda: nk.matmul(torch.ones(4), B), ValueError, "a: got 1 dimensions"),
        (lambda: nk.matmul(A, torch.ones(2, 8, 32)), ValueError, "b: got 3 dimensions"),
        (lambda: nk.matmul(A, "w"), TypeError, "b: got str"),
        (lambda: nk.matmul(A, B, torch.int8), TypeError, "out_dtype: got torch.int8"),
        (lambda: nk.matmul(nk.quantize(torch.ones(4, 32), hadamard=1), B), ValueError, "Hadamard signs 1 and None"),
        (lambda: nk.matmul(A, B, bias=torch.ones(7)), ValueError, "bias: got shape"),
        (lambda: nk.matmul(A, B, out=torch.ones(4, 7)), ValueError, "out: got shape"),
        (lambda: nk.matmul(A, B, out=torch.ones(8, 4).t()), ValueError, "out: got strides"),
        (lambda: nk.matmul(A, B, out=torch.ones(1, 1).expand(4, 8)), ValueError, "out: got strides"),
        (lambda: nk.matmul(A, B, torch.bfloat16, out=torch.ones(4, 8)), TypeError, "out: got torch.float32"),
        (lambda: nk.matmul(A, B, out=torch.ones(4, 8, requires_grad=True)), RuntimeError, "out: got a read-only"),
        (lambda: nk.matmul(A, B, accumulate=True), ValueError, "accumulate: got True without out"),
        (lambda: nk.matmul(A, B, out=torch.ones(4, 8).half(), accumulate=True), ValueError, "accumulate: got True"),
        (
            lambda: nk.matmul(torch.ones(4, 32, requires_grad=True), B),
            RuntimeError,
            "a: got a tensor that requires grad",
        ),
        (lambda: nk.matmul(A, B.to("meta")), ValueError, "b: got device meta"),
    ],
)
def test_bad_input_is_refused_by_name(call, error_type, words):
    with pytest.raises(error_type, match=words):
        call()


def test_overlapping_and_read_only_out_are_refused():
    a = torch.randn(32, 32)
    with pytest.raises(ValueError, match="out: got memory that an operand uses"):
        nk.matmul(a, nk.quantize(torch.randn(32, 32)), out=a)
    with torch.inference_mode():
        locked = torch.zeros(4, 8)
    with pytest.raises(RuntimeError, match="out: got a read-only"):
        nk.matmul(A, B, out=locked)


def test_autocast_does_not_reach_inside():
    with torch.autocast("cpu", torch.bfloat16), nk.backend("reference"):
        y = nk.matmul(A, B, torch.float32)
    assert torch.equal(y, nk.matmul(A, B, torch.float32))


def test_opcheck():
    a, b = nk.quantize(torch.randn(5, 48)), nk.quantize(torch.randn(7, 48), block="1x32")
    left = (a.codes, a.scales.view(torch.uint8), a.global_scale)
    right = (b.codes.view(torch.uint8), b.scales, None)
    torch.library.opcheck(torch.ops.nvfp4.matmul.default, (*left, *right, None, "bfloat16"))
    torch.library.opcheck(torch.ops.nvfp4.matmul_out.default, (*left, *right, torch.randn(7), torch.zeros(5, 7), True))
    torch.library.opcheck(torch.ops.nvfp4.dequantize.default, (*left, 47, "float32"))
    torch.library.opcheck(torch.ops.nvfp4.dequantize.default, (*right, 48, "bfloat16"))
    torch.library.opcheck(torch.ops.nvfp4.hadamard.default, (torch.randn(3, 20), 0xD7E8))
