"""Quantization health against values computed from the format's definition, and what observing covers."""

import math

import pytest
import torch

from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.nn.health import measure, observe, sample_rows

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_exact_values_have_no_noise():
    x = GRID.repeat(16, 2) * torch.tensor([1.0, -1.0]).repeat(8)
    got = measure(x, QuantSpec())
    assert got.decibels == 200.0 and got.clipped == got.flushed == 0.0 and got.non_finite == 0


def test_decibels_by_hand():
    """Blocks of 6 and fifteen 5s: with scale 1 each 5 becomes 4 (the even code), so the noise is 15 a block."""
    x = torch.full((4, 32), 5.0)
    x[:, ::16] = 6.0
    assert measure(x, QuantSpec()).decibels == pytest.approx(10 * math.log10((36 + 15 * 25) / 15), abs=1e-4)


def test_flushed_share_counts_nonzero_values_only():
    x = torch.zeros(2, 16)
    x[:, 0], x[:, 1], x[:, 2] = 6.0, 0.2, -0.01  # below a quarter of the scale: zero
    assert measure(x, QuantSpec()).flushed == pytest.approx(2 / 3)


def test_clipped_where_the_scale_cannot_follow():
    """A block 1.5 times 2^-9 below the largest has a subnormal scale that rounds down by a third."""
    x = torch.full((2, 32), 448.0 * 6)
    x[:, 16:] = 6 * 2**-9 * 1.4
    got = measure(x, QuantSpec())
    assert got.clipped == pytest.approx(0.5)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("16x16"),
        QuantSpec("1x32"),
        QuantSpec("1x16", "stochastic"),
        QuantSpec("1x16", "nearest", 0xD7E8),
        QuantSpec(four_over_six="mae"),
    ],
)
def test_ordinary_values_in_every_format(spec):
    torch.manual_seed(0)
    got = measure(torch.randn(100, 60).bfloat16(), spec)
    low, high = (25, 45) if spec.block == "1x32" else (12, 25)
    assert low < got.decibels < high and got.clipped == 0 and 0 <= got.flushed < 0.2


def test_non_finite_and_zero():
    x = torch.ones(4, 16)
    x[1, 2], x[3, 4] = math.nan, math.inf
    assert measure(x, QuantSpec()).non_finite == 2 and measure(x, QuantSpec()).decibels is None
    assert measure(torch.zeros(4, 16), QuantSpec()).decibels is None


def test_sample_holds_the_largest_value_in_whole_groups():
    x = torch.randn(1000, 8)
    x[777, 3] = -9
    got = sample_rows(x, 64)
    assert got.shape[0] <= 96 and got.min() == -9
    assert measure(x, QuantSpec(), 64).decibels == pytest.approx(measure(x, QuantSpec(), 1000).decibels, abs=1.5)


def test_observe_covers_every_operand_once_and_lets_go(make_trainer):
    trainer = make_trainer()
    batch = next(trainer.data)
    with observe(trainer.model) as health:
        trainer.model.loss(batch.ids, batch.labels).total.backward()
    layers = [f"layers.{i}.1" for i in range(3)]
    assert set(health.operands) == {(layer, operand) for layer in layers for operand in ("x", "w", "dy")}
    assert all(10 < h.decibels < 40 for h in health.operands.values())
    layer, operand, decibels = health.worst()
    assert decibels == min(h.decibels for h in health.operands.values()) and layer in layers and operand in "x w dy"
    assert health.summary()["worst_db"] == decibels
    assert not any(m._forward_hooks for m in trainer.model.modules())


def test_nothing_quantized_gives_nothing(make_trainer):
    trainer = make_trainer(quantized=False)
    with observe(trainer.model) as health:
        trainer.accumulate_gradients([next(trainer.data)])
    assert health.worst() is None and health.summary() == {}
