"""Sampling against what it is defined to be: argmax chains, draws from the softmax, top-k, seeds, stops, errors."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nvfp4_kernels.generate.loop import sample
from nvfp4_kernels.generate.sample import choose
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel


class Counter(nn.Module):
    """After token t comes t + 1 for certain, or the logits given; records the contexts it saw."""

    def __init__(self, vocab=10, logits=None):
        super().__init__()
        self.config, self.table, self.seen = SimpleNamespace(vocab_size=vocab), nn.Parameter(torch.zeros(1)), []
        self.logits = logits

    def forward(self, ids):
        self.seen.append(ids.tolist()[0])
        assert not self.training
        rows = torch.nn.functional.one_hot((ids + 1) % 10, 10) * 50.0
        return rows if self.logits is None else self.logits.expand(*ids.shape, -1)


def test_greedy_and_context():
    model = Counter().train()
    heard = []
    assert sample(model, [3], 5, temperature=0, context=2, on_token=heard.append) == [4, 5, 6, 7, 8] == heard
    assert model.seen == [[3], [3, 4], [4, 5], [5, 6], [6, 7]] and model.training
    assert sample(model, [3], 5, stop_ids=[6]) == [4, 5] and sample(model, [3], 0) == []


def test_draws_follow_the_softmax_at_the_temperature():
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        drawn = (
            torch.tensor([choose(logits, temperature, None, generator) for _ in range(4000)]).bincount(minlength=4)
            / 4000
        )
        want = torch.softmax(logits.double() / temperature, 0)
        assert (drawn - want).abs().max() < 4 * (want * (1 - want) / 4000).max().sqrt()


def test_top_k_keeps_the_k_largest_and_their_proportions():
    logits, generator = torch.tensor([0.0, 3.0, 2.0, 2.5]), torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(logits, 1.0, 2, generator) for _ in range(2000)]).bincount(minlength=4) / 2000
    assert drawn[0] == drawn[2] == 0 and abs(drawn[1] - torch.sigmoid(torch.tensor(0.5))) < 0.05
    assert {choose(logits, 5.0, 1, generator) for _ in range(50)} == {1}
    assert choose(logits.bfloat16(), 1.0, 99, generator) in range(4)


def test_seed_fixes_the_text():
    model = Counter(logits=torch.zeros(10))
    one, two, other = (sample(model, [1], 30, 1.0, seed=seed) for seed in (0, 0, 1))
    assert one == two != other


def test_hybrid_model_greedy_equals_forward():
    config = HybridConfig(
        "ME*",
        vocab_size=50,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        mamba_num_heads=2,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    )
    model = HybridModel(config).eval()
    ids = [1, 2, 3]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids])).float()[0, -1].argmax()))
    assert sample(model, [1, 2, 3], 5, temperature=0) == ids[3:]


@pytest.mark.parametrize("arguments, message", [
    (([], 1), "prompt_ids: got none"), (([10], 1), "prompt_ids: got 10; allowed: 0 to 9"), (([-1], 1), "prompt_ids: got -1"),
    (([1], 1, -0.1), "temperature: got -0.1"), (([1], 1, 1.0, 0), "top_k: got 0"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(Counter(), *arguments)
