"""A small stand-in for the model, so that the loop is tested apart from it: linear layers of ours and a per-token loss."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.recipe import HIGH, NVFP4
from nvfp4_kernels.train.data import Packer
from nvfp4_kernels.train.loop import Trainer
from nvfp4_kernels.train.optimizer import build_optimizer
from nvfp4_kernels.train.schedule import Schedule


class StandIn(nn.Module):
    """Predicts the next token from the current one; counts what the loop calls."""

    def __init__(self, recipe, width=32, vocab=64):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(width), Linear(width, width, recipe=recipe)) for _ in range(3)]
        )
        self.lm_head = Linear(width, vocab)
        self.config = SimpleNamespace(vocab_size=vocab)
        self.bias_updates = 0

    def forward(self, ids, cu_seqlens=None):
        x = self.embed(ids).bfloat16()
        for layer in self.layers:
            x = x + layer[1](layer[0](x.float()).bfloat16())
        return self.lm_head(x)

    def loss(self, ids, labels, cu_seqlens=None):
        logits = self.forward(ids).float()
        lm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        lm = lm / (labels != -100).sum().clamp(min=1)
        return SimpleNamespace(total=lm + 0.0, lm=lm, mtp=None, balance=None)

    def update_router_bias(self):
        self.bias_updates += 1

    def expert_load(self):
        return {"max_violation": 0.5}


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    pass


@pytest.fixture
def make_trainer():
    """make_trainer(quantized=True, seed=0, accumulate=1, ...) -> Trainer over a stand-in and a learnable toy text."""

    def make(quantized=True, seed=0, accumulate=1, batch=2, steps=50, **options):
        torch.manual_seed(seed)
        model = StandIn(NVFP4 if quantized else HIGH)
        ids = (np.arange(6000) * 7 % 61).astype(np.uint8)
        starts = np.arange(0, 6001, 300)
        packer = Packer(ids, np.stack([starts[:-1], starts[1:]], 1), batch, 32, seed)
        return Trainer(model, packer, build_optimizer(model, 1e-2), Schedule(1e-2, steps, 5, 10), accumulate, **options)

    return make


@pytest.fixture
def text(tmp_path):
    """A folder of twenty documents, each longer than the one before."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (5 + i))
    return folder
