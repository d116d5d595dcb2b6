"""A small model of every kind of layer, in fp32, so that a hand-worked result is the model's to rounding."""

import numpy as np
import pytest
import torch

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel

CONFIG = dict(
    vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=48,
    mamba_num_heads=2, mamba_head_dim=16, ssm_state_size=16, n_groups=1, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, moe_latent_size=16, chunk_size=16,
    initializer_range=0.3, torch_dtype="float32",
)  # fmt: skip


@pytest.fixture
def make_model():
    """make_model("ME*-", **config fields) -> HybridModel with the same weights each time."""

    def make(pattern="ME*-", **changes) -> HybridModel:
        torch.manual_seed(11)
        return HybridModel(HybridConfig(hybrid_override_pattern=pattern, **(CONFIG | changes))).eval()

    return make


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, 64, 61)


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    pass
