"""The whole model against transformers' nemotron_h with the same weights, in fp32."""

import math

import pytest
import torch

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from tests.oracles.checkpoints import BASE, CASES

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.nemotron_h")

CASES = {name: CASES[name] for name in ("plain", "latent", "groups", "biases", "odd-heads")} | {
    "no-conv-bias": dict(use_conv_bias=False, conv_kernel=3, norm_topk_prob=False),
    "head-dim-80": dict(mamba_head_dim=80, n_groups=1, ssm_state_size=48, num_key_value_heads=4),
    "attention-first": dict(hybrid_override_pattern="*ME-", n_routed_experts=4, num_experts_per_tok=1),
}


def pair(**changes):
    """Our model with every parameter random, and theirs with the same weights."""
    torch.manual_seed(0)
    ours = HybridModel(HybridConfig(**(BASE | changes))).eval()
    with torch.no_grad():
        for name, tensor in [*ours.named_parameters(), *ours.named_buffers()]:
            if tensor.is_floating_point() and (tensor.dim() < 2 or "conv1d" in name):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    fields = {k: v for k, v in ours.config.to_dict().items() if k not in ("mamba_proj_bias", "torch_dtype")}
    fields["time_step_limit"] = [0.0, math.inf]
    theirs_config = transformers.NemotronHConfig(**fields, use_bias=ours.config.mamba_proj_bias)
    theirs_config._attn_implementation = "eager"
    theirs = transformers.NemotronHForCausalLM(theirs_config).eval()
    weights = {
        name.replace("backbone.", "model."): value
        for name, value in ours.state_dict().items()
        if not name.endswith("noise")
    }
    theirs.load_state_dict(weights)
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, math.inf)  # its prefill clamps the step, its decoding does not
    return ours, theirs


@pytest.mark.parametrize("length", [1, 17, 40])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, length):
    ours, theirs = pair(**CASES[case])
    ids = torch.randint(0, 96, (2, length))
    with torch.no_grad():
        mine, reference = ours(ids), theirs(ids).logits
    assert reference.std() > 0.1
    torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["plain", "latent", "groups"])
def test_training_gradients_equal_those_of_transformers(case):
    # in training the routing weight stands before down_proj, in transformers after it: equal up to rounding
    ours, theirs = pair(**CASES[case])
    ours.train()
    ids, labels = torch.randint(0, 96, (2, 21)), torch.randint(0, 96, (2, 21))
    loss = torch.nn.functional.cross_entropy(ours(ids).flatten(0, 1), labels.flatten())
    loss.backward()
    torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), labels.flatten()).backward()
    gradients = {name.replace("model.", "backbone.", 1): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = gradients[name]
        error = (parameter.grad - expected).norm() / expected.norm().clamp(min=1e-6)
        assert error < 2e-4, (name, float(error))
