"""quantize, hadamard and dequantize in Triton, bit for bit: golden bytes, brute force, and the reference on what these lack.

On a machine with a GPU the kernels run there, elsewhere in Triton's interpreter.
"""

from functools import partial

import numpy as np
import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats import e2m1
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops._dispatch import implementation
from nvfp4_kernels.ops._triton_numerics import load_runs
from nvfp4_kernels.ops.quantize import _triton_amax
from tests.ops.quantize_checks import (
    EXTREMES,
    NOISE,
    SPECS,
    SR,
    assert_golden,
    assert_reference,
    extreme,
    far_apart,
    same_bytes,
    saturating,
    to_hand_in,
    true_amaxes,
)
from tests.ops.test_quantize import NAMES, VARIANTS
from tests.oracles import nvfp4_brute as brute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = [name for name in NAMES if name.endswith("64x96")]

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, of the divisions by zero that the interpreter does
]


@_triton.jit
def runs_kernel(x_ptr, out_ptr, length):
    block = _triton.tl.arange(0, 2)
    v = load_runs(x_ptr, _triton.tl.arange(0, 1), block, 1, length, 32, 1, True)
    for j in _triton.tl.static_range(16):
        _triton.tl.store(out_ptr + block[None, :] * 16 + j, v[j])


def run(op, x, *arguments):
    """The op in Triton, on DEVICE; the result on the CPU."""
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    if isinstance(x, torch.Tensor) and DEVICE == "cuda":  # x.to would give strides of its own
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x) if x.numel() else x.cuda()
    result = implementation(op, "triton").run(x, *moved)
    return result.cpu() if isinstance(result, torch.Tensor) else tuple(part.cpu() for part in result)


def assert_same(x, row, col):
    assert_reference(run("quantize", x, row, col, NOISE), x, row, col)


@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_bytes(variant):
    for name in SMALL if "4over6" not in variant else SMALL[:2]:
        assert_golden(partial(run, "quantize"), name, variant)


@pytest.mark.parametrize("rounding", ["nearest", SR])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e38, 1e-38, 1e-42])
def test_equals_brute_force(rounding, scale):
    x = (torch.randn(5, 48) * scale).clamp(-3e38, 3e38)
    x[0, :16] = 0
    x[1, 3] = -0.0
    noise = torch.tensor([0x1234_5678_9ABC_DEF0, 7 << 33 | 5])
    packed, scales, global_scale = run("quantize", x, QuantSpec("1x16", rounding), None, noise)[:3]
    seed = None if rounding == "nearest" else tuple(noise.tolist())
    expected_codes, expected_scales, expected_global = brute.quantize_1x16(x.numpy(), seed)
    np.testing.assert_array_equal(e2m1.unpack(packed).numpy(), expected_codes)
    np.testing.assert_array_equal(scales.view(torch.uint8).numpy(), expected_scales)
    assert global_scale.item() == expected_global


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (17, 48)])
def test_every_form_and_pair(shape, dtype):
    x = (torch.randn(shape) * torch.exp(2 * torch.randn(shape))).to(dtype)
    for i, spec in enumerate(SPECS):
        assert_same(x, spec, SPECS[-1 - i])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_one_form_alone(spec):
    x = torch.randn(33, 80).bfloat16()
    assert_same(x, spec, None)
    assert_same(x, None, spec)


def test_several_tiles_and_programs():
    """1856 columns: no multiple of a tile; 150 rows: three tiles of 64 down, which two programs share."""
    assert_same(torch.randn(5, 1856).bfloat16(), SPECS[4], None)
    assert_same(torch.randn(5, 200).bfloat16(), SPECS[0], SPECS[6])
    assert_same(torch.randn(150, 40).bfloat16(), SPECS[1], SPECS[1])
    assert_same(torch.randn(150, 40).bfloat16(), SPECS[6], SPECS[3])


@pytest.mark.parametrize("row, col", [(SPECS[0], SPECS[6]), (SPECS[6], SPECS[2])])
def test_strides(row, col):
    wide = torch.randn(40, 60).bfloat16()
    odd = torch.randn(40, 61).bfloat16()[:, 1:]  # words of two values would not be aligned
    for x in (wide.t(), wide[::2, ::3], wide[3:20, 5:50], wide.t()[1:40:2], wide[:1].expand(33, 60), wide[:, 7:8], odd):
        assert_same(x, row, col)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs memory that is reserved and not there")
