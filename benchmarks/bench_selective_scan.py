"""selective_scan, forward and with its backward. Yardstick: the four steps of Mamba-2's listing (arXiv 2405.21060) in torch.

The yardstick takes the operands of its products in bf16 or in fp32, whichever is faster at a size; steps and decays are fp32.
Operations counted: those between tokens and states alone, 4 head_dim x state a token and head forward, 10 more backward,
which no chunk size changes. The limit is torch's rate of square products in the dtype.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from nvfp4_kernels.ops._dispatch import implementation

# (batch, length, heads, head_dim, groups, state, chunk_size): a layer of the tiny model; layers 1024 wide with one
# group and, by length, eight
WIDE = (32, 64, 8, 128, 128)
SIZES = (
    (8, 256, 8, 64, 1, 32, 64),
    (2, 1024, 32, 64, 1, 128, 128),
    *((2, length, *WIDE) for length in (128, 256, 512, 1024, 2048)),
)
BACKENDS = {
    "native": torch.bfloat16,
    "native fp32": torch.float32,
    "torch with bf16 products": torch.bfloat16,
    "torch with fp32 products": torch.bfloat16,
}


def inputs(batch, length, heads, head_dim, groups, state, dtype):
    torch.manual_seed(0)
    return (
        torch.randn(batch, length, heads, head_dim).to(dtype),
        (torch.randn(batch, length, heads) - 4).to(dtype),
        -torch.rand(heads) * 15 - 1,
        torch.randn(batch, length, groups, state).to(dtype),
        torch.randn(batch, length, groups, state).to(dtype),
        torch.randn(heads),
        torch.randn(heads),
    )


def listing(x, dt, A, B, C, D, dt_bias, chunk_size, narrow):
    """Lengths that chunk_size divides. b batch, c chunks, q tokens, g groups, h heads of a group, p head_dim, n state."""
    groups = B.shape[2]
    step = F.softplus(dt.float() + dt_bias)
    cut = (step * A).unflatten(1, (-1, chunk_size)).unflatten(3, (groups, -1)).movedim(2, -1)  # [b, c, g, h, q]
    decay = cut.cumsum(-1)
    weighted = (x * step[..., None]).to(narrow).unflatten(1, (-1, chunk_size)).unflatten(3, (groups, -1))
    B, C = (t.to(narrow).unflatten(1, (-1, chunk_size)) for t in (B, C))
    scores = torch.einsum("bcqgn,bcsgn->bcgqs", C, B)[:, :, :, None]
    seen = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~seen, -math.inf).exp()
    within = torch.einsum("bcghqs,bcsghp->bcqghp", (between * scores).to(narrow), weighted)
    onto = (decay[..., -1:] - decay).exp().movedim(-1, 2)[..., None]
    made = torch.einsum("bcqgn,bcqghp->bcghpn", B, (weighted * onto).to(narrow)).float()
    through = decay[..., -1].exp()[..., None, None]
    state, before = torch.zeros_like(made[:, 0]), []
    for c in range(made.shape[1]):
        before.append(state)
        state = through[:, c] * state + made[:, c]
    entered = torch.einsum("bcqgn,bcghpn->bcqghp", C, torch.stack(before, 1).to(narrow))
    y = within + entered * decay.exp().movedim(-1, 2)[..., None]
    return (y.reshape(x.shape) + D[:, None] * x).to(x.dtype)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_scan(benchmark, matmul_rate, fp32_matmul_rate, size, backward, name):
    *sizes, chunk_size = size
    dtype = BACKENDS[name]
    leaves = inputs(*sizes, dtype)
    dy = torch.randn_like(leaves[0])
    options = (None, None, True, 0.0, math.inf, chunk_size)
    module = implementation("selective_scan", "native")
    narrow = torch.bfloat16 if "bf16" in name else torch.float32
    expected = implementation("selective_scan", "reference").run(*leaves, *options)[0].float()
    if name.startswith("torch") and backward:
        leaves = [t.requires_grad_() for t in leaves]

    def run():
        if name.startswith("native"):
            y, _ = module.run(*leaves, *options)
            return (y, module.backward(dy, None, *leaves, *options)) if backward else (y,)
        y = listing(*leaves, chunk_size, narrow)
        return (y, torch.autograd.grad(y, leaves, dy)) if backward else (y,)

    assert (run()[0].float() - expected).norm() < 2e-2 * expected.norm()
    batch, length, heads, head_dim, _, state = sizes
    benchmark.extra_info.update(
        op="selective_scan",
        case=f"{'forward and backward' if backward else 'forward'} {'x'.join(map(str, size))}",
        series=f"{'forward and backward' if backward else 'forward'}, {'x'.join(map(str, size[2:]))}",
        size=batch * length,
        axis="tokens",
        backend=name.split(" ")[0],
        dtype="fp32" if dtype == torch.float32 else "bf16 in fp32" if name.endswith("fp32 products") else "bf16",
        flops=(14 if backward else 4) * batch * length * heads * head_dim * state,
        limit_flops=fp32_matmul_rate if dtype == torch.float32 else matmul_rate,
        yardstick=name.startswith("torch"),
    )
    benchmark.pedantic(run, rounds=5 if name.startswith("torch") else 15, warmup_rounds=1)
