"""A mixture-of-experts block, forward, forward + backward and a decoded token, beside transformers' nemotron_h block.

The yardstick is the fastest of transformers' experts implementations (eager, grouped_mm, batched_mm), its weights in the same
type. Decoding takes other tokens each time, as a model with many layers does: the same tokens' experts would stay in the cache.
Sizes: preset tiny; a sixteenth of Nano's weights (each width a quarter); and a sixteenth of each of its widths.
"""

import itertools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.nn.moe import MoE
from nvfp4_kernels.nn.quantized import NVFP4Weight, QuantizedExperts
from nvfp4_kernels.recipe import HIGH, NVFP4

SIZES = {  # hidden, experts, top_k, width, width of the shared expert, latent width
    "tiny": (256, 8, 2, 128, 256, 128),
    "Nano / 16": (672, 128, 6, 464, 928, None),
    "Nano's widths / 16": (176, 128, 6, 128, 240, None),
}
THEIRS = ("eager", "grouped_mm", "batched_mm")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def drawn(module, dtype):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return module.to(dtype)


def ours(size, dtype, recipe=HIGH):
    """With a quantized recipe for the experts; their weights are then fp32 parameters, quantized once a step."""
    hidden, experts, top_k, width, shared, latent = size
    block = drawn(MoE(hidden, experts, top_k, width, shared, latent, 2.5), dtype)
    block.gate.float()
    if recipe.quantized:
        block.experts.float()
        block.experts.recipes = {part: recipe for part in block.experts.recipes}
    return block


def with_nvfp4(block):
    stacks = block.experts.up_proj, block.experts.down_proj
    parts = [NVFP4Weight.from_tensors([nk.quantize(w) for w in stack.detach()]) for stack in stacks]
    block.experts = QuantizedExperts(*parts)
    return block


def theirs(size, dtype, implementation):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    hidden, experts, top_k, width, shared, latent = size
    config = transformers.NemotronHConfig(
        hidden_size=hidden, n_routed_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=shared, moe_latent_size=latent, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = implementation
    return drawn(modeling.NemotronHMoE(config), dtype)


def describe(benchmark, case, name, dtype, items):
    backend = "transformers" if name in THEIRS else "nvfp4_kernels"
    benchmark.extra_info.update(
        op="experts",
        case=case,
        backend=backend,
        implementation=name,
        dtype=dtype,
        items=items,
        yardstick=name in THEIRS,
    )


@pytest.mark.parametrize("size", SIZES)
def test_nvfp4_training(benchmark, size):
    """Forward and backward of a step with the experts in the NVFP4 recipe, their weights' forms made anew for each step."""
    block = ours(SIZES[size], torch.bfloat16, NVFP4).train()
    x = torch.randn(8, 256, SIZES[size][0]).bfloat16().requires_grad_()

    def step():
        block.zero_grad()
        block.experts.refresh()
        block(x)[0].sum().backward()

    describe(benchmark, f"{size}, nvfp4, 2048 tokens forward + backward", "ours nvfp4", "nvfp4", 2048)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", ["ours", "eager", "grouped_mm"])  # batched_mm copies a matrix for every slot
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_block(benchmark, size, backward, dtype, name):
    if backward and name == "eager" and size != "tiny":
        pytest.skip("a minute a step: index_add_ over 128 experts keeps 128 gradients of all weights")
    block = ours(SIZES[size], DTYPES[dtype]) if name == "ours" else theirs(SIZES[size], DTYPES[dtype], name)
    x = torch.randn(8, 256, SIZES[size][0]).to(DTYPES[dtype])

    def step():
        if not backward:
            with torch.no_grad():
                return block(x)
        block.zero_grad()
        y = block(x.requires_grad_())
        (y[0] if name == "ours" else y).sum().backward()

    block.train(backward)
    case = f"{size}, {dtype}, 2048 tokens {'forward + backward' if backward else 'forward'}"
    describe(benchmark, case, name, dtype, 2048)
    benchmark.pedantic(step, rounds=51 if size == "tiny" else 7, warmup_rounds=2)


@pytest.mark.parametrize("name", ["ours", "ours nvfp4", *THEIRS])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_decode(benchmark, size, batch, name):
    block = theirs(SIZES[size], torch.bfloat16, name) if name in THEIRS else ours(SIZES[size], torch.bfloat16)
    if name == "ours nvfp4":
        block = with_nvfp4(block)
    block.eval()
    tokens = itertools.cycle(torch.randn(24, batch, 1, SIZES[size][0]).bfloat16())
    describe(benchmark, f"{size} decode, batch {batch}", name, "nvfp4" if "nvfp4" in name else "bf16", batch)
    benchmark.extra_info.update(series=f"{size} decode", size=batch, axis="sequences")
    benchmark.pedantic(lambda: block(next(tokens)), rounds=20, iterations=6, warmup_rounds=2)
