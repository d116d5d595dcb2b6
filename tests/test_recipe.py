"""Recipes as values: tables, rules, switches, refusals."""

import pytest

import nvfp4_kernels as nk
from nvfp4_kernels.recipe import HIGH, MXFP8, NVFP4, get_recipe


def test_the_paper_s_table():
    text = {
        name: str(getattr(NVFP4, name)) for name in ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_dy", "wgrad_x")
    }
    assert text == {
        "fprop_x": "1x16:nearest",
        "fprop_w": "16x16:nearest",
        "dgrad_dy": "1x16:stochastic",
        "dgrad_w": "16x16:nearest",
        "wgrad_dy": "1x16:stochastic:hadamard=d7e8",
        "wgrad_x": "1x16:nearest:hadamard=d7e8",
    }


@pytest.mark.parametrize(
    "module, depth, wanted",
    [
        ("layers.0.mixer.in_proj", 0.01, NVFP4),
        ("layers.0.mixer.out_proj", 0.01, MXFP8),
        ("layers.3.mixer.q_proj", 0.1, HIGH),
        ("layers.3.mixer.fc1_latent_proj", 0.1, HIGH),
        ("layers.3.mixer.experts.up_proj", 0.1, NVFP4),
        ("layers.3.mixer.shared_experts.down_proj", 0.1, NVFP4),
        ("layers.3.mixer.gate", 0.1, HIGH),
        ("layers.51.mixer.out_proj", 0.99, HIGH),
        ("mtp.layers.0.mixer.q_proj", None, HIGH),
        ("layers.0.mixer.in_proj.lora_A.default", 0.01, HIGH),
        ("layers.0.mixer.in_proj.base_layer", 0.01, NVFP4),
        ("lm_head", None, HIGH),
    ],
)
def test_nemotron3_by_module(module, depth, wanted):
    assert nk.recipes.nemotron3.for_module(module, depth) == wanted


def test_super_keeps_the_last_fourteen_layers():
    kept = [
        i
        for i in range(88)
        if not nk.recipes.nemotron3.for_module(f"layers.{i}.mixer.in_proj", (i + 0.5) / 88).quantized
    ]
    assert kept in (list(range(74, 88)), list(range(75, 88)))


def test_switches_are_independent():
    assert (
        NVFP4.switch(two_dimensional=False).fprop_w.block == "1x16"
        and NVFP4.switch(two_dimensional=False).wgrad_x == NVFP4.wgrad_x
    )
    assert NVFP4.switch(hadamard=False).wgrad_dy.hadamard is None and NVFP4.switch(hadamard=False).wgrad_dy.stochastic
    assert not NVFP4.switch(stochastic=False).dgrad_dy.stochastic
    assert NVFP4.switch(four_over_six="mse").fprop_w.four_over_six == "mse"
    assert NVFP4.switch() == NVFP4 and MXFP8.switch(stochastic=True, hadamard=True) == MXFP8
    assert nk.recipes.nemotron3.switch(stochastic=False).for_module("layers.0.mixer.out_proj", 0.0) == MXFP8


def test_refusals():
    with pytest.raises(ValueError, match="wgrad_dy, wgrad_x: got Hadamard signs"):
        nk.LinearRecipe(wgrad_dy=NVFP4.wgrad_dy, wgrad_x=nk.QuantSpec())
    with pytest.raises(ValueError, match="recipe: got 'nvfp5'; allowed: bf16, nvfp4, nemotron3"):
        get_recipe("nvfp5")
    with pytest.raises(TypeError, match="recipe: got int"):
        get_recipe(4)
    assert get_recipe(None).name == "bf16" and get_recipe(NVFP4).for_module("anything") == NVFP4
