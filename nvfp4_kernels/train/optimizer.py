"""AdamW on fp32 master weights, of which those of GEMMs and convolutions decay.

Betas .9/.95, eps 1e-8, weight decay .1 as the Nemotron 3 reports. Norms, biases, A_log, D and dt_bias have their own
scale or none, and an embedding row that a batch does not touch would only shrink: none of them decays.
"""

import torch
from torch import nn

from nvfp4_kernels.train.ranks import placed

UNDECAYED = ("bias", "A_log", "D", "dt_bias")


def decays(name: str, parameter: torch.Tensor, embeddings: set[int]) -> bool:
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in UNDECAYED and id(parameter) not in embeddings


def build_optimizer(model: nn.Module, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """Two groups, decayed and not; parameters in the model's order, so that state is matched by name at resume."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    wrong = next((f"{p.dtype} for {name}" for name, p in named if p.dtype != torch.float32), None)
    if wrong:
        raise ValueError(f"model: got {wrong}; allowed: float32 master weights (do: model.float())")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = [
        {"params": [p for n, p in named if decays(n, p, embeddings)], "weight_decay": weight_decay},
        {"params": [p for n, p in named if not decays(n, p, embeddings)], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    options = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8}
    try:
        return torch.optim.AdamW(groups, fused=True, **options)
    except RuntimeError:  # a device without a fused kernel says so here
        return torch.optim.AdamW(groups, foreach=True, **options)


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's tensors as `exp_avg.<parameter name>` and so on: names survive a change of grouping."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"{key}.{names[p]}": value for p, entry in optimizer.state.items() for key, value in entry.items()}


def load_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """On the parameters' devices, where a fused kernel reads the number of steps too."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        if name not in parameters:
            raise ValueError(f"checkpoint: it knows a parameter {name}, this model does not; do: use the run's config")
        p = parameters[name]
        value = value if key == "step" else placed(value, p)
        optimizer.state[p][key] = value.to(p.device, copy=True)
