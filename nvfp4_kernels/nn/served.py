"""A mixture of experts at inference in one call where that gives what its parts would: few tokens on a CPU, seen by nobody."""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from nvfp4_kernels.formats.groups import Stack, is_packed
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight
from nvfp4_kernels.ops._check import FLOATS
from nvfp4_kernels.ops._dispatch import candidates, implementation
from nvfp4_kernels.ops._library import ordinary, unobserved
from nvfp4_kernels.ops.moe_step.op import check

MOST_TOKENS = 64


def in_one_call(x: Tensor) -> bool:
    """Whether tokens x [tokens, hidden] may take the one call, as far as they tell; gradients are off where it is so."""
    if not (x.is_cpu and x.shape[0] <= MOST_TOKENS and x.dtype in FLOATS and unobserved(x)):
        return False
    watched = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    if watched or torch.is_autocast_enabled("cpu"):
        return False
    return candidates("moe_step")[0] == "native" and implementation("moe_step", "native").native is not None


def parts(block: nn.Module, dtype: torch.dtype) -> list[Tensor | None] | None:
    """The tensors behind the block: two of the router, three of each of moe_step's matrices. None where a module has hooks or
    another forward, quantizes its activations or is none that is known here: it must then be called by itself."""
    inside = block._modules  # not by attributes, whose search a decoded token would feel
    gate, shared, stacks = inside["gate"], inside.get("shared_experts"), inside["experts"].stacks()
    if stacks is None or watched(gate) or (shared is not None and watched(shared)):
        return None
    found = [gate._parameters["weight"], gate._buffers["e_score_correction_bias"], *stacks[0][:3], *stacks[1][:3]]
    others = (None, None) if shared is None else (shared._modules["up_proj"], shared._modules["down_proj"])
    for layer in (inside.get("fc1_latent_proj"), inside.get("fc2_latent_proj"), *others):
        if layer is None:
            found += None, None, None
        elif watched(layer) or layer._parameters.get("bias") is not None:
            return None
        elif type(layer) is Linear:
            weight = layer._parameters["weight"]
            if layer.recipe.quantized or weight.dtype != dtype:
                return None
            found += weight, None, None
        elif type(layer) in (NVFP4Weight, FP8Weight):
            found += layer.stack()[:3]
        else:
            return None
    return found


def watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def operands(*found: Tensor | None) -> tuple | None:
    """`parts` as the native call takes them; None where it does not."""
    if not all(t is None or (ordinary(t) and t.is_cpu) for t in found):
        return None
    router, bias, *rest = found
    stacks = []
    for i in range(0, 18, 3):
        values, *scales = rest[i : i + 3]
        one = [t if t is None or i < 6 else t[None] for t in (values, *scales)]
        stacks.append(None if values is None else Stack(*one))
    if any(s is not None and (is_packed(s) or s.values.dtype == torch.float64) for s in stacks):
        return None
    return implementation("moe_step", "native").operands(
        router, bias, check(router.shape[1], router.device, router, bias, *stacks)
    )


def call(x: Tensor, block: tuple, choice: tuple) -> Tensor:
    """block: what `operands` gave. choice: the router's options."""
    return implementation("moe_step", "native").call(x, block, choice)
