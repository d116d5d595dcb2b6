"""Quantizing a whole model: what is stored is what was chosen, its error is told, and nothing else moves."""

import json

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts
from nvfp4_kernels.ptq.apply import apply
from nvfp4_kernels.ptq.evaluate import Text, evaluate
from nvfp4_kernels.ptq.formats import targets
from nvfp4_kernels.ptq.plots import plot_errors
from nvfp4_kernels.ptq.quantize import Plan, quantize_model, tensor_bytes
from nvfp4_kernels.ptq.scales import quantize_fp8, quantize_nvfp4


@pytest.fixture
def text(ids):
    return Text(ids, len(ids) - 1, "drawn")


def test_every_layer_holds_exactly_its_quantized_weight(make_model):
    source, model = make_model("ME*-"), make_model("ME*-")
    found = targets(model)
    chosen = {t.name: "bf16" for t in found} | {
        "backbone.layers.0.mixer.in_proj": "nvfp4", "backbone.layers.0.mixer.out_proj": "fp8",
        "backbone.layers.1.mixer.experts.up_proj": "w4a16", "backbone.layers.1.mixer.experts.down_proj": "fp8",
        "lm_head": "w4a16",
    }  # fmt: skip
    losses = {loss.target.name: loss for loss in apply(model, found, chosen, search="mse")}
    assert list(losses) == [t.name for t in found]
    experts = model.get_submodule("backbone.layers.1.mixer.experts")
    assert isinstance(experts, QuantizedExperts)
    kinds = [(m, type(m)) for m in (experts.up_proj, experts.down_proj, model.lm_head)]
    assert [kind for _, kind in kinds] == [NVFP4Weight, FP8Weight, NVFP4Weight]

    def expected(weight, form):
        if form == "fp8":
            codes, scale = quantize_fp8(weight)
            return codes.double() * scale.double()
        return quantize_nvfp4(weight, "mse").dequantize().double()

    for name, loss in losses.items():
        owner, _, part = name.rpartition(".")
        plain = getattr(source.get_submodule(owner), part) if loss.target.experts else source.get_submodule(name).weight
        plain = plain.detach()
        if chosen[name] == "bf16":
            assert torch.equal(model.get_submodule(name).weight, plain) and loss.relative_error == 0
            continue
        matrices = plain if loss.target.experts else plain[None]
        wanted = torch.stack([expected(matrix, chosen[name]) for matrix in matrices])
        got = model.get_submodule(name).dequantize().double()
        assert torch.allclose(got.view_as(wanted), wanted, rtol=1e-7, atol=0), name
        error = float((wanted - matrices.double()).norm() / matrices.double().norm())
        assert loss.relative_error == pytest.approx(error, rel=1e-5)


def test_input_scales_and_biases_come_along(make_model, text):
    model = make_model("ME*-", mlp_bias=True, mamba_proj_bias=True)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.bias.fill_(0.25)
    report = quantize_model(model, Plan("all", (("backbone.*", "nvfp4"),), kv_cache=True), text, length=16)
    layer = model.backbone.layers[0].mixer.in_proj
    assert isinstance(layer, NVFP4Weight) and (layer.bias == 0.25).all() and layer.input_scale.shape == ()
    assert model.backbone.layers[1].mixer.experts.up_proj.input_scale.shape == (4,)
    attention = model.backbone.layers[2].mixer
    assert attention.k_proj.k_scale > 0 and attention.v_proj.v_scale > 0 and model.kv_cache_algorithm == "FP8"
    assert report.calibration_tokens == 61 and 4.5 < report.bits < 6
    assert "backbone.layers.2.mixer.k_proj.k_scale" in model.state_dict()


