"""Beside nvidia-modelopt, where it is installed (pip install '.[interop]'): what it exports is read to the bit, and what we
write it decodes alike.
"""

import pytest
import torch
from safetensors.torch import load_file

import nvfp4_kernels as nk
from nvfp4_kernels.nn.quantized import QuantizedWeight
from tests.oracles.checkpoints import BASE, randomize

transformers = pytest.importorskip("transformers")
quantization = pytest.importorskip("modelopt.torch.quantization")


def export(folder, config_name: str) -> None:
    fields = BASE | dict(hidden_size=64, moe_latent_size=16, mamba_head_dim=16)
    config = transformers.NemotronHConfig(
        **{k: v for k, v in fields.items() if k != "torch_dtype"}, num_hidden_layers=6
    )
    config.architectures = ["NemotronHForCausalLM"]
    model = randomize(transformers.NemotronHForCausalLM(config)).bfloat16()
    for layer in model.model.layers:
        if hasattr(layer.mixer, "gate"):
            layer.mixer.gate.float()  # as transformers keeps it
    ids = torch.randint(0, 96, (4, 24))
    quantization.quantize(model, getattr(quantization, config_name), lambda m: m(ids))
    pytest.importorskip("modelopt.torch.export").export_hf_checkpoint(model, export_dir=folder)


def decoded(tensors: dict, module: str) -> torch.Tensor:
    """By its own code."""
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    weight, scale = tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"]
    if weight.dtype != torch.uint8:
        return FP8QTensor(weight.shape, torch.float32, weight).dequantize(torch.float32, scale=scale)
    shape, double = torch.Size((weight.shape[0], weight.shape[1] * 2)), tensors[f"{module}.weight_scale_2"]
    made = NVFP4QTensor(shape, torch.float32, weight)
    return made.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})


@pytest.mark.parametrize("config_name", ["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
def test_both_ways(config_name, tmp_path):
    export(tmp_path / "theirs", config_name)
    kept = nk.HybridModel.from_pretrained(tmp_path / "theirs")
    assert sum(isinstance(m, QuantizedWeight) for m in kept.modules()) == 2 * 2 + 4 + 2 + 2 * (2 + 2 + 2)
    kept.save_pretrained(tmp_path / "ours", "modelopt", dtype=torch.bfloat16)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        wanted = tensor.float() if name.endswith("correction_bias") else tensor  # which we never narrow
        assert ours[name].dtype == wanted.dtype and torch.equal(ours[name].float(), wanted.float()), name
    plain = nk.HybridModel.from_pretrained(tmp_path / "ours", quantized="dequantize").state_dict()
    modules = [name.removesuffix(".weight_scale") for name in theirs if name.endswith(".weight_scale")]
    assert len(modules) == 4 + 4 + 2 + 2 * (4 + 16)
    for module in modules:
        stem, expert, matrix = module.rsplit(".", 2)
        stacked = stem.endswith(".experts")
        mine = plain[f"{stem}.{matrix}"][int(expert)] if stacked else plain[f"{module}.weight"]
        assert torch.equal(mine, decoded(ours, module)), module
