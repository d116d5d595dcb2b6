"""Searched scales against trying every scale there is, value by value in Python floats; and what a search may never do."""

import numpy as np
import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ptq.scales import best_scales, quantize_fp8, quantize_nvfp4
from tests.drawing import given, hnp, settings, st
from tests.oracles.nvfp4_brute import GRID, POSITIVE, nearest_even


def block_error(block, scale: float) -> float:
    """Squared error of 16 magnitudes rounded to scale * GRID, all of the grid looked at."""
    return sum(min((scale * g - v) ** 2 for g in GRID) for v in block)


def exhaustive(block) -> float:
    return min(block_error(block, scale) for scale in POSITIVE[1:])


# Blocks of one magnitude and of many, from those whose scale underflows to those of the largest one.
magnitudes = st.one_of(
    hnp.arrays(np.float32, 16, elements=st.floats(0, 2688, width=32)),
    hnp.arrays(np.float32, 16, elements=st.floats(0, 1, width=32)),
    st.tuples(
        hnp.arrays(np.float32, 16, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0])),
        st.floats(2**-12, 448, width=32),
    ).map(lambda pair: np.minimum(pair[0] * np.float32(pair[1]), np.float32(2688))),
    st.tuples(
        hnp.arrays(np.float32, 16, elements=st.floats(-4, 4, width=32)), st.integers(-12, 8)
    ).map(lambda pair: np.minimum(np.exp(pair[0]) * np.float32(2.0 ** pair[1]), np.float32(2688)).astype(np.float32)),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(magnitudes)
def test_no_scale_is_better_than_the_one_found(block):
    found, error = best_scales(torch.from_numpy(block)[None])
    wanted = exhaustive(block.astype(np.float64))
    scale = POSITIVE[int(found[0])]
    got = block_error(block.astype(np.float64), scale) if scale else float((block.astype(np.float64) ** 2).sum())
    tiny = 1e-6 * float((block.astype(np.float64) ** 2).sum())  # the search sums in fp32
    assert got <= wanted + tiny
    underflow = 16 * 2.0**-126  # squares below it are nothing in fp32; no scale reaches such values
    assert float(error[0]) == pytest.approx(got, abs=max(tiny, underflow), rel=1e-4)


def test_all_bytes_at_once_against_the_exhaustive_search():
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.arange(60) * 0.3 - 10)[:, None]
    blocks = (torch.randn(60, 16, generator=generator).abs() * spread).clamp(max=2688)
    found, _ = best_scales(blocks)
    for block, byte in zip(blocks.double().numpy(), found.tolist(), strict=True):
        assert block_error(block, POSITIVE[byte]) <= exhaustive(block) * (1 + 1e-5)


weights = st.tuples(
    st.integers(1, 5), st.sampled_from([16, 32, 40, 17]), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 4.0]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
)  # fmt: skip


def draw(rows, cols, seed, tail, scale):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    return x * torch.exp(tail * torch.randn(rows, cols, generator=generator)) * scale


def squared(weight, quantized):
    return (quantized.dequantize().double() - weight.double()).square()


@settings(max_examples=60, deadline=None)
@given(weights)
def test_never_worse_than_the_largest_values_scales(shape):
    weight = draw(*shape)
    largest, searched = quantize_nvfp4(weight), quantize_nvfp4(weight, "mse")
    four_over_six = quantize_nvfp4(weight, "max", "mse")
    total = float(squared(weight, largest).sum())
    assert float(squared(weight, searched).sum()) <= total * (1 + 1e-6)
    assert float(squared(weight, searched).sum()) <= float(squared(weight, four_over_six).sum()) * (1 + 1e-4)
    # And block by block, where the global scale is the same.
    blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 16)).reshape(-1, 16).double()
    same = blocks.abs() / largest.global_scale.double()
    _, error = best_scales(same.float())
    plain = torch.nn.functional.pad(squared(weight, largest), (0, -weight.shape[1] % 16)).reshape(-1, 16).sum(1)
    plain /= largest.global_scale.double() ** 2
    assert (error.double() <= plain * (1 + 1e-4) + 1e-6 * same.square().sum(1)).all()


