"""Initial weights as Megatron-LM gives them to hybrid models.

Matrices are N(0, initializer_range); those that write to the residual stream are divided by sqrt(layers) (hybrid layers have
one mixer each, so sqrt(layers) and not sqrt(2 layers)). A is uniform in [1, 16]; the steps that dt_bias alone would give are
log-uniform in [time_step_min, time_step_max]. Norms and D are 1.
"""

import math

import torch
from torch import nn

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.nn.mamba2 import Mamba2

RESIDUAL = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj", "fc2_latent_proj.weight")


@torch.no_grad()
def initialize(model: nn.Module, config: HybridConfig) -> None:
    """Fill every parameter of `model` from torch's generator. Parameters on the meta device are left alone."""
    std = config.initializer_range
    scaled = std / math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else std
    for name, parameter in model.named_parameters():
        if parameter.is_meta or parameter.dim() < 2 or "conv1d" in name:
            continue
        parameter.normal_(0.0, scaled if name.endswith(RESIDUAL) else std)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, Mamba2) and not module.A_log.is_meta:
            _initialize_mamba(module, config)


def _initialize_mamba(mixer: Mamba2, config: HybridConfig) -> None:
    mixer.conv1d.reset_parameters()
    mixer.A_log.uniform_(1.0, 16.0).log_()
    mixer.D.fill_(1.0)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    step = torch.empty_like(mixer.dt_bias).uniform_(low, high).exp_().clamp_(min=config.time_step_floor)
    mixer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
