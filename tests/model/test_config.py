"""HybridConfig: the fields of config.json, what they may be, and the published geometries."""

import json
import math

import pytest
import torch

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.model.presets import PRESETS, TRAINING, preset

PUBLISHED = {  # parameters without the MTP block, and of it: summed from the geometry of the published checkpoints
    "nano-30b": (31.578e9, 0),
    "super-120b": (120.669e9, 2.94e9),
    "ultra-550b": (549.309e9, 11.2e9),
}


@pytest.fixture
def on_meta(monkeypatch):
    """Shapes without memory. torch.device("meta") knows torch.empty, not what the fixture for all tests puts there."""
    monkeypatch.undo()
    torch.utils._device._device_constructors.cache_clear()
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name, on_meta):
    model = HybridModel(preset(name))
    counts = {True: 0, False: 0}
    for key, parameter in model.named_parameters():
        counts[key.startswith("mtp.")] += parameter.numel()
    total, mtp = PUBLISHED[name]
    assert counts[False] == pytest.approx(total, abs=0.5e6)
    assert counts[True] == pytest.approx(mtp, rel=5e-3)


@pytest.mark.parametrize(
    "name, layers, attention",
    [
        ("nano-30b", "52 23 23 6", [5, 12, 19, 26, 33, 42]),
        ("super-120b", "88 40 40 8", [7, 16, 25, 36, 47, 58, 69, 78]),
        ("ultra-550b", "108 48 48 12", [7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98]),
    ],
)
def test_patterns_are_the_published_ones(name, layers, attention):
    pattern = preset(name).hybrid_override_pattern
    counts = [len(pattern), *(pattern.count(letter) for letter in "ME*")]
    assert counts == [int(n) for n in layers.split()]
    assert [i for i, letter in enumerate(pattern) if letter == "*"] == attention


def test_parameter_names_are_the_published_ones(on_meta):
    names = set(HybridModel(preset("super-120b")).state_dict())
    assert {
        "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight", "backbone.layers.0.norm.weight",
        "backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.conv1d.weight",
        "backbone.layers.0.mixer.conv1d.bias",
        "backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D", "backbone.layers.0.mixer.dt_bias",
        "backbone.layers.0.mixer.norm.weight", "backbone.layers.0.mixer.out_proj.weight",
        "backbone.layers.1.mixer.gate.weight", "backbone.layers.1.mixer.gate.e_score_correction_bias",
        "backbone.layers.1.mixer.experts.up_proj", "backbone.layers.1.mixer.experts.down_proj",
        "backbone.layers.1.mixer.shared_experts.up_proj.weight", "backbone.layers.1.mixer.shared_experts.down_proj.weight",
        "backbone.layers.1.mixer.fc1_latent_proj.weight", "backbone.layers.1.mixer.fc2_latent_proj.weight",
        "backbone.layers.7.mixer.q_proj.weight", "backbone.layers.7.mixer.o_proj.weight",
        "mtp.layers.0.enorm.weight", "mtp.layers.0.hnorm.weight", "mtp.layers.0.eh_proj.weight", "mtp.layers.0.norm.weight",
        "mtp.layers.0.mixer.k_proj.weight", "mtp.layers.1.norm.weight", "mtp.layers.1.final_layernorm.weight",
        "mtp.layers.1.mixer.experts.up_proj",
    } <= names  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_through_config_json(name, tmp_path):
    config = preset(name, time_step_limit=(0.0, 0.5), router_aux_loss_coef=3e-4)
    config.save(tmp_path)
    assert HybridConfig.load(tmp_path) == config
    assert HybridConfig.load(tmp_path / "config.json").to_dict() == config.to_dict()


def test_unknown_fields_are_kept_aside():
    given = preset("tiny").to_dict() | {"use_mamba_kernels": True, "rope_theta": 10000, "auto_map": {"a": "b"}}
    config = HybridConfig.from_dict(given)
    assert config.extra["rope_theta"] == 10000 and config.extra["auto_map"] == {"a": "b"}
    assert json.loads(json.dumps(config.to_dict())) == json.loads(json.dumps(given))


def test_what_is_said_of_quantized_tensors_is_not_the_models():
    """A model built by the config of a quantized checkpoint has none, nor has a checkpoint of it."""
    config = HybridConfig.from_dict(preset("tiny").to_dict() | {"quantization_config": {"quant_method": "modelopt"}})
    assert config == preset("tiny").replace(extra=config.extra) and "quantization_config" not in config.to_dict()


def test_names_of_transformers_are_read():
    config = HybridConfig.from_dict(
        {
            "layers_block_type": ["linear_attention", "moe", "attention", "mlp", "mamba", "full_attention"],
            "norm_eps": 1e-6,
            "dtype": "float32",
            "mamba_d_conv": 3,
            "num_hidden_layers": 6,
            "hidden_size": 64,
            "time_step_limit": [0.0, math.inf],
            "mtp_layers_block_type": ["full_attention", "moe"],
            "use_bias": True,
        }  # fmt: skip
    )
    assert config.hybrid_override_pattern == "ME*-M*" and config.mtp_hybrid_override_pattern == "*E"
    assert config.layer_norm_epsilon == 1e-6 and config.conv_kernel == 3 and config.mamba_proj_bias
    assert config.dtype is torch.float32 and config.time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize(
    "names", [("layer_norm_epsilon", "norm_eps"), ("norm_eps", "layer_norm_epsilon")], ids="-".join
)
def test_of_two_names_for_a_field_the_published_one_counts(names):
    said = {"layer_norm_epsilon": 1e-5, "norm_eps": 1e-6, "mamba_d_conv": 3, "dtype": "float32", "torch_dtype": None}
    config = HybridConfig.from_dict({"hybrid_override_pattern": "M-"} | {name: said[name] for name in (*names, *said)})
    assert (config.layer_norm_epsilon, config.conv_kernel, config.torch_dtype) == (1e-5, 3, "float32")


