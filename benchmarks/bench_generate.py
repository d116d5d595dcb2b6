"""Reading a prompt of 512 tokens and generating token by token, a random hybrid of 100 M parameters, beside transformers'.

18 layers in the Nemotron 3 pattern, 16 experts of which 4 serve a token. The yardstick is transformers' nemotron_h in bf16 with
its own cache. Ours in bf16, and with the matrices of all but router, embeddings and head in NVFP4 (W4A16).
"""

import dataclasses
import math

import pytest
import torch

from nvfp4_kernels import recipe as recipes
from nvfp4_kernels.generate.engine import Engine
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel

CONFIG = dict(
    hybrid_override_pattern="MEMEM*EMEMEM*EMEME", vocab_size=8192, hidden_size=512, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=64, n_groups=2, chunk_size=64,
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=576, moe_shared_expert_intermediate_size=1024,
    routed_scaling_factor=2.5, torch_dtype="bfloat16", eos_token_id=None,
)  # fmt: skip
PROMPT = 512
RECIPES = {"bf16": recipes.bf16, "nvfp4": dataclasses.replace(recipes.nvfp4, tail=0.0)}
NAMES = [*RECIPES, "transformers"]


class Ours:
    def __init__(self, name, batch):
        torch.manual_seed(0)
        self.batch, self.engine = batch, Engine(HybridModel(HybridConfig(**CONFIG), RECIPES[name]), slots=batch)

    def read(self):
        request = self.engine.add(torch.randint(0, 8192, (PROMPT,)).tolist(), None, 1)
        self.engine.step()
        assert request.finished

    def begin(self):
        for _ in range(self.batch):
            self.engine.add(torch.randint(0, 8192, (32,)).tolist(), None, 100_000)
        self.step()

    def step(self):
        self.engine.step()


class Theirs:
    def __init__(self, name, batch):
        transformers = pytest.importorskip("transformers")
        fields = HybridConfig(**CONFIG).to_dict() | {"time_step_limit": [0.0, math.inf], "use_bias": False}
        fields = {key: value for key, value in fields.items() if key not in ("mamba_proj_bias", "torch_dtype")}
        torch.manual_seed(0)
        config = transformers.NemotronHConfig(**fields)
        self.model, self.batch = transformers.NemotronHForCausalLM(config).eval().bfloat16(), batch

    def read(self):
        self.model(torch.randint(0, 8192, (1, PROMPT)), use_cache=True, logits_to_keep=1)

    def begin(self):
        out = self.model(torch.randint(0, 8192, (self.batch, 32)), use_cache=True)
        self.cache, self.ids = out.cache, out.logits[:, -1:].argmax(-1)

    def step(self):
        self.ids = self.model(self.ids, cache=self.cache, use_cache=True).logits[:, -1:].argmax(-1)


def describe(benchmark, case, name, items):
    theirs = name == "transformers"
    benchmark.extra_info.update(
        op="generate", case=case, backend="transformers" if theirs else "nvfp4_kernels", dtype="bf16" if theirs else name,
        items=items, yardstick=theirs,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prefill(benchmark, name):
    model = (Theirs if name == "transformers" else Ours)(name, 1)
    describe(benchmark, f"100M prefill {PROMPT}", name, PROMPT)
    benchmark.pedantic(model.read, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 8])
@torch.no_grad()
def test_decode(benchmark, batch, name):
    model = (Theirs if name == "transformers" else Ours)(name, batch)
    model.begin()
    describe(benchmark, f"100M decode, batch {batch}", name, batch)
    benchmark.pedantic(model.step, rounds=20, iterations=2, warmup_rounds=3)
