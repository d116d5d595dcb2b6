"""One Mamba-2 layer, forward, forward + backward and a decoded token, beside transformers' mamba2 of the same geometry.

Both are models of the one layer, with a vocabulary too small to count. The yardstick is the faster of transformers' torch path
in fp32 and in bf16 throughout; ours computes in bf16 from fp32 weights in training, as a user trains it.
"""

import pytest
import torch

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel

SIZES = {  # (hidden, heads, groups, state, batch, length), head_dim 64
    "tiny 8x256": (256, 8, 1, 32, 8, 256),
    "1024 wide 2x1024": (1024, 32, 8, 128, 2, 1024),
}


def fields(hidden, heads, groups, state):
    return dict(
        vocab_size=32, hidden_size=hidden, mamba_num_heads=heads, mamba_head_dim=64, n_groups=groups, ssm_state_size=state,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=32, chunk_size=128,
        hybrid_override_pattern="M", time_step_limit=(0.0, float("inf")), n_routed_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
    )  # fmt: skip


def ours(size):
    model = HybridModel(HybridConfig(torch_dtype="bfloat16", **fields(*size)))
    return model, lambda ids: model(ids)


def theirs(size, dtype):
    transformers = pytest.importorskip("transformers")
    hidden, heads, groups, state = size
    config = transformers.Mamba2Config(
        vocab_size=32, hidden_size=hidden, num_heads=heads, head_dim=64, n_groups=groups, state_size=state, chunk_size=128,
        expand=heads * 64 // hidden, num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config).to(dtype)
    return model, lambda ids: model(ids, use_cache=False).logits


BACKENDS = {
    "ours": (lambda size: ours(size), "nvfp4_kernels", "bf16", False),
    "theirs fp32": (lambda size: theirs(size, torch.float32), "transformers", "fp32", True),
    "theirs bf16": (lambda size: theirs(size, torch.bfloat16), "transformers", "bf16", True),
}


def describe(benchmark, case, name, items):
    _, backend, dtype, yardstick = BACKENDS[name]
    benchmark.extra_info.update(op="mamba2", case=case, backend=backend, dtype=dtype, items=items, yardstick=yardstick)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_layer(benchmark, size, backward, name):
    *geometry, batch, length = SIZES[size]
    model, forward = BACKENDS[name][0](geometry)
    ids = torch.randint(0, 32, (batch, length))

    def step():
        if not backward:
            with torch.no_grad():
                return forward(ids)
        model.zero_grad()
        forward(ids).sum().backward()

    model.train(backward)
    describe(benchmark, f"{size} forward{' + backward' if backward else ''}", name, batch * length)
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_decode(benchmark, size, batch, name):
    """The next token, its state at hand."""
    geometry = SIZES[size][:4]
    model, _ = BACKENDS[name][0](geometry)
    model.eval()
    ids = torch.randint(0, 32, (batch, 1))
    if name == "ours":
        model.bfloat16()  # weights too, as a checkpoint is served; the state stays fp32
        state = model.new_state(batch)
        model(torch.randint(0, 32, (batch, 9)), state=state)
        step = lambda: model(ids, state=state)  # noqa: E731
    else:
        cache = model(torch.randint(0, 32, (batch, 9)), use_cache=True).cache
        step = lambda: model(ids, cache=cache, use_cache=True)  # noqa: E731
    describe(benchmark, f"{size.split()[0]} decode, batch {batch}", name, batch)
    benchmark.pedantic(step, rounds=20, iterations=5, warmup_rounds=3)