def test_null_where_nothing_is_set():
    unset = ("num_nextn_predict_layers", "mtp_hybrid_override_pattern", "n_group", "topk_group", "dtype")
    given = {"hybrid_override_pattern": "ME*", "num_attention_heads": 8}
    config = HybridConfig.from_dict(given | dict.fromkeys([*unset, "num_key_value_heads", "moe_latent_size"]))
    assert config == HybridConfig.from_dict(given | {"num_key_value_heads": 8})
    assert config.num_nextn_predict_layers == 0 and config.mtp_hybrid_override_pattern == "*E"


def test_head_dim_by_the_name_of_nemotron_h():
    given = {"hybrid_override_pattern": "M-*", "hidden_size": 256, "attention_head_dim": 32}
    config = HybridConfig.from_dict(given)
    assert config.head_dim == 32 and config.to_dict()["attention_head_dim"] == 32
    assert HybridConfig.from_dict(given | {"head_dim": 64}).head_dim == 64


def test_transformers_reads_what_we_write():
    transformers = pytest.importorskip("transformers")
    config = preset("tiny")
    theirs = transformers.NemotronHConfig(**config.to_dict())
    assert theirs.hybrid_override_pattern == config.hybrid_override_pattern
    assert theirs.moe_latent_size == config.moe_latent_size and theirs.head_dim == config.head_dim


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hybrid_override_pattern="MEX"), r"hybrid_override_pattern: got 'MEX'; allowed: letters M \(mamba\), E"),
        (dict(hybrid_override_pattern=""), "hybrid_override_pattern: got ''"),
        (dict(hybrid_override_pattern=None), "hybrid_override_pattern: got nothing"),
        (dict(num_hidden_layers=9), "num_hidden_layers: got 9; allowed: 7"),
        (dict(mlp_hidden_act="silu"), "mlp_hidden_act: got 'silu'; allowed: 'relu2'"),
        (dict(sliding_window=128), "sliding_window: got 128; allowed: None"),
        (dict(model_type="llama"), "model_type: got 'llama'"),
        (dict(hidden_size=-1), "hidden_size: got -1; allowed: an integer >= 1"),
        (dict(hidden_size="256"), "hidden_size: got '256'"),
        (dict(layer_norm_epsilon="1e-5"), "layer_norm_epsilon: got '1e-5'; allowed: a number >= 0"),
        (dict(routed_scaling_factor=None), "routed_scaling_factor: got None; allowed: a number"),
        (dict(initializer_range=math.nan), "initializer_range: got nan"),
        (dict(num_key_value_heads=3), "num_key_value_heads: got 3; allowed: a divisor"),
        (dict(n_groups=3), "n_groups: got 3; allowed: a divisor"),
        (dict(num_experts_per_tok=9), "num_experts_per_tok: got 9; allowed: at most"),
        (dict(n_group=3), "n_group: got 3; allowed: a divisor"),
        (dict(n_group=2, topk_group=3), "topk_group: got 3; allowed: at most"),
        (dict(conv_kernel=5), "conv_kernel: got 5; allowed: 2, 3, 4"),
        (dict(torch_dtype="int8"), "torch_dtype: got 'int8'; allowed: bfloat16"),
        (dict(time_step_limit=[1.0, 0.5]), "time_step_limit: got"),
        (dict(layers_block_type=["mamba", "conv"]), "layers_block_type: got 'conv'; allowed: mamba"),
        (dict(num_nextn_predict_layers=2), "num_nextn_predict_layers: got 2; allowed: 0, 1"),
    ],
)
def test_errors_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig.from_dict(preset("tiny").to_dict() | change)


def test_a_wrong_name_is_answered_with_near_ones():
    with pytest.raises(ValueError, match="hidden_sise: no such field of HybridConfig; near: hidden_size"):
        preset("tiny", hidden_sise=64)
    with pytest.raises(ValueError, match="preset: got 'huge'; allowed: tiny, small"):
        preset("huge")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_file_that_is_no_config(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: "):
        HybridConfig.load(tmp_path)


def test_tiny_is_about_three_million_and_all_widths_suit_four_bits():
    config = preset("tiny")
    parameters = sum(p.numel() for p in HybridModel(config).parameters())
    assert 2.5e6 < parameters < 3.6e6
    widths = (config.hidden_size, config.mamba_inner_size, config.moe_intermediate_size, config.moe_latent_size)
    assert all(width % 16 == 0 for width in widths)
    assert set(TRAINING) <= set(PRESETS)