def test_report_before_and_after(make_model, text, tmp_path):
    pytest.importorskip("matplotlib")
    model = make_model("ME*-")
    before = evaluate(model, text, 16)
    size = tensor_bytes(model)
    report = quantize_model(model, Plan.of_recipe("nano-nvfp4", model.config), text, text, 16)
    assert report.before.nats == before.nats and report.after.nats == evaluate(model, text, 16).nats != before.nats
    floats = sum(t.numel() * 4 for n, t in make_model("ME*-").state_dict().items() if "noise" not in n)
    assert report.bytes_before == size == floats and report.bytes_after == tensor_bytes(model) < size
    report.save(tmp_path)
    stored = json.loads((tmp_path / "quantization_report.json").read_text())
    assert stored["linears"]["nvfp4"] == 2 + 4 * 2 + 2 + 2 and stored["plan"] == "nano-nvfp4"
    assert stored["after"]["perplexity"] == report.after.perplexity and len(stored["layers"]) == len(report.losses)
    worst = max(row["relative_error"] for row in stored["layers"])
    assert 0.05 < worst < 0.15
    assert plot_errors(report, tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def test_under_a_budget(make_model, text, tmp_path):
    pytest.importorskip("matplotlib")
    finer = []
    for bits in (4.5, 6.0, 9.0, 16.0):
        model = make_model("ME*-")
        report = quantize_model(model, Plan(f"{bits} bits", None, bits), text, text, 16)
        assert report.bits <= bits and report.costs
        finer.append(report)
    assert [r.bits for r in finer] == sorted(r.bits for r in finer) and finer[0].bits == 4.5
    assert not any(x.format != "bf16" for x in finer[-1].losses)
    assert finer[-1].after.nats == finer[-1].before.nats
    plot_errors(finer[1], tmp_path / "errors.png")
    rows = finer[1].to_dict()["sensitivity"]
    assert {row["format"] for row in rows} == {"nvfp4", "fp8", "bf16"} and all(row["divergence"] >= 0 for row in rows)


def test_matrices_that_stay_are_rounded_to_the_models_dtype(make_model, text):
    source, model = (make_model("ME*-", torch_dtype="bfloat16") for _ in range(2))
    report = quantize_model(model, Plan("none", (("lm_head", "bf16"),)), None, text, 16)
    assert report.after.nats == pytest.approx(report.before.nats, rel=1e-3)
    plain = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain[name].to(parameter.dtype)), name
    assert model.lm_head.weight.dtype == model.backbone.embeddings.weight.dtype == torch.bfloat16
    assert model.backbone.layers[1].mixer.experts.up_proj.dtype == torch.bfloat16
    assert model.backbone.layers[1].mixer.gate.weight.dtype == model.backbone.norm_f.weight.dtype == torch.float32
    stored = sum(t.numel() * t.element_size() for n, t in model.state_dict().items() if "noise" not in n)
    assert report.bytes_after == report.bytes_before == stored


@pytest.mark.parametrize("plan, message", [
    (Plan("p", (("*.in_proj", "nvfp4"),)), "calibrate: got no text, and backbone.layers.0.mixer.in_proj=nvfp4; allowed: "),
    (Plan("p", (("*.in_proj", "fp8"),)), "do: --calibrate FILE, or w4a16, which has none"),
    (Plan("p", None, 5.0), "calibrate: got no text for --bits"),
    (Plan("p", (("*.nothing", "w4a16"),)), "matches no layer"),
])  # fmt: skip
def test_errors(plan, message, make_model):
    with pytest.raises(ValueError, match=message):
        quantize_model(make_model("ME*-"), plan)


def test_a_bad_weight_is_named_and_a_quantized_model_refused(make_model):
    model = make_model("ME*-")
    with torch.no_grad():
        model.backbone.layers[1].mixer.experts.down_proj[2, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="backbone.layers.1.mixer.experts.down_proj: weight: got NaN or infinity"):
        quantize_model(model, Plan("p", (("*.experts.*", "w4a16"),)))
    model = make_model("ME*-")
    quantize_model(model, Plan("p", (("*.out_proj", "w4a16"),)))
    with pytest.raises(ValueError, match="model: got backbone.layers.0.mixer.out_proj, quantized already"):
        quantize_model(model, Plan("p", (("*.in_proj", "w4a16"),)))


def test_a_recipe_gives_its_search_unless_told_otherwise(make_model):
    config = make_model("M").config
    assert Plan.of_recipe("super-nvfp4", config).search == "mse"
    lightning = Plan.of_recipe("lightning-w4a16", config)
    assert (lightning.search, lightning.four_over_six) == ("max", "mse")
    other = Plan.of_recipe("lightning-w4a16", config, "mse")
    assert (other.search, other.four_over_six, other.kv_cache) == ("mse", None, True)
    assert Plan.of_recipe("super-nvfp4", config, None, "mae").search == "max"
    assert (
        nk.QuantSpec(four_over_six="mae").four_over_six == Plan.of_recipe("nano-fp8", config, None, "mae").four_over_six
    )
