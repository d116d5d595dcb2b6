"""Stochastic rounding of states by state_update: native as the reference bit for bit, both by the rule in whole numbers."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.state_update.op import state_update
from nvfp4_kernels.ops.state_update.reference import stochastic
from tests.oracles import nvfp4_brute as brute

NARROW = (torch.bfloat16, torch.float16)


def rounding(v, dtype, noise, x=None):
    """v [batch, heads, state] in every row of a state, times x [head_dim], rounded."""
    batch, heads, n = v.shape
    x = torch.ones(1) if x is None else x
    state = torch.zeros(batch, heads, len(x), n, dtype=dtype)
    state_update(
        state,
        x.expand(batch, heads, -1),
        torch.ones(batch, heads),
        torch.zeros(heads),
        v,
        v,
        dt_softplus=False,
        noise=noise,
    )
    return state


def units(dtype, size=4096):
    """Values of all magnitudes, signs and last bits; ends of the range; NaN and Inf."""
    low, high = (-133, 127) if dtype == torch.bfloat16 else (-27, 15)
    v = torch.ldexp(torch.rand(size) + 1, torch.randint(low, high + 1, (size,))) * (torch.rand(size) - 0.5).sign()
    top = torch.finfo(dtype).max
    v[:12] = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, top, -top, 6e-8, -3e-8, 6.1e-5, 1e-40, -1.0])
    return v


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sizes", [(1, 2, 3, 128), (2, 3, 5, 17), (2, 2, 80, 1), (1, 1, 7, 33)], ids=str)
def test_native_rounds_as_the_reference_bit_for_bit(isa, dtype, sizes):
    batch, heads, head_dim, n = sizes
    x = torch.tensor([1.0, -0.5, 2.0])[torch.arange(head_dim) % 3]
    for seed, offset in ((0, 0), (-(1 << 40) - 3, (1 << 33) - 1)):
        noise = torch.tensor([seed, offset])
        v = units(dtype)[torch.randperm(4096)[: batch * heads * n]].view(batch, heads, n)
        with nk.backend("native"):
            got = rounding(v, dtype, noise, x)
        expected = stochastic(x[:, None] * v[:, :, None] + 0.0, dtype, noise, 0)  # a state of +0 makes a sum of -0 +0
        assert torch.equal(got.isnan(), expected.isnan())
        bits = (t.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf).view(torch.int16) for t in (got, expected))
        assert torch.equal(*bits)


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_by_the_rule(backend, dtype):
    """In whole numbers: r is the halfword e % 8 of draw e // 8, and the last place of |v| is cut off |v| + r / 2^16 units."""
    v = torch.tensor([[[1.0, 3.1415927, -1e-3, 65000.0, 2.0**-14, -7.0e4 / 3, 0.1, 6.0e-5 * 2**-9, 1e-7, -3e-6, 0.0]]])
    if (
        dtype == torch.float16
    ):  # 2^-24 is the last place of the small ones; with a last bit of 2^-32 fp32 has all the sum
        v[..., 7:10] = torch.tensor([77, 257, -12345]) * 2.0**-32
    seed, offset = -12345, (9 << 33) + 7
    got = rounding(v, dtype, torch.tensor([seed, offset])).flatten()
    mask, smallest = (1 << 32) - 1, -24 if dtype == torch.float16 else -133
    key = [seed & mask, seed >> 32 & mask]
    for e, value in enumerate(v.flatten().tolist()):
        word = brute.philox([e // 8, 0, offset & mask, offset >> 32], key)[e % 8 // 2]
        r = word >> 16 * (e % 2) & 0xFFFF
        digits = 7 if dtype == torch.bfloat16 else 10
        place = max(math.frexp(abs(value))[1] - 1 - digits, smallest) if value else smallest
        whole = int(abs(value) * 2.0 ** (60 - place)) + (r << 44) >> 60
        assert got[e] == math.copysign(math.ldexp(whole, place), value), (e, value)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.003, -1.001, 0.9999, 3e-5, 4.1e-8, -1.7e-6])
def test_rounding_is_unbiased_and_goes_to_the_two_neighbours(backend, dtype, value):
    v = torch.full((1, 8, 512), value)
    got = rounding(v, dtype, torch.tensor([11, 5])).double().flatten()
    exact = float(v[0, 0, 0])
    near = float(torch.tensor(exact).to(dtype))
    other = float(
        torch.nextafter(
            torch.tensor(near, dtype=dtype), torch.tensor(math.copysign(math.inf, exact - near), dtype=dtype)
        )
    )
    assert set(got.tolist()) == {near, other}
    share = (exact - near) / (other - near)
    assert abs((got == other).double().mean() - share) <= 4 * math.sqrt(share * (1 - share) / 4096)


@pytest.mark.parametrize("dtype", NARROW)
def test_noise_is_a_function_of_seed_and_offset(backend, dtype):
    v = torch.randn(1, 8, 512)
    first = rounding(v, dtype, torch.tensor([3, 4]))
    assert torch.equal(first, rounding(v, dtype, torch.tensor([3, 4])))
    for other in ([3, 5], [4, 4], [3, 4 + (1 << 32)], [3 + (1 << 32), 4]):
        assert not torch.equal(first, rounding(v, dtype, torch.tensor(other)))


@pytest.mark.parametrize("dtype", NARROW)
def test_without_noise_to_nearest(backend, dtype):
    v = units(dtype)[:4000].view(2, 2, 1000)
    got, expected = rounding(v, dtype, None), (v[:, :, None] + 0.0).to(dtype)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))
