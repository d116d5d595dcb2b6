"""Presets against the published module lists, written out here from the checkpoints' own accounts; patterns and errors."""

from collections import Counter

import pytest
import torch

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.model.presets import preset
from nvfp4_kernels.ptq.formats import RECIPES, Target, assign, average_bits, get_recipe, linears, targets

NANO_ATTENTION, NANO_MAMBA_KEPT = (5, 12, 19, 26, 33, 42), (4, 11, 18, 25, 32, 41)


def meta(config: HybridConfig) -> HybridModel:
    with torch.device("meta"):
        return HybridModel(config)


def modules(name: str, recipe: str) -> tuple[dict[str, str], HybridConfig]:
    """format of every linear layer of a published model by its name in the checkpoint, experts one by one."""
    model = meta(preset(name))
    found = targets(model)
    chosen = assign(found, get_recipe(recipe).rules(model.config))
    named = {}
    for target in found:
        stack, _, part = target.name.rpartition(".")
        for e in range(target.linears):
            named[f"{stack}.{e}.{part}" if target.experts else target.name] = chosen[target.name]
    assert Counter(named.values()) == linears(found, chosen)
    return named, model.config


@pytest.mark.parametrize("recipe, form", [("nano-nvfp4", "nvfp4"), ("nano-fp8", "fp8")])
def test_nano_is_all_but_what_its_config_excludes(recipe, form):
    named, _ = modules("nano-30b", recipe)
    excluded = {"lm_head"}
    excluded |= {f"backbone.layers.{i}.mixer.{p}_proj" for i in NANO_ATTENTION for p in "qkvo"}
    excluded |= {f"backbone.layers.{i}.mixer.{p}_proj" for i in NANO_MAMBA_KEPT for p in ("in", "out")}
    assert {name for name, found in named.items() if found == "bf16"} == excluded
    assert Counter(named.values()) == {form: 5968, "bf16": 1 + 24 + 12}


def test_lightning():
    named, _ = modules("nano-30b", "lightning-w4a16")
    assert Counter(named.values()) == {"w4a16": 5935, "fp8": 46, "bf16": 24}
    assert named["lm_head"] == "w4a16"
    assert all(found == "fp8" for name, found in named.items() if name.endswith((".in_proj", ".out_proj")))
    assert {name[-6:] for name, found in named.items() if found == "bf16"} == {f"{p}_proj" for p in "qkvo"}


def test_super_is_the_published_list():
    named, _ = modules("super-120b", "super-nvfp4")
    counts = Counter(named.values())
    assert counts["nvfp4"] == 40961 and counts["fp8"] == 139
    assert counts["nvfp4"] + counts["fp8"] == 41100
    fp8 = {name for name, found in named.items() if found == "fp8"}
    by_part = Counter(name.rpartition(".mixer.")[2] for name in fp8)
    assert by_part == {
        "in_proj": 28, "out_proj": 29, "shared_experts.up_proj": 39, "shared_experts.down_proj": 37,
        "fc1_latent_proj": 3, "fc2_latent_proj": 1, "o_proj": 2,
    }  # fmt: skip
    nvfp4 = {name for name, found in named.items() if found == "nvfp4"}
    assert {name for name in nvfp4 if ".experts." not in name} == {"backbone.layers.1.mixer.shared_experts.down_proj"}
    assert not any(name.startswith("mtp.") or name == "lm_head" for name in fp8 | nvfp4)
    in_bf16 = [n for n, f in named.items() if f == "bf16" and "shared" in n and n.startswith("backbone")]
    assert in_bf16 == [
        f"backbone.layers.{i}.mixer.shared_experts.{p}_proj" for i, p in ((8, "down"), (41, "up"), (76, "down"))
    ]


def test_super_of_another_pattern_is_ultras_rule():
    named, _ = modules("ultra-550b", "super-nvfp4")
    assert Counter(named.values())["nvfp4"] == 48 * 512 * 2
    fp8 = {name.rpartition(".mixer.")[2] for name, found in named.items() if found == "fp8"}
    assert fp8 == {"in_proj", "out_proj", "shared_experts.up_proj", "shared_experts.down_proj"}
    assert Counter(named.values())["fp8"] == 4 * 48


TINY = dict(
    vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
    mamba_num_heads=2, mamba_head_dim=16, ssm_state_size=16, n_groups=1, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, chunk_size=16,
)  # fmt: skip


def tiny(pattern: str, **changes) -> HybridConfig:
    return HybridConfig(hybrid_override_pattern=pattern, **(TINY | changes))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pattern", ["M", "E", "*", "-", "ME*E", "M*-", "*M"])
def test_every_recipe_fits_every_pattern(pattern, recipe):
    config = tiny(pattern, tie_word_embeddings=pattern == "M", num_nextn_predict_layers=int(pattern == "E"))
    found = targets(meta(config))
    chosen = assign(found, get_recipe(recipe).rules(config))
    assert not any(name.startswith("mtp.") and form != "bf16" for name, form in chosen.items())
    assert ("lm_head" in chosen) == (pattern != "M")
    for name, form in chosen.items():
        if name.endswith((".in_proj", ".out_proj")):
            kept = recipe.startswith("nano") and pattern == "M*-"
            assert (form == "bf16") == kept, name


def test_patterns_first_match_wins_and_experts_answer_to_both_names():
    found = targets(meta(tiny("ME*")))
    rules = (("*.experts.*.down_proj", "fp8"), ("*.experts.*", "nvfp4"), ("*.mixer.in_proj", "w4a16"))
    chosen = assign(found, rules)
    assert chosen["backbone.layers.1.mixer.experts.up_proj"] == "nvfp4"
    assert chosen["backbone.layers.1.mixer.experts.down_proj"] == "fp8"
    assert chosen["backbone.layers.0.mixer.in_proj"] == "w4a16"
    assert chosen["backbone.layers.1.mixer.shared_experts.up_proj"] == "bf16" == chosen["lm_head"]
    assert average_bits([Target("a", (2, 3)), Target("b", (1, 2), 3)], {"a": "fp8", "b": "bf16"}) == 12.0


@pytest.mark.parametrize("rules, message", [
    ((("*", "int4"),), r"pattern: got format 'int4' for \*; allowed: nvfp4, w4a16, fp8, bf16"),
    ((("*", "nvpf4"),), "nearest: nvfp4"),
    ((("*.mixer.inproj", "fp8"),), r"pattern: got '\*.mixer.inproj', which matches no layer"),
    ((("backbone.layers.0.mixer.in_porj", "fp8"),), "nearest: backbone.layers.0.mixer.in_proj"),
    ((("*.experts.0.up_proj", "fp8"),), "matches no layer"),
    ((("*.experts.up_proj", "fp8"),), "got fp8, and bf16 for down_proj; allowed: both quantized, or neither"),
])  # fmt: skip
def test_wrong_patterns(rules, message):
    with pytest.raises(ValueError, match=message):
        assign(targets(meta(tiny("ME*"))), rules)


def test_nvfp4_wants_whole_blocks_and_names_the_layer():
    found = targets(meta(tiny("M-", intermediate_size=40)))
    with pytest.raises(
        ValueError, match="backbone.layers.1.mixer.down_proj: got nvfp4 with 40 columns; allowed: fp8 or bf16"
    ):
        assign(found, (("*", "nvfp4"),))
    assert assign(found, (("*.down_proj", "fp8"), ("*", "nvfp4")))["backbone.layers.1.mixer.down_proj"] == "fp8"


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="recipe: got 'nano-nfp4'; allowed: super-nvfp4, .*; nearest: nano-nvfp4"):
        get_recipe("nano-nfp4")
