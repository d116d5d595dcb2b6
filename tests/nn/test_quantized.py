"""Layers with kept quantized weights: what they give, what they pass back, and that nothing turns their bits into others."""

import copy

import pytest
import torch
from torch import nn

import nvfp4_kernels as nk
from nvfp4_kernels.autograd import weight_only
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts
from tests.oracles.nvfp4_brute import GRID, e4m3_value


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nvfp4_layer(rows, cols, **options):
    return NVFP4Weight.from_tensors(nk.quantize(drawn(rows, cols, seed=1)), **options)


def fp8_codes(*shape):
    return drawn(*shape, seed=1).mul(20).to(torch.float8_e4m3fn)


def decoded(layer, expert=None):
    """The weight in float64, code by code from the definitions of the formats."""
    bits = [b if expert is None else b[expert] for name, b in layer.named_buffers() if name != "input_scale"]
    weight, scale = bits[0], bits[1]
    table = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)
    if isinstance(layer, FP8Weight):
        return table[weight.view(torch.uint8).long()] * scale.double()
    codes = torch.stack([weight & 15, weight >> 4], -1).flatten(-2).long()
    values = torch.tensor(GRID + [-g for g in GRID], dtype=torch.float64)[codes]
    return values * table[scale.view(torch.uint8).long()].repeat_interleave(16, -1) * bits[2].double()


LAYERS = {
    "nvfp4": lambda: nvfp4_layer(24, 48, bias=drawn(24, seed=2)),
    "fp8": lambda: FP8Weight.from_tensors(fp8_codes(24, 64), torch.tensor(0.37), drawn(24, seed=2)),
    "fp8 of odd width": lambda: FP8Weight.from_tensors(fp8_codes(24, 41), torch.tensor(0.37)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_products_and_gradients(kind):
    layer = LAYERS[kind]()
    weight = decoded(layer)
    torch.testing.assert_close(layer.dequantize().double(), weight, rtol=1e-7, atol=0)
    x = drawn(2, 17, layer.in_features, seed=3).requires_grad_()
    y = layer(x)
    bias = 0 if layer.bias is None else layer.bias.double()
    torch.testing.assert_close(y.double(), x.double() @ weight.T + bias, rtol=1e-5, atol=1e-4)
    dy = drawn(*y.shape, seed=4)
    y.backward(dy)
    torch.testing.assert_close(x.grad.double(), dy.double() @ weight, rtol=1e-5, atol=1e-4)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert all(not b.requires_grad for b in layer.buffers())


@pytest.mark.parametrize("kind", ["nvfp4", "packed", "fp8"])
def test_gradients_of_a_weight_decoded_in_parts(kind, monkeypatch):
    """128 columns at a time, the last part of less."""
    monkeypatch.setattr(weight_only, "DECODED", 0)
    layer = FP8Weight.from_tensors(fp8_codes(32, 301), torch.tensor(0.37)) if kind == "fp8" else nvfp4_layer(32, 272)
    weight, x, dy = decoded(layer), drawn(5, layer.in_features, seed=3).requires_grad_(), drawn(5, 32, seed=4)
    packed = nk.PackedNVFP4Tensor.pack(layer.tensor()) if kind == "packed" else None
    y = layer(x) if packed is None else weight_only.weight_only(x, packed)
    y.backward(dy)
    torch.testing.assert_close(x.grad.double(), dy.double() @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["nvfp4", "fp8", "experts"])
def test_compiles_whole_with_gradients(kind):
    if kind == "experts":
        made = (NVFP4Weight.from_tensors([nk.quantize(drawn(48, 48, seed=e)) for e in range(3)]) for _ in range(2))
        experts, offsets = QuantizedExperts(*made), torch.tensor([0, 2, 2, 5])
        layer, call = experts.up_proj, lambda x: experts(x, offsets)
    else:
        layer = call = LAYERS[kind]()

    def step(call):
        x = drawn(5, layer.in_features, seed=3).requires_grad_()
        y = call(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))

    compiled = step(torch.compile(call, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(call), strict=True))


def test_autocast():
    layer, x = nvfp4_layer(32, 16), drawn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.bfloat16()))


