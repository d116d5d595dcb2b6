"""transformers' Mamba-2 models on our kernels: the same logits, gradients and generated tokens as on its own torch path."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from nvfp4_kernels.compat.transformers import MODELS, patch_transformers  # noqa: E402
from nvfp4_kernels.ops import _dispatch  # noqa: E402

WIDE = (0.0, float("inf"))
NEMOTRON = dict(
    vocab_size=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, chunk_size=8, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, time_step_limit=WIDE,
)  # fmt: skip
MAMBA = dict(
    vocab_size=64, hidden_size=32, num_heads=4, head_dim=16, state_size=8, num_hidden_layers=3, n_groups=2, chunk_size=8,
    expand=2, time_step_limit=WIDE, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
MIXER = dict(
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2, mamba_chunk_size=8, mamba_expand=2,
    time_step_limit=WIDE,
)  # fmt: skip
BAMBA = SMALL | MIXER | dict(num_key_value_heads=2, attn_layer_indices=[1])
ZAMBA2 = SMALL | dict(
    num_key_value_heads=4, layers_block_type=["mamba", "hybrid", "mamba"], num_mem_blocks=1, adapter_rank=4,
    n_mamba_heads=4, mamba_headdim=16, mamba_d_state=8, mamba_ngroups=2, chunk_size=8, mamba_expand=2, time_step_limit=WIDE,
)  # fmt: skip
GRANITE = SMALL | MIXER | dict(
    num_key_value_heads=2, layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=48, num_local_experts=4,
    num_experts_per_tok=2,
)  # fmt: skip
FALCON_H1 = SMALL | MIXER | dict(num_key_value_heads=2, num_hidden_layers=2, head_dim=8, mamba_d_ssm=64)
CONFIGS = {
    "nemotron_h": ("nemotron_h", NEMOTRON | dict(hybrid_override_pattern="ME*M-")),
    "nemotron_h one group": (
        "nemotron_h",
        NEMOTRON | dict(hybrid_override_pattern="MM*", n_groups=1, use_conv_bias=False),
    ),
    "nemotron_h latent": ("nemotron_h", NEMOTRON | dict(hybrid_override_pattern="MEME", moe_latent_size=16)),
    "mamba2": ("mamba2", MAMBA),
    "mamba2 odd heads": ("mamba2", MAMBA | dict(num_heads=3, head_dim=16, n_groups=1, hidden_size=24)),
    "bamba": ("bamba", BAMBA),
    "zamba2": ("zamba2", ZAMBA2),
    "granitemoehybrid": ("granitemoehybrid", GRANITE),
    "falcon_h1": ("falcon_h1", FALCON_H1),
}


def build(name):
    kind, fields = CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **fields)).float()
    for parameter in model.parameters():  # fresh norms and D are ones, fresh biases zeros: those would hide mistakes
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def outcome(model, ids):
    """Logits, and the gradient of every parameter, in training mode: the path that fuses the mixer."""
    logits = model(ids, use_cache=False).logits
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients(name, training):
    model = build(name).train(training)
    ids = torch.randint(3, 64, (2, 21))
    expected, gradients = outcome(model, ids)
    with patch_transformers(CONFIGS[name][0]):
        logits, got = outcome(model, ids)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert got.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        error = (got[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-3, (parameter, float(error))


@pytest.mark.parametrize("name", MODELS)
def test_decoding_with_a_cache(name):
    """Prompts of two lengths, the shorter one padded on its left."""
    model = build(name).eval()
    ids, mask = torch.randint(3, 64, (2, 11)), torch.ones(2, 11, dtype=torch.int64)
    ids[0, :4], mask[0, :4] = 0, 0
    options = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(ids, **options)
    with patch_transformers():
        assert torch.equal(model.generate(ids, **options), expected)


def test_the_kernels_are_really_used_and_given_back(monkeypatch):
    calls, scan = [], _dispatch.implementation("selective_scan", "reference")
    plain = scan.run
    monkeypatch.setattr(scan, "run", lambda *arguments: calls.append(1) or plain(*arguments))
    model, ids = build("mamba2").eval(), torch.randint(3, 64, (1, 5))
    with _dispatch.backend("reference"):
        patch = patch_transformers("mamba2")
        model(ids, use_cache=False)
        assert len(calls) == MAMBA["num_hidden_layers"]
        patch.undo()
        model(ids, use_cache=False)
        assert len(calls) == MAMBA["num_hidden_layers"]


def test_unknown_model():
    with pytest.raises(ValueError, match="models: got gpt2; allowed: nemotron_h"):
        patch_transformers("gpt2")
    assert "nemotron_h" in MODELS
