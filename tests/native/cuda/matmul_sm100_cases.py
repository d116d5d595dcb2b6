"""NVFP4 times NVFP4 by tcgen05, on the host model of sm_100, against the decoded operands in float64."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.layout import swizzle_128x4
from nvfp4_kernels.ops import _cuda, _device, _tensor_map
from nvfp4_kernels.ops.matmul import _cuda_sm100, native
from tests.formats.test_packed import random_weight
from tests.oracles.nvfp4_brute import GRID, e4m3_value

F64 = torch.float64


@pytest.fixture(autouse=True)
def chip(monkeypatch):
    monkeypatch.setattr(_device, "fp4_tensor_cores", lambda device: "tcgen05")
    with nk.backend("native"):
        yield


@pytest.fixture(params=_cuda_sm100.WIDTHS)
def wide(request, monkeypatch):
    monkeypatch.setattr(_cuda_sm100, "width", lambda *sizes: request.param)
    return request.param


def quantized(rows, k):
    with nk.backend("reference"):
        return nk.quantize(torch.randn(rows, k))


def values(x):
    """In float64, from the format's definition alone."""
    grid = torch.tensor([*GRID, *(-g for g in GRID)], dtype=F64)
    codes = torch.stack([x.codes & 15, x.codes >> 4], -1).flatten(1).long()
    scales = torch.tensor([e4m3_value(b) for b in range(256)], dtype=F64)[x.scales.view(torch.uint8).long()]
    return grid[codes] * scales.repeat_interleave(16, 1) * x.global_scale.to(F64)


def assert_product(y, a, b):
    """fp32 sums of exact products: an error of 2^-24 for each of K sums and two factors at most, of the sum of magnitudes."""
    left, right = values(a), values(b)
    most = (left.abs() @ right.abs().t()) * (left.shape[1] + 2) * 2.0**-24
    assert ((y - left @ right.t()).abs() <= most).all()


@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 300), (17, 128), (128, 17), (200, 200), (300, 1)])
def test_sizes(model, wide, rows, cols):
    a, b = random_weight(rows, 256), random_weight(cols, 256)
    assert_product(nk.matmul(a, b, torch.float32), a, b)
    assert model.kernels == ["swizzle_scales", f"tcgen05_{wide}"]


@pytest.mark.parametrize("k", [16, 48, 64, 320, 1856])
def test_length(wide, k):
    """Rows of codes that begin at no multiple of 16, of scales at none of 4; a last stage of one to four products."""
    a, b = random_weight(40, k), random_weight(200, k)
    assert_product(nk.matmul(a, b, torch.float32), a, b)


def test_every_block_persists(model, wide):
    """Four blocks for 12 or 16 tiles of 3 stages, and the same bits in every order of threads, copies and products."""
    a, b = random_weight(400, 576), random_weight(400, 576)
    made = []
    for seed in (None, 2, 3):
        model.seed = seed
        made.append(nk.matmul(a, b, torch.float32))
    assert_product(made[0], a, b)
    assert all(torch.equal(y, made[0]) for y in made[1:])


@pytest.mark.parametrize("cols", [40, 43])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results(dtype, cols):
    a, b = quantized(50, 96), quantized(cols, 96)
    bias = torch.randn(cols).to(dtype)
    plain = nk.matmul(a, b, torch.float32)
    assert_product(plain, a, b)
    assert torch.equal(nk.matmul(a, b, dtype), plain.to(dtype))
    assert torch.equal(nk.matmul(a, b, dtype, bias=bias), (plain + bias.float()).to(dtype))
    assert torch.equal(nk.matmul(a, b, out=torch.full((50, cols), 7, dtype=dtype)), plain.to(dtype))
    if dtype == torch.float32:
        out = torch.randn(50, cols)
        assert torch.equal(nk.matmul(a, b, bias=bias, out=out.clone(), accumulate=True), out + (plain + bias))