def test_codes_are_the_nearest_under_the_stored_scales():
    weight = draw(3, 48, 7, 1.0, 0.02)
    q = quantize_nvfp4(weight, "mse")
    codes = torch.stack([q.codes & 15, q.codes >> 4], -1).flatten(1)
    for r in range(3):
        for c in range(48):
            decode = POSITIVE[int(q.scales.view(torch.uint8)[r, c // 16])] * float(q.global_scale)
            value = float(weight[r, c])
            best = min(abs(decode * g - abs(value)) for g in GRID)
            assert abs(decode * GRID[int(codes[r, c]) & 7] - abs(value)) <= best * (1 + 1e-5)
            assert int(codes[r, c]) >> 3 == (value < 0)


def test_max_is_nk_quantize_and_four_over_six_its_option():
    weight = draw(5, 64, 3, 0.0, 0.1)
    for option in (None, "mae", "mse"):
        a, b = quantize_nvfp4(weight, "max", option), nk.quantize(weight, four_over_six=option)
        assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(
            (a.codes, a.scales), (b.codes, b.scales), strict=True
        )) and a.global_scale == b.global_scale  # fmt: skip


def test_search_gains_what_published_recipes_report():
    """On normal values, mean squared error: four over six -16%, the whole sweep -27%."""
    weight = draw(256, 512, 0, 0.0, 0.02)
    error = {k: float(squared(weight, quantize_nvfp4(weight, *k)).sum()) for k in (("max",), ("max", "mse"), ("mse",))}
    assert 0.82 < error["max", "mse"] / error["max",] < 0.86
    assert 0.71 < error["mse",] / error["max",] < 0.75


def test_a_global_scale_with_room_is_found():
    """The block of the largest value wants a larger scale than 448 times amax / (6 * 448): 4 of them are its 6."""
    weight = torch.full((1, 16), 3.0)
    weight[0, 0], weight[0, 1:8] = 4.0, 2.0  # exact with 4 at code 6 (4.0), not with 4 at code 7 (6.0)
    assert squared(weight, quantize_nvfp4(weight)).sum() > 0.1
    assert squared(weight, quantize_nvfp4(weight, "mse")).sum() < 1e-3 * squared(weight, quantize_nvfp4(weight)).sum()


@pytest.mark.parametrize("search", ["max", "mse"])
def test_zeros_and_extremes(search):
    assert not quantize_nvfp4(torch.zeros(4, 32), search).dequantize().any()
    weight = torch.zeros(2, 32)
    weight[0, 3] = 1e38
    assert quantize_nvfp4(weight, search).dequantize()[0, 3] == pytest.approx(1e38, rel=0.07)
    assert torch.isfinite(quantize_nvfp4(torch.full((2, 16), 1e-38), search).dequantize()).all()


def test_fp8_against_the_list_of_all_values():
    weight = draw(7, 19, 5, 1.0, 0.3)
    codes, scale = quantize_fp8(weight)
    assert float(scale) == pytest.approx(float(weight.abs().max()) / 448, rel=1e-6)
    for value, code in zip(weight.flatten().tolist(), codes.view(torch.uint8).flatten().tolist(), strict=True):
        wanted = nearest_even(abs(np.float32(value) / np.float32(scale)), POSITIVE)
        assert code & 127 == wanted and code >> 7 == (value < 0)
    codes, scale = quantize_fp8(torch.zeros(2, 3))
    assert scale == 1 and not codes.float().any()


def test_errors():
    with pytest.raises(ValueError, match="search: got 'best'; allowed: max, mse"):
        quantize_nvfp4(torch.ones(1, 16), "best")
    with pytest.raises(ValueError, match="four_over_six: got 'mae' with search mse; allowed: search max"):
        quantize_nvfp4(torch.ones(1, 16), "mse", "mae")
    for bad in (float("nan"), float("inf")):
        for quantizer in (quantize_nvfp4, quantize_fp8):
            with pytest.raises(ValueError, match="weight: got NaN or infinity"):
                quantizer(torch.tensor([[bad] + [1.0] * 15]))
