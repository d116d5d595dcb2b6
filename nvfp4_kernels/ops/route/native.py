"""Choice, weights, order and their backward through csrc/route."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._native import check, empty, native, refuses_float


def refuses(logits: Tensor, bias: Tensor | None, *options) -> str | None:
    return refuses_float(logits) or (None if bias is None else refuses_float(bias))


def run(
    logits: Tensor, bias: Tensor | None, top_k: int, scale: float, n_group: int, topk_group: int, normalize: bool
) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    wide, shift = _inputs(logits, bias)
    shapes = (tokens, top_k), (experts + 1,), (tokens, top_k), (tokens * top_k,)
    indices, offsets, inverse, order = (empty(shape, dtype=torch.int64) for shape in shapes)
    weights = empty(tokens, top_k, dtype=torch.float32)
    made = indices, weights, offsets, inverse, order
    sizes, addresses = (tokens, experts, top_k, n_group, topk_group), tuple(x.data_ptr() for x in made)
    status = native.route(wide.data_ptr(), _address(shift), sizes, scale, normalize, addresses, torch.get_num_threads())
    check(status)
    return made


def backward(
    dweights: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scale: float,
    n_group: int,
    topk_group: int,
    normalize: bool,
) -> Tensor:
    """The gradient of the logits; the choice is made again."""
    wide, shift = _inputs(logits, bias)
    dweights, dlogits = dweights.contiguous(), empty(logits.shape, dtype=torch.float32)
    sizes, addresses = (*logits.shape, top_k, n_group, topk_group), (dweights.data_ptr(), dlogits.data_ptr())
    status = native.route_backward(
        wide.data_ptr(), _address(shift), sizes, scale, normalize, *addresses, torch.get_num_threads()
    )
    check(status)
    return dlogits.to(logits.dtype)


def _inputs(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return logits.float().contiguous(), None if bias is None else bias.float().contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