def test_every_code_under_every_scale():
    """One value of b at a time takes out a column of a, to the bit: order and place of codes, scales, rows."""
    a = random_weight(127, 64)
    a.codes[:] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 4, dtype=torch.uint8)
    a.scales.view(torch.uint8)[:] = (torch.arange(127)[:, None] + torch.tensor([0, 31, 64, 97])) % 127
    b = nk.NVFP4Tensor(
        torch.zeros(64, 32, dtype=torch.uint8), torch.ones(64, 4).to(torch.float8_e4m3fn), torch.tensor(1.0), (64, 64)
    )
    for k in range(64):
        b.codes[k, k // 2] = 2 << 4 * (k % 2)  # 1.0
    assert torch.equal(nk.matmul(a, b, torch.float32).to(F64), values(a).float().to(F64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(bad):
    a, b = quantized(20, 64), quantized(30, 64)
    a.scales.view(torch.uint8)[3, 1] = 0x7F
    y = nk.matmul(a, b)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()
    b.global_scale.fill_(bad)
    assert nk.matmul(a, b).isnan().all()


def test_nothing_to_do(model):
    a, b = random_weight(0, 64), random_weight(3, 64)
    assert nk.matmul(a, b).shape == (0, 3) and nk.matmul(b, a).shape == (3, 0)
    assert not model.kernels


def test_views_and_strides():
    """Operands that do not begin at multiples of 16 bytes, and transposed memory."""
    a, b = random_weight(33, 96), random_weight(130, 96)
    odd = torch.empty(33 * 48 + 1, dtype=torch.uint8)[1:].view(33, 48).copy_(a.codes)
    turned = b.codes.t().contiguous().t()
    left = nk.NVFP4Tensor(odd, a.scales, a.global_scale, a.shape)
    right = nk.NVFP4Tensor(turned, b.scales, b.global_scale, b.shape)
    assert torch.equal(nk.matmul(left, right), nk.matmul(a, b))


@pytest.mark.parametrize("rows, blocks", [(1, 1), (128, 4), (130, 6), (300, 116)])
def test_scales_as_cublas_orders_them(rows, blocks):
    a, b = random_weight(rows, 16 * blocks), random_weight(1, 16 * blocks)
    made, other = _cuda_sm100._swizzled(a, b, 128)
    assert torch.equal(made, swizzle_128x4(a.scales).view(torch.uint8))
    assert torch.equal(other, swizzle_128x4(b.scales).view(torch.uint8))


def test_whose_affair(monkeypatch):
    q, plain = random_weight(4, 64), torch.randn(4, 64)
    assert native._cuda_kernels(q, q) is _cuda_sm100
    assert native._cuda_kernels(plain, q) is native._cuda_kernels(q, plain) is native.packed
    monkeypatch.setattr(_device, "fp4_tensor_cores", lambda device: None)
    assert native._cuda_kernels(q, q) is native.packed


def test_width():
    """On B200's 148 processors: 192 for what fills them several times over, 128 for what is over in one wave."""
    for (rows, cols), expected in (((8192, 4096), 192), ((128, 128), 128), ((128, 4096), 128), ((8192, 10304), 192)):
        assert _cuda_sm100.width(rows, cols, 148) == expected


def test_tensor_map_of_the_driver(monkeypatch):
    """What cuTensorMapEncodeTiled is asked, and where it writes: at a multiple of 64, and these bytes are handed on."""
    given = []

    class Driver:
        def cuTensorMapEncodeTiled(self, at, *rest):
            given.extend((at.value, *rest))
            (_tensor_map.ctypes.c_uint8 * 128).from_address(at.value)[:] = range(128)
            return 0

    monkeypatch.setattr(_cuda, "_model", None)
    monkeypatch.setattr(_cuda, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = torch.zeros(300, 48, dtype=torch.uint8)
    assert _tensor_map.encoded(x, 192) == bytes(range(128))
    at, kind, rank, base, sizes, strides, box, steps, *modes = given
    assert at % 64 == 0 and (kind.value, rank.value, base.value) == (0, 2, x.data_ptr())
    assert (list(sizes), list(strides), list(box), list(steps)) == ([48, 300], [48], [128, 192], [1, 1])
    assert [m.value for m in modes] == [0, 3, 3, 0]


def test_refusal_names_the_chips(monkeypatch):
    monkeypatch.setattr(_cuda, "_model", None)
    monkeypatch.setattr(_device, "cuda_target", lambda device: None)
    q = SimpleNamespace(codes=SimpleNamespace(device="a device"))
    assert "sm_80, 90, 100, 103 and 120" in _cuda_sm100.refuses(q, q, None, None, None, False)
