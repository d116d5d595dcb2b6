"""Inputs rounded as hardware would, against the value-by-value oracle; and only while asked for."""

import numpy as np
import pytest
import torch

from nvfp4_kernels.nn.quantized import QuantizedWeight
from nvfp4_kernels.ptq.activations import fp8, nvfp4, quantized_activations
from nvfp4_kernels.ptq.evaluate import Text
from nvfp4_kernels.ptq.quantize import Plan, quantize_model
from tests.oracles.nvfp4_brute import GRID, POSITIVE, nearest_even


def brute_nvfp4(x: np.ndarray, scale: float) -> np.ndarray:
    y = np.zeros_like(x)
    for r in range(x.shape[0]):
        for b in range(0, x.shape[1], 16):
            block = np.float32(np.abs(x[r, b : b + 16])) / np.float32(scale)
            s = np.float32(POSITIVE[nearest_even(float(block.max() / np.float32(6)), POSITIVE)])
            for j, value in enumerate(block):
                code = 0 if s == 0 else nearest_even(float(value / s), GRID)
                y[r, b + j] = np.sign(x[r, b + j]) * GRID[code] * s * np.float32(scale)
    return y


def test_values_against_the_oracle():
    x = torch.randn(6, 40) * torch.exp(2 * torch.randn(6, 40))
    x[2] = 0
    for divide in (1.0, 3.0):  # the second time the calibration was too small: blocks saturate at 448 * 6
        scale = x.abs().max() / 2688 / divide
        got = nvfp4(x, scale)
        assert np.allclose(got.numpy(), brute_nvfp4(x.numpy(), float(scale)), rtol=1e-5, atol=0)
        assert float(got.abs().max()) == pytest.approx(float(x.abs().max()) / divide, rel=0.05)
        scale = x.abs().max() / 448 / divide
        for value, rounded in zip(x.flatten().tolist(), fp8(x, scale).flatten().tolist(), strict=True):
            wanted = POSITIVE[nearest_even(abs(float(np.float32(value) / np.float32(scale))), POSITIVE)]
            assert abs(rounded) == pytest.approx(wanted * float(scale), rel=1e-6)
            assert rounded * value >= 0
    assert nvfp4(x.bfloat16(), scale).dtype == torch.bfloat16 and nvfp4(x[:0], scale).shape == (0, 40)
    x[1, 3] = float("inf")
    assert nvfp4(x, scale).isnan().all()


def test_every_layer_with_a_scale_and_only_inside(make_model, ids):
    model, rules = make_model("ME*"), (("*.experts.*", "nvfp4"), ("*.in_proj", "fp8"), ("*.o_proj", "w4a16"))
    quantize_model(model, Plan("p", rules), Text(ids, 60, "drawn"), length=16)
    rows = torch.from_numpy(ids[:16])[None]
    seen = {}

    def keep(name):
        return lambda module, args: seen.setdefault(name, []).append(args)

    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    plain = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.enable_grad():  # a layer of experts is then run module by module, outside as inside
        before = model(rows)
        with quantized_activations(model) as count:
            assert count == 3
            for handle in plain:  # once more, behind the rounding
                handle.remove()
            plain = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
            rounded = model(rows)
        assert not torch.equal(rounded, before) and torch.equal(model(rows), before)
    mamba, up = "backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.experts.up_proj"
    (x,), (rounded,), (again,) = seen[mamba]
    assert torch.equal(rounded, fp8(x, layers[mamba].input_scale)) and torch.equal(again, x)
    (tokens, routing), (rounded, offsets), _ = seen[up]
    scales, sizes = layers[up].input_scale, offsets.diff().tolist()
    assert torch.equal(offsets, routing.offsets) and scales.shape == (4,) and sum(size > 0 for size in sizes) > 1
    # The layer before is rounded as well, so that this one's own rounding shows in its rows being what they are rounded to.
    for part, scale in zip(rounded.split(sizes), scales, strict=True):
        assert torch.allclose(part, nvfp4(part, scale), rtol=1e-6)
    plain_up = tokens[routing.order // routing.indices.shape[1]]
    assert plain_up.shape == rounded.shape and not torch.equal(plain_up, rounded)


def test_a_report_tells_of_inputs_only_where_they_have_scales(make_model, ids):
    text = Text(ids, 60, "drawn")
    report = quantize_model(make_model("ME"), Plan("p", (("*.experts.*", "nvfp4"),)), text, text, 16)
    assert report.served.nats not in (report.after.nats, report.before.nats)
    assert report.to_dict()["inputs_quantized_too"]["nats_a_token"] == report.served.nats
    report = quantize_model(make_model("ME"), Plan("p", (("*.experts.*", "w4a16"),)), None, text, 16)
    assert report.served is None and "inputs_quantized_too" not in report.to_dict()
