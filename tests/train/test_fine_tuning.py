"""Runs that start from a checkpoint: from an NVFP4 one, dequantized or kept, whole or in part; resumed; read again."""

from pathlib import Path

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.cli.main import main, parse
from nvfp4_kernels.cli.train import settings_of
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.quantized import NVFP4Weight, QuantizedExperts, QuantizedWeight
from nvfp4_kernels.train import run as runs
from nvfp4_kernels.train.progress import read_metrics
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import load_run

pytest.importorskip("matplotlib")

CONFIG = nk.HybridConfig(
    "ME*", vocab_size=260, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, moe_latent_size=16,
    num_nextn_predict_layers=1, eos_token_id=258, pad_token_id=256, bos_token_id=257,
)  # fmt: skip


def quantize_backbone(model: nk.HybridModel) -> nk.HybridModel:
    """Every linear layer and stack of experts of the backbone in NVFP4."""
    for name, module in list(model.backbone.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, Linear):
            made = NVFP4Weight.from_tensors(nk.quantize(module.weight.detach()), input_scale=torch.tensor(0.01))
            setattr(model.backbone.get_submodule(parent), leaf, made)
        elif name.endswith(".experts"):
            pair = [
                NVFP4Weight.from_tensors([nk.quantize(w) for w in stack.detach()], input_scale=torch.full((4,), 0.01))
                for stack in (module.up_proj, module.down_proj)
            ]
            setattr(model.backbone.get_submodule(parent), leaf, QuantizedExperts(*pair))
    return model


@pytest.fixture
def settings(tmp_path, text) -> Settings:
    torch.manual_seed(1)
    quantize_backbone(nk.HybridModel(CONFIG)).save_pretrained(tmp_path / "start", "modelopt")
    return Settings(
        from_=str(tmp_path / "start"), data=str(text), batch=2, length=48, steps=24, lr=5e-3, warmup=4, save_every=12,
        validation=0.1, validation_tokens=96, health_every=7, out=str(tmp_path / "run"), threads=1,
    )  # fmt: skip


def bits(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": b.clone()
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
        for part, b in module.named_buffers()
    }


def losses(settings: Settings) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(settings.out) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("recipe", ["nvfp4", "bf16"])
@pytest.mark.parametrize("quantized", ["dequantize", "keep"])
def test_loss_falls(settings, quantized, recipe):
    settings = settings.replace(quantized=quantized, recipe=recipe)
    begin = nk.HybridModel.from_pretrained(settings.from_, torch.float32, quantized=quantized)
    result = runs.train(settings, quiet=True)
    seen = losses(settings)
    assert sum(seen[-4:]) < 0.8 * sum(seen[:4])
    assert bits(begin).keys() == bits(result.model).keys() and bool(bits(begin)) == (quantized == "keep")
    for name, before in bits(begin).items():
        assert torch.equal(before.reshape(-1).view(torch.uint8), bits(result.model)[name].reshape(-1).view(torch.uint8))
    moved = [n for n, p in begin.named_parameters() if not torch.equal(p, result.model.get_parameter(n))]
    assert len(moved) > 0.9 * len(list(begin.parameters()))
    model, _, step = load_run(settings.out)
    ids = torch.randint(0, 256, (1, 11))
    assert step == 24 and torch.equal(model(ids), result.model.eval()(ids))
    result.model.save_pretrained(settings.out + "-saved", "modelopt" if quantized == "keep" else "published")
    again = nk.HybridModel.from_pretrained(settings.out + "-saved", recipe=recipe)
    assert torch.equal(again(ids), model(ids))


def test_chosen_parameters_alone(settings):
    settings = settings.replace(quantized="keep", train_only="backbone.layers.*.norm.weight, *.D", steps=12, lr=2e-2)
    begin = nk.HybridModel.from_pretrained(settings.from_, torch.float32)
    result = runs.train(settings, quiet=True)
    moved = {n for n, p in begin.named_parameters() if not torch.equal(p, result.model.get_parameter(n))}
    chosen = {f"backbone.layers.{layer}.norm.weight" for layer in ("0", "1", "2", "0.mixer")}  # * goes over dots
    assert moved == chosen | {"backbone.layers.0.mixer.D"}
    bias = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    assert torch.equal(begin.get_buffer(bias), result.model.get_buffer(bias))
    seen = losses(settings)
    assert sum(seen[-4:]) < sum(seen[:4])


def test_resumed_without_the_checkpoint_it_began_from(settings, tmp_path):
    settings = settings.replace(quantized="keep")
    whole = settings.replace(out=str(tmp_path / "whole"))
    runs.train(whole, quiet=True)
    with runs.Run(settings, quiet=True) as run:
        for _ in range(12):
            run.advance()
    (tmp_path / "start").rename(tmp_path / "gone")
    runs.train(settings, resume=True, quiet=True)
    assert losses(settings) == losses(whole)


def test_what_the_command_line_makes_of_it(settings, tmp_path):
    (tmp_path / "start/tokenizer.json").write_text("{}")
    got = settings_of(parse(["train", "--from", settings.from_]))
    assert (got.from_, got.lr, got.steps) == (settings.from_, 1e-4, 1000) and got.out == "runs/start-nvfp4"
    assert got.tokenizer == settings.from_ + "/tokenizer.json" and got.patterns == ["*"]
    assert settings_of(parse(["train", "--from", settings.from_, "--tokenizer", "bytes"])).tokenizer == "bytes"
    (tmp_path / "start/tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match="tokenizer: .* holds no tokenizer.json; do: copy it there, or give --tokenizer"
    ):
        settings_of(parse(["train", "--from", settings.from_]))
    settings_of(parse(["train", "--from", settings.from_, "--data", "ids.npy"]))  # ids need none
    assert main(["train", "--from", settings.from_, "--config", "x"]) == 2
    assert main(["train", "--from", settings.from_, "--preset", "tiny"]) == 2
    assert main(["train", "--from", str(tmp_path / "none"), "--tokenizer", "bytes", "--out", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()


def test_patterns_that_match_nothing(settings):
    with pytest.raises(ValueError, match="train_only: got 'lm_heed.*', which matches no parameter"):
        runs.train(settings.replace(train_only="lm_heed.*"), quiet=True)
