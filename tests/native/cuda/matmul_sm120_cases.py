"""NVFP4 times NVFP4 by the block-scaled mma.sync, on the host model, against the decoded operands in float64."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops.matmul import _cuda_sm120
from tests.formats.test_packed import random_weight
from tests.oracles.nvfp4_brute import GRID, e4m3_value

F64 = torch.float64
VALUES = torch.tensor(GRID + [-x for x in GRID], dtype=F64)
SCALES = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=F64)


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    monkeypatch.setattr(_device, "fp4_tensor_cores", lambda device: "mma.sync")
    with nk.backend("native"):
        yield


def values(x):
    """An operand in float64, padding included."""
    codes = torch.stack([x.codes & 15, x.codes >> 4], -1).flatten(-2).long()
    scales = SCALES[x.scales.view(torch.uint8).long()].repeat_interleave(16, -1)
    return VALUES[codes] * scales * x.global_scale.to(F64)


def operands(rows, cols, length):
    a, b = random_weight(rows, length), random_weight(cols, length)
    b.global_scale.fill_(-0.012)
    return a, b


def assert_close(y, a, b):
    """fp32 sums of exact products, rounded at most once for 16 k, and twice at the end."""
    left, right = values(a), values(b)
    bound = (left.abs() @ right.abs().t()) * (a.shape[1] / 16 + 4) * 2.0**-24
    assert ((y.to(F64) - left @ right.t()).abs() <= bound).all()


@pytest.mark.parametrize("rows, cols, length", [
    (1, 1, 16), (17, 200, 48), (128, 17, 64), (200, 128, 1856), (130, 300, 512), (1, 128, 250), (17, 17, 384),
])  # fmt: skip
def test_sizes(model, rows, cols, length):
    a, b = operands(rows, cols, length)
    assert_close(nk.matmul(a, b, torch.float32), a, b)
    assert model.kernels == ["block_scaled"]


def test_tiles_in_groups():
    """More tile rows than a group has, and a group that is not full."""
    a, b = operands(17 * 128 + 5, 130, 16)
    assert_close(nk.matmul(a, b, torch.float32), a, b)


def test_every_code_under_every_scale_is_exact():
    """Ones take out a value of b at a time, of every row and column of the tile, to the bit."""
    b = random_weight(128, 128)
    b.codes[:] = torch.randint(0, 256, (128, 64), dtype=torch.uint8)
    b.scales.view(torch.uint8)[:] = torch.arange(128, dtype=torch.uint8).clamp(max=126)[:, None]
    b.global_scale.fill_(1)
    ones = torch.zeros(128, 64, dtype=torch.uint8)
    k = torch.arange(128)
    ones[k, k // 2] = torch.where(k % 2 == 0, 0x02, 0x20).to(torch.uint8)
    scales = torch.full((128, 8), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    a = nk.NVFP4Tensor(ones, scales, torch.tensor(1.0), (128, 128))
    exact = values(b).float()
    assert torch.equal(nk.matmul(a, b, torch.float32), exact.t())
    assert torch.equal(nk.matmul(b, a, torch.float32), exact)


@pytest.mark.parametrize("rows, k, parts", [(130, 1600, 3), (40, 1024, 2)])
@pytest.mark.parametrize("seed", [None, 2, 3])
def test_splits_add_up_in_order(model, monkeypatch, rows, k, parts, seed):
    """Whichever split ends last: the same bits, once, and counters back at zero. The model has two that end together."""
    made = []
    monkeypatch.setattr(
        _cuda_sm120, "zeros", lambda n, device: made.append(torch.zeros(n, dtype=torch.int32)) or made[-1]
    )
    torch.manual_seed(5)
    a, b = operands(rows, 16, k)
    assert _cuda_sm120.splits(rows, 16, k) == parts
    model.seed = seed
    y = nk.matmul(a, b, torch.float32)
    assert_close(y, a, b)
    assert len(made) == 1 and not made[0].any()
    model.seed = 8
    assert torch.equal(nk.matmul(a, b, torch.float32), y)
    assert torch.equal(nk.matmul(a, b, out=torch.ones_like(y), accumulate=True), y + 1)


@pytest.mark.parametrize("cols", [32, 34])  # stored four at a time, and one by one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results(dtype, cols):
    a, b = operands(19, cols, 80)
    bias = torch.randn(cols).to(dtype) * 1e4
    plain = nk.matmul(a, b, torch.float32)
    assert torch.equal(nk.matmul(a, b, dtype, bias=bias), (plain + bias.float()).to(dtype))
    if dtype == torch.float32:
        out = torch.randn(20 * cols + 1)[1:][: 19 * cols].view(19, cols)  # begins at a multiple of 4 bytes alone
        expected = out + plain
        assert torch.equal(nk.matmul(a, b, out=out, accumulate=True), expected)
        aligned = plain.clone()
        assert torch.equal(nk.matmul(a, b, out=aligned, accumulate=True), plain + plain)


def test_operands_that_begin_anywhere():
    a, b = operands(40, 24, 64)
    for part in ("codes", "scales"):
        moved = torch.empty(4096, dtype=torch.uint8)[4:]
        whole = getattr(a, part).view(torch.uint8)
        moved = moved[: whole.numel()].view(whole.shape).copy_(whole)
        object.__setattr__(a, part, moved.view(getattr(a, part).dtype))
        assert_close(nk.matmul(a, b, torch.float32), a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_global_scales_that_are_not_finite(bad):
    a, b = operands(17, 20, 64)
    a.global_scale.fill_(bad)
    assert nk.matmul(a, b).isnan().all() and nk.matmul(b, a).isnan().all()


def test_block_scales_that_quantize_never_writes():
    """NaN: its row. Negative ones, which ue4m3 cannot say: NaN for all that shares their warp, never a wrong number."""
    a, b = operands(140, 100, 128)
    a.scales.view(torch.uint8)[5, 3] = 0x7F
    y = nk.matmul(a, b, torch.float32)
    assert y[5].isnan().all() and y[torch.arange(140) != 5].isfinite().all()
    a.scales.view(torch.uint8)[5, 3] = 0x80 | 0x30
    y = nk.matmul(a, b, torch.float32)
    assert y[:64].isnan().all() and y[64:].isfinite().all()


def test_quantized_matrices():
    """Through quantize, of 16x16 blocks too: what a linear layer multiplies."""
    x, w = torch.randn(33, 96), torch.randn(48, 96)
    with nk.backend("reference"):
        a, b = nk.quantize(x), nk.quantize(w, block="16x16")
    assert_close(nk.matmul(a, b, torch.float32), a, b)
    assert nk.matmul(a, b, torch.bfloat16).shape == (33, 48)
    empty = nk.NVFP4Tensor(a.codes[:0], a.scales[:0], a.global_scale, (0, 96))
    assert nk.matmul(empty, b).shape == (0, 48) and nk.matmul(b, empty).shape == (48, 0)


def test_splits_fill_the_device():
    assert _cuda_sm120.splits(1, 4096, 4096) == 8 and _cuda_sm120.splits(8192, 4096, 4096) == 1
    assert _cuda_sm120.splits(1, 128, 16) == 1 and _cuda_sm120.splits(128, 128, 1 << 20) == 340


def test_what_others_must_serve():
    a, b = operands(4, 8, 64)
    with pytest.raises(nk.Refused if hasattr(nk, "Refused") else RuntimeError, match="packed weights alone"):
        nk.matmul(a.dequantize(torch.bfloat16), b)
