"""mixer_scan: the recurrence written out in float64; the bits of its two ops; what it refuses; errors."""

import ctypes
import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.nn.mamba2 import Mamba2
from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.mixer_scan import _cuda
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan
from tests.ops.test_mixer_step import exact

BOUNDS = [0, 11, 11, 50, 74]


def inputs(batch=2, length=37, heads=4, head_dim=16, groups=2, state=12, dtype=torch.float32, sequences=None):
    """As the model has them: xBC, z and dt are pieces of one projection; states of so many sequences."""
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    projected = torch.randn(batch, length, inner + channels + heads).to(dtype)
    z, xBC, dt = projected.split((inner, channels, heads), -1)
    states = {} if sequences is None else dict(
        conv_state=torch.randn(sequences, channels, 3).to(dtype),
        initial_state=torch.randn(sequences, heads, head_dim, state),
    )  # fmt: skip
    return dict(
        xBC=xBC, z=z, dt=dt, conv_weight=torch.randn(channels, 4) / 2, conv_bias=torch.randn(channels),
        A=-torch.rand(heads) * 4, D=torch.randn(heads), dt_bias=torch.randn(heads) - 2, norm_weight=torch.randn(inner),
        groups=groups,
    ) | states  # fmt: skip


def recurrence(given, bounds=None):
    """y [tokens, channels] of all sequences one after the other, and their states; bounds: of the tokens of all rows."""
    (batch, length, channels), inner, heads = given["xBC"].shape, given["z"].shape[2], len(given["A"])
    bounds = bounds or range(0, batch * length + 1, length)
    projected = torch.cat([given[name].flatten(0, 1) for name in ("z", "xBC", "dt")], -1)
    kept = {name: t for name, t in given.items() if name not in ("z", "xBC", "dt", "conv_state", "initial_state")}
    state = (channels - inner) // (2 * given["groups"])
    windows = given.get("conv_state", torch.zeros(len(bounds) - 1, channels, 3))
    states = given.get("initial_state", torch.zeros(len(bounds) - 1, heads, inner // heads, state))
    made = []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        of = dict(projected=projected[None, start:end], windows=windows[i : i + 1], states=states[i : i + 1])
        made.append(exact(kept | of, None))
    y, windows, states = zip(*made, strict=True)
    return torch.cat(y, 1)[0], torch.cat(windows), torch.cat(states)


@pytest.mark.parametrize("packed, biased, stated", [(False, True, False), (False, False, True), (True, True, True)])
def test_against_the_recurrence(backend, packed, biased, stated):
    given = inputs(sequences=(4 if packed else 2) if stated else None) | ({} if biased else dict(conv_bias=None))
    cu_seqlens = torch.tensor(BOUNDS) if packed else None
    wanted = recurrence(given, BOUNDS if packed else None)
    for got, want in zip(mixer_scan(**given, cu_seqlens=cu_seqlens), wanted, strict=True):
        assert (got.double().view_as(want) - want).norm() <= 2e-5 * want.norm()


def in_turn(xBC, z, dt, conv_weight, conv_bias, A, D, dt_bias, norm_weight, groups, dt_limit, eps, **more):
    state = (xBC.shape[2] - z.shape[2]) // (2 * groups)
    y, *last = conv_scan(xBC, dt, conv_weight, conv_bias, A, D, dt_bias, groups, state, dt_limit, **more)
    return nk.gated_rms_norm(y.flatten(2), z, norm_weight, eps, z.shape[2] // groups), *last


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("native", torch.float32),
        ("native", torch.bfloat16),
        ("reference", torch.float64),
        ("triton", torch.float32),
        ("triton", torch.float64),
    ],
)
def test_the_bits_of_the_two_ops(name, dtype):
    given = inputs(2, 9, 2, 16, 1, 12, dtype, sequences=3)
    more = dict(dt_limit=(0.01, 0.2), eps=0.1, cu_seqlens=torch.tensor([0, 4, 9, 18]), chunk_size=16)
    with nk.backend(name):
        try:
            expected = in_turn(**given, **more)
        except nk.Refused:
            with pytest.raises(nk.Refused):
                mixer_scan(**given, **more)
            return
        got = mixer_scan(**given, **more)
    for mine, same in zip(got, expected, strict=True):
        assert mine.dtype == same.dtype and torch.equal(mine, same)


def test_the_mixer_takes_it_where_no_gradient_is_wanted(backend):
    mixer = Mamba2(32, 4, 16, 12, 2)
    x = torch.randn(2, 9, 32)
    wanted = mixer(x)
    assert wanted.requires_grad
    taken = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("nvfp4_kernels.nn.mamba2.mixer_scan", lambda *given: taken.append(1) or mixer_scan(*given))
        assert torch.equal(mixer(x), wanted) and taken


def refusal(capability=(9, 0), dtype=torch.bfloat16, padding=0, **sizes):
    """What the CUDA kernels say of a call, by default of Nano's layer over 8 sequences, on a device of this capability."""
    at = dict(batch=8, length=2, heads=64, head_dim=64, groups=8, state=128, width=4) | sizes
    heads, inner = at["heads"], at["heads"] * at["head_dim"]
    channels = inner + 2 * at["groups"] * at["state"]
    with torch.device("meta"):
        projected = torch.empty(at["batch"], at["length"], inner + channels + heads + padding, dtype=dtype)
        z, xBC, dt, _ = projected.split((inner, channels, heads, padding), -1)
        per_head, weight = torch.empty(heads), torch.empty(channels, at["width"])
        given = xBC, z, dt, weight, None, per_head, per_head, per_head, torch.empty(inner)
    with _device.assumed(capability):
        return _cuda.refuses(*given, None, None, None, at["groups"], 0.0, math.inf, 1e-5, 128)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(), None),
        (dict(heads=128, batch=3), None),
        (dict(heads=256, batch=3), None),
        (dict(capability=(12, 0), batch=2), None),
        (dict(capability=(12, 0), heads=128), "no cluster of blocks holds the 16 heads of a group here"),
        (dict(capability=(8, 0)), "blocks form clusters from sm_90 on"),
        (dict(batch=2), "64 blocks would leave most multiprocessors idle"),
        (dict(dtype=torch.float16), "the CUDA kernels take bfloat16, xBC is torch.float16"),
        (dict(head_dim=80), "head_dim 64, state 128 and width 4 only, not (80, 128, 4)"),
        (dict(width=3), "head_dim 64, state 128 and width 4 only, not (64, 128, 3)"),
        (dict(heads=24), "no cluster of blocks holds the 3 heads of a group here"),
        (dict(padding=1), "xBC: tokens do not begin at multiples of 16 bytes"),
        (dict(length=0), "0 tokens"),
        (dict(batch=70000), "more than 65,535 sequences"),
    ],
)
def test_what_the_cuda_kernels_refuse(monkeypatch, change, reason):
    monkeypatch.setattr(_cuda._cuda, "_refusal", lambda op, device: None)
    assert refusal(**change) == reason


