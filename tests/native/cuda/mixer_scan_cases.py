"""mixer_scan in CUDA, on the host model, against the recurrence of test_mixer_step written out in float64."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.mixer_scan import _cuda
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan
from tests.ops.test_mixer_step import exact

GATES = 1.2 * 5.0e-3, 0.0, 1.2 * 3.2e-3  # y, the convolution's state, the scan's: as for selective_scan in bf16


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("native"):
        yield


def inputs(batch, length, groups, in_group, sequences=None):
    """As the model has them: pieces of one projection; states of `sequences`."""
    heads = groups * in_group
    inner, channels = heads * 64, heads * 64 + 2 * groups * 128
    projected = torch.randn(batch, length, inner + channels + heads).bfloat16()
    states = {} if sequences is None else dict(
        conv_state=torch.randn(sequences, channels, 3).bfloat16(), initial_state=torch.randn(sequences, heads, 64, 128)
    )  # fmt: skip
    z, xBC, dt = projected.split((inner, channels, heads), -1)
    return dict(
        xBC=xBC, z=z, dt=dt, conv_weight=torch.randn(channels, 4) / 2, conv_bias=torch.randn(channels),
        A=-torch.rand(heads) * 4, D=torch.randn(heads), dt_bias=torch.randn(heads) - 2, norm_weight=torch.randn(inner),
        groups=groups,
    ) | states  # fmt: skip


def oracle(given, bounds=None):
    """y [tokens, channels] of all sequences, one after the other, and their states; bounds: of the tokens of all rows."""
    given, (batch, length, channels) = dict(given), given["xBC"].shape
    heads = len(given["A"])
    bounds = bounds or range(0, batch * length + 1, length)
    parts = (given.pop(name) for name in ("z", "xBC", "dt"))
    projected = torch.cat([t.flatten(0, 1) for t in parts], -1)
    conv_state, state = (given.pop(name, None) for name in ("conv_state", "initial_state"))
    made = []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        windows = torch.zeros(1, channels, 3) if conv_state is None else conv_state[i : i + 1]
        states = torch.zeros(1, heads, 64, 128) if state is None else state[i : i + 1]
        of = dict(projected=projected[None, start:end], windows=windows, states=states)
        made.append(exact(given | of, None))
    y, windows, states = zip(*made, strict=True)
    return torch.cat(y, 1), torch.cat(windows), torch.cat(states)


def compare(got, want):
    for mine, right, gate in zip(got, want, GATES, strict=True):
        error = (mine.double().view_as(right) - right).norm() / right.norm()
        print(float(error)); assert mine.isfinite().all() and error <= gate, float(error)


@pytest.mark.parametrize("length, stated", [(1, True), (17, False), (63, True), (64, True), (65, False), (200, True)])
def test_lengths(model, length, stated):
    given = inputs(1, length, 1, 8, 1 if stated else None)
    compare(mixer_scan(**given), oracle(given))
    assert model.kernels == ["mixer_scan_2x4"]
