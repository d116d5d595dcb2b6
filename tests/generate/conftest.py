"""Random models whose next token is not clear from the start, small enough for hundreds of them."""

import pytest
import torch

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel

SMALL = dict(
    vocab_size=40, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=48,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, chunk_size=8, n_routed_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, routed_scaling_factor=2.5,
    initializer_range=0.2, eos_token_id=None,
)  # fmt: skip


@pytest.fixture
def build():
    """build(pattern, seed, **changes): a model in evaluation mode, every parameter random."""

    def make(pattern="ME*M-E", seed=0, dtype="float32", **changes):
        torch.manual_seed(seed)
        model = HybridModel(HybridConfig(pattern, torch_dtype=dtype, **(SMALL | changes))).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                if tensor.is_floating_point() and (tensor.dim() < 2 or "conv1d" in name):
                    tensor.add_(torch.randn_like(tensor) * 0.1)
        return model

    return make


@pytest.fixture
def greedy():
    """greedy(model, ids, tokens): the oracle, the whole context through the model again for each token."""

    @torch.no_grad()
    def rerun(model, ids, tokens):
        ids = list(ids)
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].float().argmax()))
        return ids[-tokens:]

    return rerun
