"""Recorded amaxes against what plain torch finds when every layer's input is kept and looked at token by token."""

import numpy as np
import pytest
import torch

from nvfp4_kernels.autograd.experts import sorted_rows
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.ptq.calibrate import Amaxes, calibrate
from nvfp4_kernels.ptq.evaluate import windows


def kept_inputs(model, ids, length):
    """name -> all inputs as rows, name -> all outputs; of experts ("name", e) -> rows."""
    inputs, outputs, handles = {}, {}, []

    def keep(name):
        def hook(module, args, y):
            if isinstance(module, Experts):
                rows, offsets = sorted_rows(*args[:2])
                for e, part in enumerate(rows.split(offsets.diff().tolist())):
                    inputs.setdefault((name, e), []).append(part.double())
            else:
                inputs.setdefault(name, []).append(args[0].flatten(0, -2))
                outputs.setdefault(name, []).append(y.flatten(0, -2))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (Linear, Experts)):
            handles.append(module.register_forward_hook(keep(name)))
    with torch.enable_grad():  # a layer of experts is then run module by module
        for start in range(0, len(ids) - 1, length):
            model(torch.from_numpy(ids[start : min(start + length, len(ids) - 1)])[None])
    for handle in handles:
        handle.remove()
    return tuple({name: torch.cat(parts).detach() for name, parts in found.items()} for found in (inputs, outputs))


def test_a_layer_that_no_token_reached_is_named(make_model, ids):
    amaxes, name = calibrate(make_model("M", num_nextn_predict_layers=1), ids[:5], 1), "mtp.layers.0.mixer.q_proj"
    with pytest.raises(ValueError, match=f"calibrate: got no input of {name}; allowed: windows of 2 tokens at least"):
        amaxes.input_scale(name, "fp8")


def test_amaxes_are_those_of_all_tokens(make_model, ids):
    model = make_model("MEM*-E")
    amaxes = calibrate(model, ids, 16)
    inputs, outputs = kept_inputs(model, ids, 16)
    linears = {name for name in inputs if isinstance(name, str)}
    stacks = {name for name, _ in set(inputs) - linears}
    assert set(amaxes) == linears | {f"{s}.{p}_proj" for s in stacks for p in ("up", "down")} and len(stacks) == 2
    for name in linears:
        assert float(amaxes[name]) == pytest.approx(float(inputs[name].abs().max()), rel=1e-5), name
        assert int(amaxes.tokens[name]) == len(inputs[name])
    for stack in stacks:
        module = model.get_submodule(stack)
        for e in range(4):
            rows = inputs[stack, e]
            assert int(amaxes.tokens[f"{stack}.up_proj"][e]) == len(rows) > 0
            assert float(amaxes[f"{stack}.up_proj"][e]) == pytest.approx(float(rows.abs().max()), rel=1e-5)
            inner = (rows @ module.up_proj[e].detach().double().t()).clamp(min=0).square()
            assert float(amaxes[f"{stack}.down_proj"][e]) == pytest.approx(float(inner.max()), rel=1e-4)
    projections = {"backbone.layers.3.mixer.k_proj", "backbone.layers.3.mixer.v_proj"}
    assert set(amaxes.keys_values) == projections
    for name in projections:
        assert float(amaxes.cache_scale(name)) == pytest.approx(float(outputs[name].abs().max()) / 448, rel=1e-5)


def test_the_model_is_left_as_it_was(make_model, ids):
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, ids, 16)
    assert model.training and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any("stacks" in m.__dict__ for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_input_scales():
    amaxes = Amaxes()
    amaxes.see("a", torch.tensor([[1.0, -3.0], [2.0, 0.0]]))
    amaxes.see("a", torch.tensor([[0.5, 1.0]]))
    assert float(amaxes.input_scale("a", "nvfp4")) == pytest.approx(3 / 2688)
    assert float(amaxes.input_scale("a", "fp8")) == pytest.approx(3 / 448)
    assert amaxes.input_scale("a", "w4a16") is None
    amaxes.see("zeros", torch.zeros(2, 4))
    assert amaxes.input_scale("zeros", "fp8") == 1
    for expert, x in ((0, [[2.0]]), (2, [[-8.0], [1.0]])):
        amaxes.see("stack", torch.tensor(x), 4, expert)
    assert amaxes.input_scale("stack", "fp8").tolist() == pytest.approx([2 / 448, 8 / 448, 8 / 448, 8 / 448])
    assert amaxes.unseen() == {"stack": 2} and amaxes.tokens["stack"].tolist() == [1, 0, 2, 0]


def test_nan_activations_are_named(make_model, ids):
    model = make_model()
    with torch.no_grad():
        model.backbone.layers[2].norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="calibrate: got NaN or infinity as input of backbone.layers.2.mixer.q_proj"):
        calibrate(model, ids, 16)


def test_a_text_shorter_than_a_window(make_model):
    assert calibrate(make_model(), np.array([1, 2, 3]), 2048).tokens["lm_head"] == 2
    assert [rows.shape for rows, _ in windows(np.array([1, 2, 3]), 2, 64)] == [(1, 2)]


def test_the_mtp_block_is_calibrated_too(make_model, ids):
    model = make_model("ME", num_nextn_predict_layers=1)
    amaxes = calibrate(model, ids, 20)
    inside = {name for name in amaxes if name.startswith("mtp.")}
    assert {f"mtp.layers.{i}.mixer.{part}" for i, part in ((0, "q_proj"), (1, "experts.up_proj"))} <= inside
    seen = []
    hook = model.mtp.layers[0].mixer.q_proj.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].abs().max())
    )
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 20):
            row = torch.tensor(ids[start : start + 20])[None]
            if row.shape[1] > 1:
                model.mtp(model.hidden(row)[:, :-1], model.embed(row[:, 1:]))
    hook.remove()
    assert float(amaxes["mtp.layers.0.mixer.q_proj"]) == pytest.approx(float(max(seen)), rel=1e-4)
