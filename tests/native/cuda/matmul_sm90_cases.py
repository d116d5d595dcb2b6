"""Packed weights times 65 rows and more in CUDA, on the host model, against the decoded weight in float64."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.matmul import _cuda_slabs, _cuda_sm90
from tests.formats.test_packed import random_weight
from tests.native.cuda.matmul_cases import bound, forced, weight  # noqa: F401  (forced is a fixture)

F64 = torch.float64


@pytest.fixture
def slabs(monkeypatch):
    """The slabs serve all beyond 64 rows; 128 rows of the weight a slab."""
    monkeypatch.setattr(_cuda_sm90, "MOST", 64)
    monkeypatch.setattr(_cuda_slabs, "CACHED", 0)
    monkeypatch.setattr(_cuda_slabs, "RESULTS", 0)


def tile_of(monkeypatch, rows):
    """Tiles of so many rows, whatever they cost."""
    monkeypatch.setattr(_cuda_sm90, "COST", {rows: 1.0})
    _cuda_sm90.plan.cache_clear()


@pytest.fixture(autouse=True)
def plans():
    _cuda_sm90.plan.cache_clear()
    yield
    _cuda_sm90.plan.cache_clear()


def check(y, a, w):
    assert ((y - a.to(F64) @ w.t()).abs() <= bound(a, w)).all()


@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize("tokens, rows, cols", [
    (65, 16, 16), (100, 272, 1856), (128, 64, 250), (257, 16, 128), (65, 1856, 128),
])  # fmt: skip
def test_sizes(model, monkeypatch, tile, tokens, rows, cols):
    tile_of(monkeypatch, tile)
    packed, w = weight(rows, cols)
    a = torch.randn(tokens, cols).bfloat16()
    y = nk.matmul(a, packed, torch.float32)
    assert model.kernels[0] == f"weight_only_tiles_{tile}"
    check(y, a, w)


@pytest.mark.parametrize("tile", [128, 256])
def test_parts_add_up_in_order(model, monkeypatch, tile):
    """Five blocks share six tiles, or four, of six steps: runs that begin and end anywhere, the same bits each time."""
    monkeypatch.setattr(_cuda_sm90, "PROCESSORS", 5)
    tile_of(monkeypatch, tile)
    packed, w = weight(272, 768)
    assert _cuda_sm90.plan(129, 272, 768) == (tile, 6 if tile == 128 else 4, 5)
    a = torch.randn(129, 768).bfloat16()
    made = []
    for seed in (None, 2, 3):  # odd seeds run the blocks from the last to the first
        model.seed = seed
        made.append(nk.matmul(a, packed, torch.float32))
    assert model.kernels == [f"weight_only_tiles_{tile}", f"weight_only_parts_{tile}"] * 3
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    check(made[0], a, w)


@pytest.mark.parametrize("cols, parts", [(384, 1), (512, 2)])
def test_a_row_of_x_is_on_its_own(monkeypatch, model, cols, parts):
    """Bits of a row depend on no other row, nor on how many there are, as long as they take as many tiles of 128."""
    monkeypatch.setattr(_cuda_sm90, "LEAST_STEPS", 3 - parts)
    monkeypatch.setattr(_cuda_sm90, "PROCESSORS", 2 * parts)
    tile_of(monkeypatch, 128)
    packed, _ = weight(144, cols)
    a = torch.randn(128, cols).bfloat16()
    whole = nk.matmul(a, packed, torch.float32)
    assert torch.equal(nk.matmul(a[:65], packed, torch.float32), whole[:65])
    order = torch.randperm(128)
    assert torch.equal(nk.matmul(a[order], packed, torch.float32), whole[order])
    assert ("weight_only_parts_128" in model.kernels) == (parts > 1)


@pytest.mark.parametrize("many", ["tiles", "parts", "slabs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results(model, monkeypatch, request, many, dtype):
    """Bias, accumulation and each dtype, rounded once."""
    if many == "slabs":
        request.getfixturevalue("slabs")
    rows, cols = 144, 256
    if many == "parts":  # of a step each
        monkeypatch.setattr(_cuda_sm90, "LEAST_STEPS", 1)
    packed, w = weight(rows, cols)
    a, bias = torch.randn(70, cols).bfloat16(), torch.randn(rows).to(dtype)
    plain = nk.matmul(a, packed, torch.float32)
    assert (
        model.kernels
        == {
            "tiles": ["weight_only_tiles_128"],
            "parts": ["weight_only_tiles_128", "weight_only_parts_128"],
            "slabs": ["decode_packed"] * 2,
        }[many]
    )
    check(plain, a, w)
    assert torch.equal(nk.matmul(a, packed, dtype, bias=bias), (plain + bias.float()).to(dtype))
    assert torch.equal(nk.matmul(a.view(7, 10, cols), packed, dtype), plain.to(dtype).view(7, 10, rows))
    memory = torch.empty(70 * rows + 1, dtype=dtype)
    odd = memory[1:].view(70, rows)  # begins at no multiple of 16 bytes
    assert torch.equal(nk.matmul(a, packed, out=odd), plain.to(dtype)) and odd.data_ptr() == memory[1:].data_ptr()
    if dtype == torch.float32:
        out = torch.randn(70, rows)
        assert torch.equal(nk.matmul(a, packed, out=out.clone(), accumulate=True), out + plain)
        got = nk.matmul(a, packed, out=out.clone(), accumulate=True, bias=bias)
        assert torch.equal(got, out + (plain + bias))


@pytest.mark.parametrize("form", ["columns", "a slice", "odd"])
def test_strides(form):
    packed, w = weight(32, 250 if form != "odd" else 251)
    a = {
        "columns": torch.randn(250, 65).bfloat16().t(),
        "a slice": torch.randn(65, 256).bfloat16()[:, 3:253],
        "odd": torch.full((65, 256), torch.nan).bfloat16()[:, :251].copy_(torch.randn(65, 251)),
    }[form]
    check(nk.matmul(a, packed, torch.float32), a, w)


@pytest.mark.parametrize("tile", [128, 256])
def test_every_code_under_every_scale_is_exact(monkeypatch, tile):
    """One value of a at a time takes out a column of the weight, to the bit."""
    tile_of(monkeypatch, tile)
    w = random_weight(256, 128)
    w.codes.view(256, 8, 8)[:] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    w.global_scale.fill_(1)
    w.scales.view(torch.uint8)[:] = (torch.arange(256)[:, None] + torch.arange(8)).clamp(max=126).to(torch.uint8)
    packed = nk.PackedNVFP4Tensor.pack(w)
    assert torch.equal(nk.matmul(torch.eye(128).bfloat16(), packed, torch.float32), w.dequantize().t())
    decoded = torch.empty(256, 128, dtype=torch.bfloat16)
    _cuda_slabs.decode(packed.codes, packed.scales, decoded)
    assert torch.equal(decoded.float(), w.dequantize())


@pytest.mark.parametrize("many", ["tiles", "slabs"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(request, many, bad):
    if many == "slabs":
        request.getfixturevalue("slabs")
    packed, w = weight(32, 128)
    a = torch.randn(66, 128).bfloat16()
    a[2, 77] = bad
    y = nk.matmul(a, packed)
    others = torch.arange(66) != 2
    assert not y[2].isfinite().any() and y[others].isfinite().all()
    packed.global_scale.fill_(bad)
    assert nk.matmul(a, packed).isnan().all()


def test_slabs(model, slabs):
    """A last slab of one 16-row slab; a weight larger than 128 rows; columns that are no multiple of 128."""
    packed, w = weight(272, 1856)
    a = torch.randn(67, 1856).bfloat16()
    check(nk.matmul(a, packed, torch.float32), a, w)
    assert model.kernels == ["decode_packed"] * 3


def test_who_serves(model, monkeypatch):
    packed, _ = weight(16, 128)
    a = torch.randn(1025, 128).bfloat16()
    for tokens, name in ((64, "weight_only_64"), (65, "weight_only_tiles_128"), (1025, "decode_packed")):
        model.kernels = []
        nk.matmul(a[:tokens], packed)
        assert model.kernels[0] == name
    monkeypatch.setattr(_cuda_sm90._cuda, "refuses_arch", lambda arch, x: "another chip")
    model.kernels = []
    nk.matmul(a[:65], packed)
    assert model.kernels == ["decode_packed"]
    assert nk.matmul(a[:0], packed).shape == (0, 16)


def test_plans_fill_the_device():
    assert _cuda_sm90.plan(128, 4096, 14336) == (256, 16, 128)  # eight parts of 14 steps each
    assert _cuda_sm90.plan(256, 4096, 14336) == (256, 32, 128)
    assert _cuda_sm90.plan(1024, 4096, 14336) == (256, 128, 128)  # a tile a block
    assert _cuda_sm90.plan(384, 4096, 14336) == (256, 48, 132)  # 48 tiles in even parts would leave 36 processors idle
    assert _cuda_sm90.plan(128, 1856, 2688) == (128, 15, 75)  # Nano's experts: four steps a block at least
    assert _cuda_slabs.slab_rows(2048, 14336) == 8192 and _cuda_slabs.slab_rows(65536, 14336) == 640
