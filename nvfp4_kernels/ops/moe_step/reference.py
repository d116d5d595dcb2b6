"""The ops behind one another, each matrix outside of the experts a stack of one."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import route
from nvfp4_kernels.ops.router_logits.op import router_logits


def refuses(*arguments) -> str | None:
    return None


@torch.no_grad()
def run(x: Tensor, router: Tensor, bias: Tensor | None, matrices: tuple, choice: tuple) -> Tensor:
    up, down, fc1, fc2, shared_up, shared_down = matrices
    all_rows = torch.tensor([0, len(x)], device=x.device)

    def product(x: Tensor, stack: Stack) -> Tensor:
        return grouped_matmul(x, stack, all_rows, x.dtype)

    inner = x if fc1 is None else product(x, fc1)
    y = expert_mlp(inner, route(router_logits(x, router), bias, *choice), up, down)
    y = y if fc2 is None else product(y, fc2)
    return y if shared_up is None else y + product(relu2(product(x, shared_up)), shared_down)
