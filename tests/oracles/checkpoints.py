"""Checkpoints written by hand from the published lists of names, with nothing of the package's own tables in it."""

import json

import torch
from safetensors.torch import save_file

from tests.oracles.nvfp4_brute import GRID, e4m3_value

BASE = dict(
    hybrid_override_pattern="MEM*-E", vocab_size=96, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, intermediate_size=80, mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=16, n_groups=2, chunk_size=8,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48,
    torch_dtype="float32", routed_scaling_factor=2.5, initializer_range=0.1,
)  # fmt: skip
CASES = {
    "plain": {},
    "latent": dict(moe_latent_size=16),
    "groups": dict(n_group=4, topk_group=2),
    "biases": dict(mlp_bias=True, mamba_proj_bias=True, moe_latent_size=16),
    "no-conv-bias": dict(use_conv_bias=False, conv_kernel=3, norm_topk_prob=False, hybrid_override_pattern="E*M"),
    "odd-heads": dict(mamba_head_dim=80, mamba_num_heads=5, n_groups=1, num_attention_heads=9, num_key_value_heads=3),
    "mtp": dict(num_nextn_predict_layers=1, hybrid_override_pattern="*M-E"),
    "mtp-latent": dict(num_nextn_predict_layers=1, moe_latent_size=32, mtp_hybrid_override_pattern="E*", n_routed_experts=4),
}  # fmt: skip


def randomize(model):
    """Every parameter and the routers' bias random, as a start leaves many of them 0 or 1."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def published(model) -> dict[str, torch.Tensor]:
    """The tensors of the published layout: backbone.*, an expert's two matrices apart, mtp.* flat."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("noise"):
            continue
        if name.endswith(("mixer.experts.up_proj", "mixer.experts.down_proj")):
            stem, matrix = name.rsplit(".", 1)
            for e in range(len(tensor)):
                tensors[f"{stem}.{e}.{matrix}.weight"] = tensor[e].clone()
        else:
            tensors[name] = tensor.clone()
    return tensors


def write(folder, config: dict, tensors: dict, shards: int = 1, **files) -> None:
    """config.json, `shards` safetensors files dealt round robin, an index where there are several, further JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = names if shards > 1 else ["model.safetensors"]
    weights = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save_file(
            {n: t.contiguous() for n, t in tensors.items() if weights[n] == file}, folder / file, {"format": "pt"}
        )
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def drawn_nvfp4(rows: int, cols: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Bits drawn at random, as ModelOpt names them: codes, positive finite scales, a global scale."""
    scales = torch.randint(1, 0x7F, (rows, cols // 16), dtype=torch.uint8, generator=generator)
    return {
        "weight": torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator),
        "weight_scale": scales.view(torch.float8_e4m3fn),
        "weight_scale_2": torch.rand((), generator=generator) * 1e-3 + 1e-5,
        "input_scale": torch.rand((), generator=generator) + 1e-3,
    }


def drawn_fp8(rows: int, cols: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    codes = torch.randint(0, 0x7F, (rows, cols), dtype=torch.uint8, generator=generator)
    signs = torch.randint(0, 2, (rows, cols), dtype=torch.uint8, generator=generator) << 7
    return {
        "weight": (codes | signs).view(torch.float8_e4m3fn),
        "weight_scale": torch.rand((), generator=generator) * 1e-3 + 1e-5,
        "input_scale": torch.rand((), generator=generator) + 1e-3,
    }


def decode(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The matrix as ModelOpt decodes it, in float64: the scale of a block is rounded to fp32 before it meets the code."""
    table = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)
    if "weight_scale_2" not in parts:
        return table[parts["weight"].view(torch.uint8).long()] * parts["weight_scale"].double()
    codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).flatten(-2).long()
    values = torch.tensor(GRID + [-g for g in GRID], dtype=torch.float64)[codes]
    scales = table[parts["weight_scale"].view(torch.uint8).long()].repeat_interleave(16, -1)
    return values * (scales * parts["weight_scale_2"].double()).float().double()
