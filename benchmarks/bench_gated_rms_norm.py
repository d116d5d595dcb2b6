"""gated_rms_norm, forward and with its backward; GB/s of what must move. Yardstick: the formula in plain torch, fp32 inside.

z is a piece of each row of a wider matrix, as the mixer's projection leaves it.
"""

import pytest
import torch
import torch.nn.functional as F

from nvfp4_kernels.ops._dispatch import implementation

# (batch, length, channels, group): a layer of the tiny model; Mamba-2 layers 1024 wide, eight groups and, by length, one
SIZES = ((8, 256, 512, 512), (2, 1024, 2048, 256), *((2, length, 2048, 2048) for length in (64, 256, 1024, 4096)))


def plain(x, z, weight, eps, group_size):
    """As in transformers' MambaRMSNormGated."""
    wide = x.float() * F.silu(z.float())
    groups = wide.unflatten(-1, (-1, group_size))
    normed = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.flatten(-2)).to(x.dtype)


@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with backward"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_gated_rms_norm(benchmark, copy_bandwidth, size, backward, dtype, name):
    torch.manual_seed(0)
    *shape, group_size = size
    x, dy = torch.randn(2, *shape).to(dtype)
    z = torch.randn(*shape[:2], 2 * shape[2]).to(dtype)[..., : shape[2]]
    weight = torch.rand(shape[2]) + 0.5
    module = implementation("gated_rms_norm", "native")
    exact = plain(x.double(), z.double(), weight, 1e-5, group_size)
    leaves = [t.detach().requires_grad_(backward) for t in (x, z, weight)]

    def run():
        if name == "native":
            y = module.run(x, z, weight, 1e-5, group_size, False)
            return (y, module.backward(dy, x, z, weight, 1e-5, group_size, False)) if backward else (y,)
        y = plain(*leaves, 1e-5, group_size)
        return (y, torch.autograd.grad(y, leaves, dy)) if backward else (y,)

    assert (run()[0].double() - exact).norm() < 5e-3 * exact.norm()
    benchmark.extra_info.update(
        op="gated_rms_norm",
        case=f"{'forward and backward' if backward else 'forward'} {'x'.join(map(str, size))}",
        series=f"{'forward and backward' if backward else 'forward'}, {shape[2]} channels, groups of {group_size}",
        size=shape[0] * shape[1],
        axis="tokens",
        backend=name,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        bytes=(8 if backward else 3) * x.nbytes,  # x, z, y; then x, z, dy, dx, dz
        limit_bytes=copy_bandwidth,
        yardstick=name == "torch",
    )
    benchmark.pedantic(run, rounds=5 if name == "torch" else 15, warmup_rounds=1)