@pytest.mark.parametrize("change", ["half", "to float64", "double and back", "copy", "state_dict", "meta"])
@pytest.mark.parametrize("kind", LAYERS)
def test_bits_stay_bits(kind, change):
    layer = LAYERS[kind]()
    layer.input_scale = torch.tensor(1e-3)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    match change:
        case "half":
            layer.half()
        case "to float64":
            nn.Sequential(layer).to(torch.float64)
        case "double and back":
            layer.double().to(torch.bfloat16).float()
        case "copy":
            layer = copy.deepcopy(layer)
        case "state_dict":
            state = layer.state_dict()
            layer = type(layer)(layer.in_features, layer.out_features, layer.bias is not None, input_scale=True)
            layer.load_state_dict(state)
        case "meta":
            state = layer.state_dict()
            layer = type(layer)(layer.in_features, layer.out_features, layer.bias is not None, True, device="meta")
            layer.to_empty(device="cpu").load_state_dict(state)
    after = dict(layer.named_buffers())
    assert after.keys() == before.keys()
    for name, b in before.items():
        assert after[name].dtype == b.dtype and after[name].shape == b.shape
        assert torch.equal(after[name].reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_names_are_the_published_ones():
    names = set(nvfp4_layer(16, 16, input_scale=torch.tensor(1.0)).state_dict())
    assert names == {"weight", "weight_scale", "weight_scale_2", "input_scale"}
    assert set(LAYERS["fp8"]().state_dict()) == {"weight", "weight_scale", "bias"}


@pytest.mark.parametrize("sizes", [[5, 0, 12, 1], [0, 0, 18, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("weighted", [False, True])
def test_experts(sizes, weighted):
    num, size, width = 4, 48, 32
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    up = NVFP4Weight.from_tensors([nk.quantize(drawn(width, size, seed=e)) for e in range(num)])
    down = FP8Weight.from_tensors(fp8_codes(num, size, width), torch.rand(num) + 0.1)
    x, weights = drawn(sum(sizes), size, seed=9).requires_grad_(), torch.rand(sum(sizes)) if weighted else None
    y = QuantizedExperts(up, down)(x, offsets, weights)
    assert y.shape == (sum(sizes), size)
    plain = Experts(num, size, width)
    with torch.no_grad():
        plain.up_proj.copy_(up.dequantize())
        plain.down_proj.copy_(down.dequantize())
    for e in range(num):
        torch.testing.assert_close(up.dequantize()[e].double(), decoded(up, e), rtol=1e-7, atol=0)
    torch.testing.assert_close(y, plain(x, offsets, weights).detach(), rtol=1e-4, atol=1e-2)
    dy = drawn(sum(sizes), size, seed=10)
    (dx,) = torch.autograd.grad(y, x, dy)
    of_expert = torch.arange(num).repeat_interleave(torch.tensor(sizes))
    for row, e in enumerate(of_expert.tolist()):
        token = x[row].detach().double().requires_grad_()
        hidden = (decoded(up, e) @ token).relu() ** 2 * (weights[row].double() if weighted else 1)
        wanted = decoded(down, e) @ hidden
        assert (y[row].double() - wanted).norm() <= 1e-5 * wanted.norm()
        (gradient,) = torch.autograd.grad(wanted, token, dy[row].double())
        assert (dx[row].double() - gradient).norm() <= 1e-5 * gradient.norm()


def test_experts_gather_tokens():
    """The bits of gathered rows; a token's gradient is the sum of its rows'."""
    up = NVFP4Weight.from_tensors([nk.quantize(drawn(32, 48, seed=e)) for e in range(4)])
    down = FP8Weight.from_tensors(fp8_codes(4, 48, 32), torch.rand(4) + 0.1)
    experts, x = QuantizedExperts(up, down), drawn(9, 48, seed=9)
    routing = nk.route(torch.randn(9, 4), None, 2)
    tokens, weights, dy = routing.order // 2, torch.rand(18), drawn(18, 48, seed=10)
    x.requires_grad_()
    y, wanted = experts(x, routing, weights), experts(x[tokens], routing.offsets, weights)
    assert torch.equal(y, wanted)
    (dx,), (dx_wanted,) = (torch.autograd.grad(out, x, dy) for out in (y, wanted))
    torch.testing.assert_close(dx, dx_wanted, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"x: got shape \[8, 48\]; allowed: \[9, in\], as routed"):
        experts(x[:8], routing)


def test_errors():
    with pytest.raises(ValueError, match="in_features: got 40; allowed: a multiple of 16"):
        NVFP4Weight(40, 16)
    with pytest.raises(ValueError, match="weight: got a rotated form"):
        NVFP4Weight.from_tensors(nk.quantize(drawn(16, 16), hadamard=0x1234))
    with pytest.raises(ValueError, match="bias: got True for experts"):
        FP8Weight(16, 16, bias=True, experts=2)


def test_a_state_dict_with_negative_block_scales_is_refused():
    state = nvfp4_layer(16, 32).state_dict()
    NVFP4Weight(32, 16).load_state_dict(state)
    state["weight_scale"].view(torch.uint8)[3, 1] = 0xB8
    with pytest.raises(RuntimeError, match="weight_scale: got a negative block scale; allowed: 0 to 448, or NaN"):
        NVFP4Weight(32, 16).load_state_dict(state)
