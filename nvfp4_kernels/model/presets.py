"""The named geometries. The three large ones are the published Nemotron 3 models; `small` and `tiny` are for one machine."""

from nvfp4_kernels.model.config import HybridConfig

_NANO = dict(
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688, num_attention_heads=32, mamba_num_heads=64, intermediate_size=1856,
    n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5, initializer_range=0.0173,
)  # fmt: skip
_SUPER = dict(
    hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=4096, num_attention_heads=32, mamba_num_heads=128, intermediate_size=5376,
    n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2688, moe_shared_expert_intermediate_size=5376,
    moe_latent_size=1024, routed_scaling_factor=5.0, initializer_range=0.014,
    num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.3,
)  # fmt: skip
_ULTRA = dict(
    hybrid_override_pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*"
                            "EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=8192, num_attention_heads=64, mamba_num_heads=256, intermediate_size=10240,
    n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=5120, moe_shared_expert_intermediate_size=10240,
    moe_latent_size=2048, routed_scaling_factor=5.0, initializer_range=0.0099,
    num_nextn_predict_layers=1, mtp_loss_scaling_factor=0.1,
)  # fmt: skip
# Bytes are the tokens: 256 values and four specials, since 0, 1 and 2, special in the published models, are bytes here.
_BYTES = dict(vocab_size=260, pad_token_id=256, bos_token_id=257, eos_token_id=258)
_TINY = dict(
    hybrid_override_pattern="MEM*EME", **_BYTES,
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512,
    mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=32, n_groups=1, chunk_size=64,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, moe_shared_expert_intermediate_size=256,
    moe_latent_size=128, routed_scaling_factor=2.5, initializer_range=0.05,
)  # fmt: skip
_SMALL = dict(
    hybrid_override_pattern="MEMEM*EMEMEM*EMEME", **_BYTES,
    hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64, intermediate_size=1024,
    mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=64, n_groups=2, chunk_size=64,
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=384, moe_shared_expert_intermediate_size=768,
    moe_latent_size=256, routed_scaling_factor=2.5,
)  # fmt: skip
PRESETS = {"tiny": _TINY, "small": _SMALL, "nano-30b": _NANO, "super-120b": _SUPER, "ultra-550b": _ULTRA}

# What `nvfp4 train` starts from where the command line says nothing else. Measured for tiny on the bytes of Python's standard
# library, 0.9 M tokens, nats a byte: 1.384 so in bf16, 1.393 in nvfp4; bf16 at lr 1.4e-3 1.383, at 3e-3 1.402, at 5e-3 1.420.
# At 3e-3 with an initializer_range of 0.02: 1.433; with that 1.410 at batch 4 (twice the steps), 1.472 at 4 x 512 tokens.
# small is not tuned.
TRAINING = {
    "tiny": dict(lr=2e-3, batch=8, length=256, steps=500, warmup=30, weight_decay=0.1),
    "small": dict(lr=2e-3, batch=16, length=512, steps=4000, warmup=200, weight_decay=0.1),
}


def preset(name: str, **changes) -> HybridConfig:
    """The config of this name (tiny, small, nano-30b, super-120b, ultra-550b), with the fields that `changes` names changed.

    Raises ValueError for an unknown name or field.
    """
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}; allowed: {', '.join(PRESETS)}")
    return HybridConfig(**PRESETS[name]).replace(**changes)
