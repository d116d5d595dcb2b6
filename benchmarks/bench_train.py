"""A training step (forward, backward, AdamW) of the tiny hybrid model, beside transformers' nemotron_h of the same geometry.

Both models get the same batches of random bytes. The yardstick is the faster of transformers' two usual ways on this machine:
fp32 throughout, or fp32 weights under bf16 autocast.
"""

import pytest
import torch

from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.model.presets import preset

BATCH, LENGTH = 8, 256


def batches():
    torch.manual_seed(0)
    while True:
        yield torch.randint(0, 256, (BATCH, LENGTH + 1))


def ours(recipe):
    model = HybridModel(preset("tiny"), recipe).train()
    return model, lambda ids: model.loss(ids[:, :-1], ids[:, 1:]).total


def theirs(autocast):
    transformers = pytest.importorskip("transformers")
    fields = preset("tiny").to_dict() | {"torch_dtype": "float32"}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).float().train()

    def loss(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    return model, loss


CASES = {
    "bf16": (lambda: ours("bf16"), "nvfp4_kernels", False),
    "nvfp4": (lambda: ours("nvfp4"), "nvfp4_kernels", False),
    "nemotron3": (lambda: ours("nemotron3"), "nvfp4_kernels", False),
    "fp32": (lambda: theirs(False), "transformers", True),
    "bf16 autocast": (lambda: theirs(True), "transformers", True),
}


@pytest.mark.parametrize("name", CASES)
def test_train_step(benchmark, name):
    build, backend, yardstick = CASES[name]
    torch.manual_seed(0)
    model, loss = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    source = batches()

    def step():
        optimizer.zero_grad()
        value = loss(next(source))
        value.backward()
        optimizer.step()
        return value.item()

    first = step()
    assert abs(first - 5.56) < 0.6, "a fresh model on random bytes begins near ln 260"
    benchmark.extra_info.update(
        op="train",
        case=f"tiny {BATCH}x{LENGTH}",
        backend=backend,
        dtype=name,
        items=BATCH * LENGTH,
        yardstick=yardstick,
    )
    benchmark.pedantic(step, rounds=6, warmup_rounds=2)