def test_rows_far_apart():
    x = torch.randn(40, 48).bfloat16()
    with far_apart(x) as far:
        assert_reference(run("quantize", far, SPECS[0], SPECS[6], NOISE), x, SPECS[0], SPECS[6])
        assert_reference(run("quantize", far.t(), SPECS[2], SPECS[1], NOISE), x.t(), SPECS[2], SPECS[1])


def test_rows_of_two_to_the_30_values():
    """Two words of 16 bits a value are 2^31 of them."""
    x = torch.randn(32, device=DEVICE)
    out = torch.empty_like(x)
    _triton.launch(runs_kernel, (1,), x, out, 1 << 30)
    assert torch.equal(out, x)


@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes(kind):
    x = extreme(kind)
    for spec in (SPECS[2], SPECS[6], SPECS[8]):
        assert_same(x, spec, spec)
    assert_same(x.bfloat16(), SPECS[3], SPECS[4])


@pytest.mark.parametrize("row, col", [(SPECS[4], None), (SPECS[0], SPECS[6]), (SPECS[7], SPECS[1])])
def test_given_amax(row, col):
    x = torch.randn(48, 17).bfloat16().t()
    for true in true_amaxes(x, row, col):
        assert_reference(run("quantize", x, row, col, NOISE, None, true), x, row, col)
    for amax in to_hand_in(x)[::5]:
        assert_reference(run("quantize", x, row, col, NOISE, None, amax), x, row, col, amax)


def test_rotation_beyond_bf16_saturates():
    for spec in (SPECS[3], SPECS[6], SPECS[9]):
        assert_same(saturating(), spec, spec)


def test_empty():
    for spec in SPECS:
        assert_same(torch.randn(0, 32), spec, spec)


def test_pair_draws_as_its_parts():
    x = torch.randn(17, 40).bfloat16()
    row, col, noise = QuantSpec("1x16", SR), QuantSpec("1x16", SR, DEFAULT_SIGNS), torch.tensor([5, 11])
    both = run("quantize", x, row, col, noise)
    assert same_bytes(both[0], run("quantize", x, row, None, noise)[0])
    assert same_bytes(both[3], run("quantize", x, None, col, noise + torch.tensor([0, 1]))[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (19, 64), (0, 16)])
def test_hadamard(shape, dtype):
    reference = implementation("hadamard", "reference").run
    x = torch.randn(shape).to(dtype)
    strided = torch.randn(shape[0] * 2, shape[1] * 3).to(dtype)[::2, ::3]
    huge = (torch.randn(shape).sign() * 3e38).to(dtype)  # sums of 16, over 4: every third is beyond bf16
    for y in (x, x.t().contiguous().t(), strided, huge, (x.float() * 1e-38).to(dtype)):
        for signs in (DEFAULT_SIGNS, 0):
            mine, theirs = run("hadamard", y, signs), reference(y, signs)
            assert same_bytes(*(torch.where(got.isnan(), 1.0, got) for got in (mine, theirs)))


@pytest.mark.parametrize("block", ["1x16", "1x32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dequantize(block, dtype):
    reference = implementation("dequantize", "reference").run
    for shape in ((1, 1), (0, 16), (7, 50), (3, 1856)):
        q = nk.quantize(torch.randn(shape) * torch.exp(4 * torch.randn(shape)), block=block)
        parts = (q.codes, q.scales, getattr(q, "global_scale", None), shape[1], dtype)
        assert same_bytes(run("dequantize", *parts), reference(*parts))
    every_byte = torch.arange(256, dtype=torch.uint8)
    codes, rows = every_byte.expand(256, 256).contiguous(), every_byte.view(256, 1)
    if block == "1x32":
        parts = (codes.view(torch.float8_e4m3fn), rows.expand(256, 8).contiguous(), None, 256, dtype)
    else:
        parts = (codes, rows.expand(256, 32).contiguous().view(torch.float8_e4m3fn), torch.tensor(0.7), 512, dtype)
    mine, theirs = run("dequantize", *parts), reference(*parts)
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert same_bytes(*(torch.where(got.isnan(), 3.0, got) for got in (mine, theirs)))


@pytest.mark.parametrize("rows", [524286, 524287, 524288])
def test_lengths_beside_two_to_the_31(rows):
    """The maximum's kernel rounds a length up to whole tiles: within 31 bits, or in 64, which it has from 2^31 on."""
    with _triton.recorded((9, 0)) as launches:
        _triton_amax.amaxes(
            torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta"), nk.QuantSpec(), None, True, None
        )
    ((_, arguments, constants, _, _),) = launches
    length = arguments[3]
    assert length >= 2**31 or length + constants["LENGTH"] - 1 < 2**31
