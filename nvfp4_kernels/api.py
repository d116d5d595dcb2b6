"""The public names, in the order data flows: formats, ops, recipes, autograd, modules, the model."""

from nvfp4_kernels import recipe as recipes
from nvfp4_kernels.autograd.experts import experts
from nvfp4_kernels.autograd.linear import linear
from nvfp4_kernels.autograd.weight_only import weight_only
from nvfp4_kernels.checkpoint import huggingface as _huggingface  # noqa: F401  (HybridModel.from_pretrained)
from nvfp4_kernels.checkpoint.source import CheckpointError
from nvfp4_kernels.formats.layout import swizzle_128x4, unswizzle_128x4
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.formats.signs import random_signs
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.generate.engine import Engine, Event, Request
from nvfp4_kernels.generate.loop import Pace, stream  # and HybridModel.generate
from nvfp4_kernels.generate.sample import Sampling
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.model.presets import preset
from nvfp4_kernels.nn.convert import convert
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.quantized import NVFP4Weight
from nvfp4_kernels.nn.replay import ReplayState
from nvfp4_kernels.ops._dispatch import Refused, backend
from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from nvfp4_kernels.ops.dequantize.op import dequantize
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.gated_rms_norm.op import gated_rms_norm
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.hadamard.op import hadamard
from nvfp4_kernels.ops.matmul.op import matmul
from nvfp4_kernels.ops.permute.op import permute, unpermute
from nvfp4_kernels.ops.quantize.op import quantize, quantize_groups, quantize_pair, quantize_stack
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import Routing, route
from nvfp4_kernels.ops.router_logits.op import router_logits
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.state_update.op import state_update
from nvfp4_kernels.recipe import LinearRecipe, Recipe

__all__ = [
    "QuantSpec",
    "NVFP4Tensor",
    "MXFP8Tensor",
    "PackedNVFP4Tensor",
    "swizzle_128x4",
    "unswizzle_128x4",
    "random_signs",
    "quantize",
    "quantize_groups",
    "quantize_pair",
    "quantize_stack",
    "dequantize",
    "hadamard",
    "matmul",
    "grouped_matmul",
    "causal_conv1d",
    "selective_scan",
    "state_update",
    "gated_rms_norm",
    "relu2",
    "router_logits",
    "route",
    "Routing",
    "permute",
    "unpermute",
    "expert_mlp",
    "backend",
    "Refused",
    "recipes",
    "Recipe",
    "LinearRecipe",
    "linear",
    "weight_only",
    "experts",
    "Linear",
    "NVFP4Weight",
    "ReplayState",
    "convert",
    "HybridConfig",
    "preset",
    "HybridModel",
    "stream",
    "CheckpointError",
    "Engine",
    "Request",
    "Event",
    "Pace",
    "Sampling",
]
