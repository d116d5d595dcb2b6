"""causal_conv1d with bias and SiLU, forward and with its backward; GB/s of what must move. Yardstick: torch's grouped conv1d.

The yardstick is what models run without a kernel: the channels' axis moved in front, nn.Conv1d's padding on both sides, the
surplus cut off. x is a piece of each row of a wider matrix, as the mixer's projection leaves it.
"""

import pytest
import torch
import torch.nn.functional as F

from nvfp4_kernels.ops._dispatch import implementation

# (batch, length, channels), width 4: a layer of the tiny model; Mamba-2 layers 1024 wide with one group and, by length, eight
SIZES = ((8, 256, 576), (2, 1024, 2304), *((2, length, 4096) for length in (64, 256, 1024, 4096)))


def plain(x, weight, bias):
    y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_causal_conv1d(benchmark, copy_bandwidth, size, backward, dtype, name):
    torch.manual_seed(0)
    batch, length, channels = size
    x = torch.randn(batch, length, 2 * channels).to(dtype)[..., channels:]
    weight, bias, dy = torch.randn(channels, 4) / 2, torch.randn(channels), torch.randn(size).to(dtype)
    module = implementation("causal_conv1d", "native")
    exact = plain(x.double(), weight.double(), bias.double())
    leaves = [t.detach().requires_grad_(backward) for t in (x, weight.to(dtype), bias.to(dtype))]

    def run():
        if name == "native":
            given = (x, weight, bias, None, None, True)
            y, _ = module.run(*given)
            return (y, module.backward(dy, None, *given)) if backward else (y,)
        y = plain(*leaves)
        return (y, torch.autograd.grad(y, leaves, dy)) if backward else (y,)

    assert (run()[0].double() - exact).norm() < 1e-2 * exact.norm()
    benchmark.extra_info.update(
        op="causal_conv1d",
        case=f"{'forward and backward' if backward else 'forward'} {'x'.join(map(str, size))}",
        series=f"{'forward and backward' if backward else 'forward'}, {channels} channels",
        size=batch * length,
        axis="tokens",
        backend=name,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        bytes=(5 if backward else 2) * dy.nbytes,  # x, y; then x, dy, dx
        limit_bytes=copy_bandwidth,
        yardstick=name == "torch",
    )
    benchmark.pedantic(run, rounds=5 if name == "torch" else 15, warmup_rounds=1)
