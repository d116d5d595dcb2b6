"""quantize in CUDA, on the host model, bit for bit: golden bytes, and the reference on what these lack."""

import pytest
import torch

from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops._dispatch import implementation
from nvfp4_kernels.ops.quantize import _cuda
from tests.ops.quantize_checks import (
    EXTREMES,
    NOISE,
    SPECS,
    assert_golden,
    assert_reference,
    extreme,
    far_apart,
    saturating,
    to_hand_in,
    true_amaxes,
)
from tests.ops.test_quantize import NAMES, VARIANTS

NVFP4, MXFP8 = [spec for spec in SPECS if spec.format == "nvfp4"], QuantSpec("1x32")
PLAIN, SR, TILES = QuantSpec(), QuantSpec(rounding="stochastic"), QuantSpec("16x16")
TURNED, TURNED_SR = QuantSpec(hadamard=DEFAULT_SIGNS), QuantSpec(rounding="stochastic", hadamard=DEFAULT_SIGNS)
run = implementation("quantize", "native").run


def assert_same(x, row, col):
    assert_reference(run(x, row, col, NOISE), x, row, col)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_bytes(variant):
    for name in NAMES:
        if name.endswith("64x96"):
            assert_golden(run, name, variant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (17, 48)])
def test_every_form_and_pair(shape, dtype):
    x = (torch.randn(shape) * torch.exp(2 * torch.randn(shape))).to(dtype)
    for i, spec in enumerate(NVFP4):
        assert_same(x, spec, NVFP4[-1 - i])


@pytest.mark.parametrize(
    "row, col, dtype",
    [
        (PLAIN, None, torch.bfloat16),
        (PLAIN, TURNED, torch.bfloat16),
        (None, TURNED, torch.bfloat16),
        (SR, TURNED_SR, torch.bfloat16),
        (TILES, TILES, torch.bfloat16),
        (TILES, TILES, torch.float32),
    ],
)
def test_recipe(model, row, col, dtype):
    """The kernels that know their forms: tiles beyond the edges, and a block that goes through several."""
    for shape in ((450, 100), (33, 1856), (128, 64)):
        assert_same((torch.randn(shape) * torch.exp(torch.randn(shape))).to(dtype), row, col)
    assert model.kernels.count(_cuda.kernel(dtype, row, col)) == 3
    assert "any" not in _cuda.kernel(dtype, row, col)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_mxfp8(model, dtype):
    """One read of x, given an amax or not; blocks of 32 that end anywhere in a tile, and beyond it."""
    for shape, row, col in (
        ((1, 16), MXFP8, MXFP8),
        ((17, 144), MXFP8, MXFP8),
        ((129, 80), None, MXFP8),
        ((33, 200), MXFP8, None),
    ):
        x = (torch.randn(shape) * torch.exp(4 * torch.randn(shape))).to(dtype)
        assert_same(x, row, col)
        assert_reference(run(x, row, col, NOISE, None, torch.ones(1)), x, row, col)
    assert set(model.kernels) == {_cuda.kernel(dtype, MXFP8, MXFP8)}


@pytest.mark.parametrize("row, col", [(PLAIN, TURNED_SR), (TURNED, TILES), (MXFP8, MXFP8)])
def test_strides(row, col):
    wide = torch.randn(40, 64).bfloat16()
    odd = torch.randn(40, 61).bfloat16()[:, 1:]  # rows that begin anywhere
    for x in (wide.t(), wide[::2, ::3], wide[3:20, 8:50], wide.t()[1:40:2], wide[:1].expand(33, 64), wide[:, 7:8], odd):
        assert_same(x, row, col)


def test_rows_far_apart():
    x = torch.randn(40, 48).bfloat16()
    with far_apart(x) as far:
        for row, col in ((PLAIN, None), (SR, TURNED_SR), (MXFP8, MXFP8)):
            assert_reference(run(far, row, col, NOISE), x, row, col)
            assert_reference(run(far.t(), col, row, NOISE), x.t(), col, row)


@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes(kind):
    x = extreme(kind)
    choosing = QuantSpec(four_over_six="mse"), QuantSpec(four_over_six="mae")
    for row, col in ((SR, TURNED), (TURNED, TILES), choosing, (MXFP8, MXFP8)):
        assert_same(x, row, col)
    assert_same(x.bfloat16(), PLAIN, TURNED)


@pytest.mark.parametrize("row, col", [(SR, None), (PLAIN, TILES), (PLAIN, TURNED), (TURNED, TURNED_SR)])
def test_given_amax(model, row, col):
    x = torch.randn(100, 40).bfloat16().t()
    for amax in true_amaxes(x, row, col):
        assert_reference(run(x, row, col, NOISE, None, amax), x, row, col)
    for amax in to_hand_in(x):
        assert_reference(run(x, row, col, NOISE, None, amax), x, row, col, amax)
    passes = sum(kernel.startswith("amax") for kernel in model.kernels)
    assert passes == (6 if TURNED in (row, col) else 0)


def test_rotation_beyond_bf16_saturates():
    assert_same(saturating(), TURNED, TURNED_SR)


def test_empty():
    assert_same(torch.randn(0, 32), PLAIN, TURNED)


def test_amax_in_pieces():
    """More than a piece of 16 KiB, the last of them cut short, and a largest value in each place of a chunk."""
    for at in (0, 8191, 8192, 20000, 24679):
        x = torch.randn(5, 4936)
        x.view(-1)[at] = -50.0
        assert_same(x.bfloat16(), PLAIN, None)


def test_threads_one_after_the_other(model):
    model.seed = None
    assert_same(torch.randn(130, 80).bfloat16(), SR, TURNED_SR)


def test_what_is_not_written():
    assert "in the same format" in _cuda.refuses(torch.zeros(1, 32), MXFP8, PLAIN)
    assert _cuda.refuses(torch.zeros(1, 32), PLAIN, TURNED) is None


def test_blocks_fill_one_wave():
    assert [_cuda.tiles_down(rows, 4096, 132) for rows in (1, 64, 8192, 1 << 20)] == [1, 1, 8, 993]
