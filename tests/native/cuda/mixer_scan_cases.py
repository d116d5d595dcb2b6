"""mixer_scan in CUDA, on the host model, against the recurrence that test_mixer_scan writes out in float64."""

import functools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.mixer_scan import _cuda
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan
from tests.ops.test_mixer_scan import inputs, recurrence

GATES = 1.2 * 5.0e-3, 0.0, 1.2 * 3.2e-3  # of y, the convolution's state, the scan's: those of selective_scan in bf16
drawn = functools.partial(inputs, heads=8, head_dim=64, groups=1, state=128, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("native"):
        yield


def compare(given, bounds=None, **options):
    wanted = recurrence(given, bounds)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    for got, want, gate in zip(mixer_scan(**given, cu_seqlens=cu_seqlens, **options), wanted, GATES, strict=True):
        error = (got.double().view_as(want) - want).norm() / want.norm()
        assert got.isfinite().all() and error <= gate, float(error)


@pytest.mark.parametrize("length, stated", [(1, True), (17, False), (63, True), (64, True), (65, False), (200, True)])
def test_lengths(model, length, stated):
    compare(drawn(1, length, sequences=1 if stated else None))
    assert model.kernels == ["mixer_scan_2x4"]


@pytest.mark.parametrize(
    "in_group, length, most_shared, name",
    [(8, 66, 99 << 10, "1x8"), (16, 66, 227 << 10, "2x8"), (32, 5, 227 << 10, "4x8")],
)
def test_every_kernel(model, monkeypatch, in_group, length, most_shared, name):
    monkeypatch.setattr(_cuda._device, "most_shared", lambda device: most_shared)
    compare(drawn(1, length, heads=in_group, sequences=1))
    assert model.kernels == [f"mixer_scan_{name}"]


def test_warps_that_run_ahead(model):
    """In order, each thread as far as it comes: of barriers within a block none can be missed."""
    model.seed = None
    compare(drawn(1, 66, sequences=1))


def test_packed_sequences_of_two_rows_and_groups():
    """One without tokens, whose states stay; the inputs are tensors of their own."""
    given = drawn(2, 35, heads=16, groups=2, sequences=4) | dict(conv_bias=None)
    given |= {name: given[name].contiguous() for name in ("xBC", "z", "dt")}
    compare(given, [0, 2, 2, 35, 70])


def test_steps_and_decays_at_their_limits():
    given = drawn(1, 66)
    given["dt"][:] = torch.tensor([-100.0, -20, -8, 0, 3, 30, 200, 1e4])
    given["A"] = -torch.tensor([1e4, 1e4, 1.0, 300, 1e4, 1e-3, 1.0, 1e4])
    compare(given)


def test_limits_of_steps_and_eps():
    given, low, high = drawn(1, 5), 0.1, 0.2
    given["norm_weight"] *= 3
    y = mixer_scan(**given, dt_limit=(low, high), eps=0.5)[0]
    with nk.backend("reference"):
        wanted = mixer_scan(**given, dt_limit=(low, high), eps=0.5)[0]
    assert (y.double() - wanted.double()).norm() <= GATES[0] * wanted.double().norm()


def test_rows_one_by_one_and_cut_at_a_chunk():
    """The same bits whatever the batch, and of a sequence in two calls with the states carried over."""
    given = drawn(2, 70, sequences=2)
    whole = mixer_scan(**given)
    tokens, states = ("xBC", "z", "dt"), ("conv_state", "initial_state")
    for row in range(2):
        alone = given | {name: given[name][row : row + 1] for name in tokens + states}
        head = mixer_scan(**alone | {name: alone[name][:, :64] for name in tokens})
        tail = mixer_scan(
            **alone | {name: alone[name][:, 64:] for name in tokens} | dict(zip(states, head[1:], strict=True))
        )
        for got, of_all in zip((torch.cat((head[0], tail[0]), 1), *tail[1:]), whole, strict=True):
            assert torch.equal(got, of_all[row : row + 1])