def test_views_that_the_cuda_kernels_cannot_read_are_copied(monkeypatch):
    """Bounds that do not follow one another, states that begin at an odd multiple of 4 bytes."""
    given, found = inputs(1, 74, 8, 64, 1, 128, torch.bfloat16, sequences=4), []
    states = torch.cat((torch.zeros(1), given["initial_state"].flatten()))[1:].view(given["initial_state"].shape)
    assert states.data_ptr() % 8 == 4
    bounds = torch.tensor(BOUNDS).repeat_interleave(2)[::2]

    def launched(op, kernel, grid, threads, shared, parameters):
        initial, cu_seqlens = _cuda.LAUNCH.unpack(parameters)[8:10]
        found.extend((initial % 8, list((ctypes.c_int64 * 5).from_address(cu_seqlens))))

    monkeypatch.setattr(_cuda._cuda, "_model", launched)
    names = "xBC", "z", "dt", "conv_weight", "conv_bias", "A", "D", "dt_bias", "norm_weight", "conv_state"
    _cuda.run(*(given[name] for name in names), states, bounds, 1, 0.0, math.inf, 1e-5, 64)
    assert found == [0, BOUNDS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(xBC=torch.zeros(1, 3, 112), z=torch.zeros(2, 3, 64)),
            r"z: got shape \[2, 3, 64\]; allowed: \[1, 3, 64\]",
        ),
        (dict(z=torch.zeros(1, 3, 66)), "z: got 66 channels; allowed: a multiple of 4, 112 less a multiple of 2"),
        (dict(z=torch.zeros(1, 3, 64).half()), "z: got torch.float16; allowed: torch.float32"),
        (dict(groups=3), "groups: got 3; allowed: a divisor of the 4 heads"),
        (dict(eps=-1.0), "eps: got -1.0; allowed: at least 0"),
        (dict(norm_weight=torch.zeros(16)), r"norm_weight: got shape \[16\]; allowed: \[64\]"),
        (dict(D=torch.zeros(4, 16)), r"D: got shape \[4, 16\]; allowed: \[4\]"),
        (dict(dt=torch.zeros(1, 3, 3)), r"dt: got shape \[1, 3, 3\]; allowed: \[1, 3, 4\]"),
        (
            dict(xBC=torch.zeros(1, 3, 112, requires_grad=True)),
            "xBC: got a tensor that requires grad; allowed: no grad",
        ),
    ],
)
def test_errors(change, message):
    given = inputs(1, 3)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        mixer_scan(**given | change)


def test_opcheck():
    given = inputs(1, 5, sequences=2)
    groups, states = given.pop("groups"), (given.pop("conv_state"), given.pop("initial_state"))
    arguments = (*given.values(), *states, torch.tensor([0, 2, 5]), groups, 0.0, math.inf, 1e-5, 16)
    torch.library.opcheck(torch.ops.nvfp4.mixer_scan.default, arguments)
