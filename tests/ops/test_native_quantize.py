"""The native quantizer on every instruction set: golden bytes, and bit for bit the reference on what golden data lacks."""

import itertools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops.dequantize import native as dequantize_native
from nvfp4_kernels.ops.dequantize import reference as dequantize_reference
from nvfp4_kernels.ops.hadamard import native as hadamard_native
from nvfp4_kernels.ops.hadamard import reference as hadamard_reference
from nvfp4_kernels.ops.quantize import native as quantize_native
from nvfp4_kernels.ops.quantize import reference as quantize_reference
from tests.ops.quantize_checks import (
    NOISE,
    SPECS,
    assert_golden,
    assert_reference,
    far_apart,
    same_bytes,
    to_hand_in,
    true_amaxes,
)
from tests.ops.test_quantize import NAMES, VARIANTS

SHAPES = ((1, 64), (17, 33), (33, 16), (20, 1856))


def assert_same(x, row, col):
    assert_reference(quantize_native.run(x, row, col, NOISE), x, row, col)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_bytes(isa, variant):
    for name in NAMES:
        assert_golden(quantize_native.run, name, variant)


def test_rows_far_apart(isa):
    x = torch.randn(40, 48).bfloat16()
    with far_apart(x) as far:
        assert_reference(quantize_native.run(far, SPECS[4], SPECS[3], NOISE), x, SPECS[4], SPECS[3])
        assert_reference(quantize_native.run(far.t(), SPECS[2], SPECS[1], NOISE), x.t(), SPECS[2], SPECS[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_form_and_pair(isa, shape, dtype):
    x = (torch.randn(shape) * torch.exp(2 * torch.randn(shape))).to(dtype)
    for i, spec in enumerate(SPECS):
        assert_same(x, spec, None)
        assert_same(x, None, spec)
        assert_same(x, spec, SPECS[-1 - i])


@pytest.mark.parametrize("row, col", list(itertools.product((SPECS[0], SPECS[6]), (SPECS[2], SPECS[6], SPECS[8]))))
def test_strides(isa, row, col):
    wide = torch.randn(80, 120).bfloat16()
    for x in (wide.t(), wide[::2, ::3], wide[3:20, 5:90], wide.t()[1:40:2], wide[:1].expand(33, 120), wide[:, 7:8]):
        assert_same(x, row, col)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "kind", ["zeros", "half zeros", "tiny", "subnormal", "huge", "nan", "inf", "-inf", "one outlier"]
)
def test_hard_values(isa, kind, dtype):
    x = torch.randn(35, 70)
    match kind:
        case "zeros":
            x = x * 0  # both signs
        case "half zeros":
            x[:, :35] = 0
        case "tiny":
            x = x * 1e-38
        case "subnormal":
            x = x * 1e-41
        case "huge":
            x = (x * 1e38).clamp(-3e38, 3e38)
        case "nan" | "inf" | "-inf":
            x[34, 69] = float(kind)
        case "one outlier":
            x[20, 3] = 3e4
    x = x.to(dtype)
    for spec in SPECS:
        assert_same(x, spec, spec)


def test_given_amax(isa):
    for x in (torch.randn(35, 70).bfloat16(), torch.randn(64, 20).t()):
        for i, row in enumerate(SPECS):
            for col in (None, SPECS[-1 - i]):
                wanted = quantize_native.run(x, row, col, NOISE)
                for amax in true_amaxes(x, row, col):
                    assert all(map(same_bytes, quantize_native.run(x, row, col, NOISE, None, amax), wanted))
                for amax in to_hand_in(x):
                    assert_reference(quantize_native.run(x, row, col, NOISE, None, amax), x, row, col, amax)


def test_empty(isa):
    for shape in ((0, 5), (0, 32)):
        for spec in SPECS:
            assert_same(torch.randn(shape), spec, spec if shape[1] else None)


def test_threads_change_nothing(isa):
    x = torch.randn(300, 400).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(quantize_native.run(x, SPECS[9], SPECS[6], NOISE))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bytes(a, b) for a, b in zip(results[0], other, strict=True))


def test_flushed_denormals_change_nothing(isa):
    """The process's flush-to-zero mode (torch.set_flush_denormal) is none of the format's business."""
    x = torch.randn(32, 32) * 1e-39
    expected = quantize_reference.run(x, QuantSpec(), None, None)
    torch.set_flush_denormal(True)
    try:
        mine = quantize_native.run(x, QuantSpec(), None, None)
    finally:
        torch.set_flush_denormal(False)
    assert all(same_bytes(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (19, 64), (40, 100)])
def test_hadamard(isa, shape, dtype):
    x = torch.randn(shape).to(dtype)
    huge = (torch.randn(shape).sign() * 3e38).to(dtype)  # sums of 16, over 4: every third is beyond bf16
    for y in (x, x.t(), torch.randn(shape[0] * 2, shape[1] * 3).to(dtype)[::2, ::3], huge):
        for signs in (DEFAULT_SIGNS, 0, 0xFFFF):
            mine, theirs = hadamard_native.run(y, signs), hadamard_reference.run(y, signs)
            assert same_bytes(*(torch.where(got.isnan(), 1.0, got) for got in (mine, theirs)))


@pytest.mark.parametrize("spec", ["1x16", "16x16", "1x32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize(isa, spec, dtype):
    for shape in ((1, 1), (0, 16), (7, 50), (20, 64)):
        x = torch.randn(shape) * torch.exp(4 * torch.randn(shape))
        q = nk.quantize(x, block=spec)
        parts = (q.codes, q.scales, getattr(q, "global_scale", None), shape[1], dtype)
        assert same_bytes(dequantize_native.run(*parts), dequantize_reference.run(*parts))
    every_byte = torch.arange(256, dtype=torch.uint8)
    if spec == "1x32":
        parts = (
            every_byte.view(torch.float8_e4m3fn).expand(256, 256).contiguous(),
            every_byte.view(256, 1).expand(256, 8).contiguous(),
            None,
            256,
            dtype,
        )
    else:
        parts = (
            every_byte.expand(256, 256).contiguous(),
            every_byte.view(256, 1).expand(256, 32).contiguous().view(torch.float8_e4m3fn),
            torch.tensor(0.7),
            512,
            dtype,
        )
    mine, theirs = dequantize_native.run(*parts), dequantize_reference.run(*parts)
    assert torch.equal(*(torch.where(got.isnan(), 3.0, got) for got in (mine, theirs)))
