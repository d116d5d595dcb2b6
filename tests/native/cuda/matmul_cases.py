"""Packed weights times few tokens in CUDA, on the host model, against the decoded weight in float64."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.generate.weights import ServedLinear, serving
from nvfp4_kernels.ops.matmul import _cuda
from nvfp4_kernels.ops.quantize import native as quantize
from tests.formats.test_packed import random_weight

F64 = torch.float64


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("native"):
        yield


def weight(rows, cols):
    """(packed, its values in float64); blocks of zero scale and of subnormal ones among them."""
    w = random_weight(rows, cols)
    plain = w.dequantize().to(F64) / w.global_scale.to(F64)
    return nk.PackedNVFP4Tensor.pack(w), plain.round(decimals=12) * w.global_scale.to(F64)


def bound(a, w):
    """fp32 sums of exact products: an error of 2^-24 for each of K sums at most, of the sum of magnitudes."""
    return (a.to(F64).abs() @ w.abs().t()) * a.shape[1] * 2.0**-24


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 17, 33, 64])
def test_tokens(model, tokens):
    packed, w = weight(144, 512)  # a tile and a slab; 4 steps
    a = torch.randn(tokens, 512).bfloat16()
    y = nk.matmul(a, packed, torch.float32)
    assert model.kernels == [f"weight_only_{_cuda.kernel(tokens)}"]
    assert ((y - a.to(F64) @ w.t()).abs() <= bound(a, w)).all()


@pytest.mark.parametrize("cols", [16, 128, 250, 1856])
def test_length(cols):
    packed, w = weight(32, cols)
    for a in (
        torch.randn(3, cols).bfloat16(),
        torch.randn(cols, 3).bfloat16().t(),
        torch.randn(3, cols + 3).bfloat16()[:, 3:],
    ):
        y = nk.matmul(a, packed, torch.float32)
        assert ((y - a.to(F64) @ w.t()).abs() <= bound(a, w)).all()


@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_splits_add_up_in_order(model, monkeypatch, tokens):
    """Whichever split ends last: the same bits, and counters back at zero."""
    zeros = []
    monkeypatch.setattr(_cuda, "zeros", lambda n, device: zeros.append(torch.zeros(n, dtype=torch.int32)) or zeros[-1])
    packed, w = weight(128, 2048)
    assert _cuda.splits(_cuda.kernel(tokens), 1, 2048) == 4
    a = torch.randn(tokens, 2048).bfloat16()
    made = []
    for seed in (None, 2, 3):  # odd seeds run the blocks from the last to the first
        model.seed = seed
        made.append(nk.matmul(a, packed, torch.float32))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])
    assert ((made[0] - a.to(F64) @ w.t()).abs() <= bound(a, w)).all()
    assert len(zeros) == 3 and not torch.cat(zeros).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results(dtype):
    packed, w = weight(48, 640)
    a, bias = torch.randn(5, 640).bfloat16(), torch.randn(48).to(dtype)
    plain = nk.matmul(a, packed, torch.float32)
    assert torch.equal(nk.matmul(a, packed, dtype, bias=bias), (plain + bias.float()).to(dtype))
    assert torch.equal(nk.matmul(a.view(5, 1, 640), packed, dtype), plain.to(dtype).view(5, 1, 48))
    if dtype == torch.float32:
        out = torch.randn(5, 48)
        assert torch.equal(nk.matmul(a, packed, out=out.clone(), accumulate=True), out + plain)


def test_every_code_under_every_scale_is_exact():
    """One value of a at a time takes out a column of the weight, to the bit."""
    w = random_weight(128, 16)
    w.codes[:] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8)
    w.global_scale.fill_(1)
    w.scales.view(torch.uint8)[:] = torch.arange(128, dtype=torch.uint8).clamp(max=126)[:, None]
    packed = nk.PackedNVFP4Tensor.pack(w)
    y = nk.matmul(torch.eye(16).bfloat16(), packed, torch.float32)
    assert torch.equal(y, w.dequantize().t())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite(bad):
    packed, w = weight(32, 128)
    a = torch.randn(4, 128).bfloat16()
    a[2, 77] = bad
    y = nk.matmul(a, packed)
    assert not y[2].isfinite().any() and y[[0, 1, 3]].isfinite().all()
    packed.global_scale.fill_(bad)
    assert nk.matmul(a, packed).isnan().all()


def test_what_others_must_serve():
    packed, w = weight(32, 128)
    a = torch.randn(4, 128)
    assert "by rows of bfloat16" in _cuda.refuses(a, packed, None, torch.bfloat16, None, False)
    assert "packed weights alone" in _cuda.refuses(a.bfloat16(), packed.unpack(), None, torch.bfloat16, None, False)
    with nk.backend("native", "reference"):
        assert torch.equal(nk.matmul(a, packed), nk.matmul(a, packed.unpack()))


def test_a_served_model_reads_its_weights_in_place(model, monkeypatch):
    """Decoding through the engine: the kernels multiply, and the logits are those of the weights that they hold."""
    config = nk.preset("tiny", hybrid_override_pattern="*E-", hidden_size=64, vocab_size=64, torch_dtype="bfloat16")
    monkeypatch.setattr(quantize, "refuses", lambda *arguments: "not in this library")
    plain = nk.HybridModel(config).eval()
    recipe = nk.LinearRecipe(fprop_w=nk.QuantSpec())
    plain.set_recipe(recipe)
    with nk.backend("native", "reference"):
        served, ids = serving(plain), torch.randint(0, 64, (3, 4))
        with torch.no_grad():
            logits = served(ids)
        assert set(model.kernels) == {"weight_only_16", "weight_only_8"}
        kept = [m for name, m in served.named_modules() if isinstance(m, ServedLinear) and "gate" not in name]
        assert all(isinstance(m.weight, nk.PackedNVFP4Tensor) for m in kept)
        for m in kept:
            m.weight = m.weight.unpack()
        experts = served.backbone.layers[1].mixer.experts
        for m in (experts.up_proj, experts.down_proj):
            assert m.is_packed
            m.unpack()
        with torch.no_grad():
            wanted = served(ids)
    torch.testing.assert_close(logits, wanted, atol=0.03 * wanted.float().std().item(), rtol=0)


def test_splits_fill_the_device():
    assert _cuda.splits(8, 32, 14336) == 16 and _cuda.splits(64, 32, 14336) == 8
    assert _cuda.splits(8, 8192, 4096) == 1 and _cuda.splits(8, 1, 512) == 1
