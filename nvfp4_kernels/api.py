"""The public names, in the order data flows: formats, ops, recipes, autograd, modules."""

from nvfp4_kernels import recipe as recipes
from nvfp4_kernels.autograd.linear import linear
from nvfp4_kernels.formats.layout import swizzle_128x4, unswizzle_128x4
from nvfp4_kernels.formats.signs import random_signs
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.nn.convert import convert
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.ops._dispatch import Refused, backend
from nvfp4_kernels.ops.dequantize.op import dequantize
from nvfp4_kernels.ops.hadamard.op import hadamard
from nvfp4_kernels.ops.matmul.op import matmul
from nvfp4_kernels.ops.quantize.op import quantize, quantize_pair
from nvfp4_kernels.recipe import LinearRecipe, Recipe

__all__ = [
    "QuantSpec",
    "NVFP4Tensor",
    "MXFP8Tensor",
    "swizzle_128x4",
    "unswizzle_128x4",
    "random_signs",
    "quantize",
    "quantize_pair",
    "dequantize",
    "hadamard",
    "matmul",
    "backend",
    "Refused",
    "recipes",
    "Recipe",
    "LinearRecipe",
    "linear",
    "Linear",
    "convert",
]
