"""Weights held packed, as on a CUDA device: once in memory, the same bytes saved, and multiplied where the kernels refuse."""

import copy

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import is_packed
from nvfp4_kernels.formats.packed import unpack
from nvfp4_kernels.generate.weights import ServedLinear, serving
from nvfp4_kernels.nn import quantized
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.nn.quantized import NVFP4Weight, QuantizedExperts
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops.quantize import native as quantize
from tests.formats.test_packed import random_weight

BF16 = torch.bfloat16


@pytest.fixture
def kernels(monkeypatch):
    """As if the CUDA kernels were here; none of these tests gives them what they would multiply."""

    def launched(*launch):
        raise AssertionError(f"launched {launch[:2]}")

    monkeypatch.setattr(_cuda, "_model", launched)
    monkeypatch.setattr(quantize, "refuses", lambda *arguments: "for these tests")


def layer_of(rows=48, cols=96, experts=None, **options):
    w = random_weight(rows, cols) if experts is None else [random_weight(rows, cols) for _ in range(experts)]
    return NVFP4Weight.from_tensors(w, **options)


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)) for name in a
    )


@pytest.mark.parametrize(
    "options",
    [{}, dict(bias=torch.randn(48), input_scale=torch.tensor(0.5)), dict(experts=3, input_scale=torch.ones(3))],
    ids=["bare", "full", "experts"],
)
def test_packing_changes_where_the_bits_lie_and_nothing_else(kernels, options):
    layer = layer_of(**options)
    if "bias" in options:  # as of a projection of keys
        layer.register_buffer("k_scale", torch.tensor(0.25))
    before, plain = {name: t.clone() for name, t in layer.state_dict().items()}, copy.deepcopy(layer)
    layer.pack(BF16)
    names = {name for name, _ in layer.named_buffers()}
    assert layer.is_packed and names - {"input_scale", "k_scale"} == {"packed_codes", "packed_scales", "weight_scale_2"}
    assert same(layer.state_dict(), before) and torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight_scale.view(torch.uint8), plain.weight_scale.view(torch.uint8))
    assert torch.equal(layer.dequantize(), plain.dequantize())
    x, dy, rest = torch.randn(2, 5, 96), torch.randn(2, 5, 48), ()
    if "experts" in options:
        x, dy, rest = x.flatten(0, 1), dy.flatten(0, 1), (torch.tensor([0, 4, 4, 10]),)
        assert all(torch.equal(layer.tensor(e).dequantize(), plain.tensor(e).dequantize()) for e in range(3))
    results = []
    for one in (layer, plain):
        mine = x.clone().requires_grad_()
        one(mine, *rest).backward(dy)
        results.append((one(x, *rest), mine.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    twin = copy.deepcopy(layer)
    assert twin.is_packed and same(twin.state_dict(), before)
    twin.load_state_dict({name: before[name] for name in before} | layer_of(**options).state_dict())
    assert not twin.is_packed and not same(twin.state_dict(), before)
    assert not layer.to("cpu").is_packed and same(layer.state_dict(), before)


def test_what_stays_as_it_is(kernels, monkeypatch):
    layers = layer_of(24), layer_of(), layer_of(24, experts=2)
    for layer, dtype in zip(layers, (BF16, torch.float32, BF16), strict=True):
        layer.pack(dtype)
        assert not layer.is_packed
    layer = layer_of()
    layer.weight_scale.view(torch.uint8)[3, 1] = 128  # -0, which a checkpoint may have
    layer.pack(BF16)
    assert not layer.is_packed
    parts = layer_of(32, 96, experts=2), layer_of(96, 32, experts=2)
    parts[1].weight_scale.view(torch.uint8)[1, 3, 1] = 128
    QuantizedExperts(*parts).pack(BF16)
    assert not parts[0].is_packed and not parts[1].is_packed
    with nk.backend("reference"):
        (other := layer_of()).pack(BF16)
    assert not other.is_packed
    monkeypatch.setattr(_cuda, "_model", None)
    other.pack(BF16)
    assert not other.is_packed


@pytest.mark.parametrize("cols", [96, 250])
def test_served_where_the_kernels_refuse(kernels, cols):
    weight, bias = random_weight(32, cols), torch.randn(32)
    packed = ServedLinear(nk.PackedNVFP4Tensor.pack(weight), bias)
    x = torch.randn(3, 2, cols)
    torch.testing.assert_close(packed(x), x @ weight.dequantize().t() + bias, rtol=1e-5, atol=1e-3)


def test_a_served_model_holds_its_weights_once_and_saves_the_same_files(kernels, tmp_path, monkeypatch):
    config = nk.preset("tiny", hybrid_override_pattern="M-E*", torch_dtype="bfloat16")
    model = nk.HybridModel(config)
    for name, module in list(model.named_modules()):
        if name.endswith(("up_proj", "down_proj", "in_proj")) and hasattr(module, "weight"):
            layer = NVFP4Weight.from_tensors(nk.quantize(module.weight.detach()))
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
        elif isinstance(module, Experts):
            parts = ([nk.quantize(w) for w in stack.detach()] for stack in (module.up_proj, module.down_proj))
            model.get_submodule(name.rpartition(".")[0]).experts = QuantizedExperts(
                *map(NVFP4Weight.from_tensors, parts)
            )
    model.save_pretrained(tmp_path / "a", "modelopt")
    model = nk.HybridModel.from_pretrained(tmp_path / "a")
    served = serving(model)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, NVFP4Weight) and m.is_packed}
    assert {name.rpartition(".")[2] for name in packed} == {"up_proj", "down_proj"}  # the rows of in_proj are no slabs
    assert {layer.experts for layer in packed.values()} == {None, config.n_routed_experts}
    for name, layer in packed.items():
        held = served.get_submodule(name)
        codes = held.packed_codes if layer.experts else held.weight.codes
        assert codes.data_ptr() == layer.packed_codes.data_ptr() and "weight" not in layer._buffers
    at_once = []
    monkeypatch.setattr(quantized, "unpack", lambda *parts: at_once.append(parts) or unpack(*parts))
    model.save_pretrained(tmp_path / "b", "modelopt")
    assert len(at_once) == 2 * len(packed)  # a weight and its scales, however many experts have a part of them
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


def test_weights_that_a_recipe_quantizes_are_packed_too(kernels):
    model = nk.HybridModel(nk.preset("tiny", hybrid_override_pattern="-E", torch_dtype="bfloat16"), "nvfp4")
    served = serving(model)
    experts = served.backbone.layers[1].mixer.experts
    assert experts.up_proj.is_packed and experts.down_proj.is_packed and all(is_packed(s) for s in experts.stacks())
    up = served.backbone.layers[0].mixer.up_proj.weight
    plain = nk.quantize(model.backbone.layers[0].mixer.up_proj.weight.detach(), nk.recipes.nvfp4.default.fprop_w)
    assert isinstance(up, nk.PackedNVFP4Tensor) and torch.equal(up.unpack().codes, plain.codes)
