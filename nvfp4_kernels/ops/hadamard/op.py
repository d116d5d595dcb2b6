"""hadamard: the random Hadamard transform on each run of 16."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.formats.signs import sign_mask
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS
from nvfp4_kernels.ops._check import float_tensor, no_grad, require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register


def hadamard(x: Tensor, signs=None) -> Tensor:
    """x' = x @ (diag(signs) H16 / 4) on each 16 values of the last axis; H16 is Sylvester's.

    x: [..., cols], bf16, fp16 or fp32, any strides. signs: None for the recipe's vector, a 16-bit mask (0: no signs) or 16
    values of +1 and -1.
    Returns bf16 [..., ceil16(cols)]: an axis that is no multiple of 16 is padded with zeros, and stays so, since the
    transform mixes them in. Sums in fp32; finite inputs give finite results.
    Raises TypeError or ValueError naming the argument; RuntimeError when x requires grad.
    Source: "Pretraining LLMs with NVFP4", appendix C.
    """
    float_tensor("x", x)
    require(x.dim() >= 1 and x.shape[-1] > 0, "x", f"shape {list(x.shape)}", "a last axis of at least 1")
    no_grad("x", x, "nk.linear differentiates")
    mask = DEFAULT_SIGNS if signs is None else sign_mask(signs)
    y = torch.ops.nvfp4.hadamard(x.reshape(-1, x.shape[-1]), mask)
    return y.view(*x.shape[:-1], y.shape[-1])


def _run(x: Tensor, signs: int) -> Tensor:
    return select("hadamard", x, signs).run(x, signs)


def _fake(x: Tensor, signs: int) -> Tensor:
    return x.new_empty(x.shape[0], ceil_to(x.shape[1], 16), dtype=torch.bfloat16)


register("hadamard(Tensor x, int signs) -> Tensor", _run, _fake)
