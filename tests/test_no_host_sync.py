"""No op, and no linear layer, asks a GPU for a value or sends it one: what would break a CUDA graph and stall a stream.

Shown without a GPU: what the Triton backends would launch is recorded on tensors of the meta device, which hold no values, and
every function that reads one on the host, or makes one there for a device, is forbidden meanwhile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import nvfp4_kernels as nk
from nvfp4_kernels.nn.moe import Experts, MoE
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts
from nvfp4_kernels.ops import _triton

ROOT = Path(__file__).parent.parent
T = torch.Tensor
READS = {T.item, T.tolist, T.cpu, T.numpy, T.nonzero, T.__bool__, T.__int__, T.__float__, T.__index__, torch.nonzero}
SENDS = {torch.tensor, torch.as_tensor, torch.from_numpy}


class NoHost(TorchFunctionMode):
    """Raises where the host reads a tensor, or makes one of Python numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in READS, f"{function.__name__} reads from a device"
        assert function not in SENDS, f"torch.{function.__name__} sends values to a device"
        return function(*args, **kwargs or {})


def test_it_notices():
    for bad in (
        lambda x: x.item(),
        lambda x: bool(x > 0),
        lambda x: x + torch.tensor(1.0),
        lambda x: int(x),
        lambda x: x.cpu(),
    ):
        with pytest.raises(AssertionError, match="device"), NoHost():
            bad(torch.ones(()))


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
def test_the_triton_backends():
    """In a process of its own, where the kernels are compiled ones."""
    code = """
from benchmarks.resources import cases, launches
from tests.test_no_host_sync import NoHost

for op, name, run in cases():
    with NoHost():
        assert launches(run, 90) and launches(run, 120), (op, name)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


NOISY = nk.QuantSpec("1x16", "stochastic")


@pytest.mark.parametrize("recipe", [nk.recipes.nvfp4.default, nk.recipes.bf16.default, nk.LinearRecipe(*[NOISY] * 6)])
def test_linear(recipe):
    layer = nk.Linear(64, 48, bias=True, recipe=recipe, device="meta")
    x = torch.empty(17, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    dy = torch.empty(17, 48, dtype=torch.bfloat16, device="meta")
    with NoHost():
        y = layer(x)
        grads = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    assert [g.shape for g in grads] == [x.shape, layer.weight.shape, layer.bias.shape]


def test_weight_only():
    weight = nk.NVFP4Tensor(
        torch.empty(48, 32, dtype=torch.uint8, device="meta"),
        torch.empty(48, 4, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty((), device="meta"),
        (48, 64),
    )
    with NoHost():
        y = nk.matmul(torch.empty(1, 64, dtype=torch.bfloat16, device="meta"), weight)
    assert y.shape == (1, 48)


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4", "nemotron3", nk.recipe.MXFP8])
@pytest.mark.parametrize("latent", [None, 32])
def test_mixture_of_experts(recipe, latent):
    """A training step: router, experts, both projections and the balance, forward and backward."""
    recipe = nk.recipe.get_recipe(recipe)
    with torch.device("meta"):
        block = MoE(64, 8, 3, 48, 32, latent)
    for name, module in block.named_modules():
        if isinstance(module, nk.Linear):
            module.recipe = recipe.for_module(f"layers.0.mixer.{name}", 0.0)
        elif isinstance(module, Experts):
            module.recipes = {part: recipe.for_module(f"layers.0.mixer.{name}.{part}", 0.0) for part in module.recipes}
    quantized = block.experts.recipes["up_proj"].quantized
    assert quantized == (recipe.name != "bf16")
    x = torch.empty(2, 17, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with NoHost():
        y, balance = block(x)
        ((y.float() ** 2).mean() + balance.loss).backward()
    for name, p in block.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, name
    assert x.grad.shape == x.shape


def test_a_step_of_the_hybrid_model():
    with torch.device("meta"):
        model = nk.HybridModel(nk.preset("tiny", hybrid_override_pattern="ME*-E"), "nvfp4").train()
    with NoHost():
        logits = model(torch.empty(2, 32, dtype=torch.int64, device="meta"))
        logits.float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", [NVFP4Weight, FP8Weight])
def test_frozen_mixture_of_experts(kind):
    """Gradients reach the router and the input through weights that are kept quantized."""
    with torch.device("meta"):
        block = MoE(64, 8, 3, 48, 32, 32)
        block.experts = QuantizedExperts(kind(32, 48, experts=8), kind(48, 32, experts=8))
        block.fc1_latent_proj, block.fc2_latent_proj = kind(64, 32), kind(32, 64)
    x = torch.empty(2, 17, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with NoHost():
        y, _ = block(x)
        y.float().square().mean().backward()
    assert x.grad.shape == x.shape and block.gate.weight.grad.shape == block.gate.weight.shape
