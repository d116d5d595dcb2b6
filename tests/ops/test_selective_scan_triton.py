"""The Triton backend of selective_scan against a float64 recurrence written out here: by the interpreter, or on a GPU."""

import math
import tempfile

import numpy as np
import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _device, _triton
from nvfp4_kernels.ops.selective_scan import _triton_call, _triton_plan, triton
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from tests import machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    _triton.triton is None or not (_triton.INTERPRETED or machine.ON or DEVICE == "cuda"),
    reason="neither Triton's interpreter, nor the machine of tests, nor a GPU",
)

PER_TOKEN = ("x", "dt", "B", "C")
# Relative L2 errors. bf16: 1.2 times what mamba_ssm's kernels, interpreted, have against float64 on the same kind of inputs.
GATES = {torch.float32: 2e-5, torch.float16: 8e-4}
BF16 = dict(y=5.0e-3, state=3.2e-3, x=5.8e-3, dt=6.5e-3, B=6.2e-3, C=6.2e-3, A=3.1e-3, D=4.1e-3, dt_bias=3.6e-3)


def inputs(
    batch=1,
    length=70,
    heads=2,
    head_dim=16,
    groups=1,
    state=16,
    dtype=torch.float32,
    without=(),
    decay=4.0,
    sequences=None,
):
    shapes = dict(
        x=(batch, length, heads, head_dim), dt=(batch, length, heads), A=(heads,), B=(batch, length, groups, state),
        C=(batch, length, groups, state), D=(heads,), dt_bias=(heads,),
        initial_state=(sequences or batch, heads, head_dim, state),
    )  # fmt: skip
    made = {name: torch.randn(shape, device=DEVICE) for name, shape in shapes.items() if name not in without}
    made["A"] = -torch.rand(heads, device=DEVICE) * decay
    made["dt"] = made["dt"] - 2
    return {name: t.to(dtype) if name in PER_TOKEN else t for name, t in made.items()}


def oracle(x, dt, A, B, C, D=None, dt_bias=None, initial_state=None, dt_softplus=True, dt_limit=(0, math.inf)):
    """One row of tokens after the other, one token after the other."""
    rows, last = [], []
    for b in range(x.shape[0]):
        per_group = x.shape[2] // B.shape[2]
        S = x.new_zeros(*x.shape[2:], B.shape[3]) if initial_state is None else initial_state[b]
        row = []
        for t in range(x.shape[1]):
            step = dt[b, t] if dt_bias is None else dt[b, t] + dt_bias
            step = torch.log1p(torch.exp(step)) if dt_softplus else step
            step = step.clamp(*dt_limit)[:, None]
            Bt, Ct = (torch.repeat_interleave(v[b, t], per_group, 0)[:, None, :] for v in (B, C))
            S = torch.exp(A[:, None] * step)[..., None] * S + (step * x[b, t])[..., None] * Bt
            y = (S * Ct).sum(-1)
            row.append(y if D is None else y + x[b, t] * (D if D.dim() == 2 else D[:, None]))
        rows.append(torch.stack(row) if row else x[b])
        last.append(S)
    return torch.stack(rows), torch.stack(last)


def packed_oracle(bounds, **arguments):
    flat = {n: t.flatten(0, 1)[None] if n in PER_TOKEN else t for n, t in arguments.items()}
    initial = flat.pop("initial_state", None)
    ys, states = [], []
    for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {n: t[:, start:end] if n in PER_TOKEN else t for n, t in flat.items()}
        y, state = oracle(**part, initial_state=None if initial is None else initial[i : i + 1])
        ys.append(y)
        states.append(state)
    return torch.cat(ys, 1).view(arguments["x"].shape), torch.cat(states)


def compare(arguments, reference=oracle, reference_options=None, gates=None, **options):
    """Values and all gradients, from both outputs, each by its relative error. gates: those of single tensors."""
    given = {name: t.detach().requires_grad_() for name, t in arguments.items()}
    exact = {name: t.detach().double().cpu().requires_grad_() for name, t in arguments.items()}
    with nk.backend("triton"):
        y, state = selective_scan(**given, return_state=True, **options)
        expected = reference(**exact, **(options if reference_options is None else reference_options))
        dy, dstate = torch.randn(y.shape, dtype=torch.float64), torch.randn(state.shape, dtype=torch.float64)
        dy = dy.to(y.dtype).double()  # the same numbers for both
        torch.autograd.backward((y, state), (dy.to(y), dstate.to(state)))
    torch.autograd.backward(expected, (dy, dstate.float().double()))
    pairs = dict(y=(y, expected[0]), state=(state, expected[1]))
    pairs |= {name: (given[name].grad, exact[name].grad) for name in given}
    for name, (got, want) in pairs.items():
        got, want, dtype = got.detach().double().cpu(), want.detach(), got.dtype
        error = float((got - want).norm() / want.norm().clamp(min=1e-30))
        gate = (gates or {}).get(name) or GATES.get(y.dtype) or 1.2 * BF16.get(name, 5e-3)
        assert error < gate, (name, error)
        assert dtype == (y.dtype if name == "y" else torch.float32 if name == "state" else arguments[name].dtype)


@pytest.fixture(params=["segments", "whole sequences"])
def passes(request, monkeypatch):
    """Both ways from token to token, with short segments."""
    monkeypatch.setattr(_triton_plan, "SEGMENT", 64)
    monkeypatch.setattr(_device, "multiprocessors", lambda device: 1000 if request.param == "segments" else 1)
    return request.param


@pytest.fixture
def wide_tiles(monkeypatch):
    """Those of Hopper in the interpreter. A chip has its own: another's may not fit it, nor take Triton's detours for it."""
    if _triton.INTERPRETED:
        monkeypatch.setattr(_device, "matrix_instruction", lambda device: "wgmma")


@pytest.mark.parametrize("length", [1, 17, 63, 64, 65, 200])
def test_lengths(length, passes):
    compare(inputs(length=length))


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if machine.ON or DEVICE == "cuda" else [])])
def test_sixteen_bits(dtype, passes):
    compare(inputs(batch=2, length=130, heads=4, groups=2, dtype=dtype))


@pytest.mark.parametrize(
    "head_dim, state, groups", [(80, 16, 1), (16, 128, 4), (16, 200, 1), (80, 128, 2), (64, 64, 1), (5, 33, 2)]
)
def test_shapes(head_dim, state, groups):
    compare(inputs(length=40, heads=max(2, groups), head_dim=head_dim, state=state, groups=groups))


@pytest.mark.parametrize("state", [16, 100])
def test_tiles_of_hopper_and_blackwell(state, wide_tiles):
    """Other tiles and fewer kinds of programs than those of mma.sync, which every other test here has in the interpreter."""
    compare(inputs(length=70, heads=4, groups=2, head_dim=80, state=state, dtype=torch.float16))
    compare(inputs(length=130, without=("initial_state",)))


def test_states_of_every_second_block(passes, wide_tiles):
    """As on Hopper and Blackwell; sequences of two, no, three and one blocks."""
    bounds = [0, 70, 70, 200, 201]
    arguments = inputs(length=201, heads=1, sequences=4)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    compare(arguments, lambda **exact: packed_oracle(bounds, **exact), {}, cu_seqlens=cu_seqlens)


def test_more_heads_a_group_than_a_program_takes():
    compare(inputs(length=20, heads=18))


@pytest.mark.parametrize(
    "without", [("D",), ("dt_bias",), ("initial_state",), ("D", "dt_bias", "initial_state")], ids="-".join
)
def test_optional_inputs(without, passes):
    compare(inputs(length=66, without=without))


def test_one_skip_weight_for_each_channel():
    arguments = inputs(length=33, head_dim=80)
    compare(arguments | {"D": torch.randn(2, 80, device=DEVICE)})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [dict(dt_softplus=False), dict(dt_limit=(0.1, 0.2)), dict(dt_limit=(0.0, 0.15), dt_softplus=False)]
)
def test_step_rules(options, bias):
    compare(inputs(length=20, without=() if bias else ("dt_bias",)), **options)


def test_steps_in_another_dtype():
    arguments = inputs(length=20, dtype=torch.float16)
    compare(arguments | {"dt": arguments["dt"].float(), "initial_state": arguments["initial_state"].half()})


def test_small_steps_keep_their_relative_accuracy():
    dt = torch.tensor([-60.0, -20.0, -12.0, -3.0, 0.0, 3.0, 30.0], device=DEVICE).view(7, 1, 1)
    one = torch.ones(7, 1, 1, 1, device=DEVICE)
    with nk.backend("triton"):
        y = selective_scan(one, dt, -torch.ones(1, device=DEVICE), one, one)
    expected = torch.log1p(torch.exp(dt.double()))
    torch.testing.assert_close(y.view_as(dt).double(), expected, rtol=3e-6, atol=0)


def test_gradients_of_early_tokens_beside_large_later_ones():
    """In one block, in fp32: pairs of the later tokens are 1e4 times as large as any that a decay of the early ones parts."""
    arguments = inputs(length=64, heads=1, without=("initial_state", "dt_bias"))
    arguments["B"][:, :32, :, 8:], arguments["B"][:, 32:, :, :8] = 0, 0
    arguments["B"][:, 32:] *= 1e4
    given = arguments | {"dt": arguments["dt"].requires_grad_()}
    exact = {n: t.detach().double().cpu() for n, t in arguments.items()}
    exact["dt"].requires_grad_()
    dy = torch.randn(1, 64, 1, 16)
    with nk.backend("triton"):
        selective_scan(**given).backward(dy.to(DEVICE))
    oracle(**exact)[0].backward(dy.double())
    got, want = given["dt"].grad.double().cpu()[:, :32], exact["dt"].grad[:, :32]
    assert (got - want).norm() < 2e-5 * want.norm()


def test_strong_decay(passes):
    """|A| dt summed over a block is far above 88 here, where an exponential taken before its mask overflows. Hardly anything is
    left for the gradient of A, a sum of differences."""
    compare(inputs(length=130, decay=300.0, without=("initial_state",)), gates=dict(A=3e-4))


def test_steps_and_decays_of_any_size():
    """Steps of 1e-6 to 100, rates up to -1e4: products from 1 to 1e-430,000, finite and right everywhere."""
    arguments = inputs(length=70, heads=4, without=("dt_bias", "initial_state"))
    arguments["dt"] = 10 ** (torch.rand(1, 70, 4, device=DEVICE) * 8 - 6)
    arguments["A"] = -torch.tensor([1e4, 1.0, 1e-3, 30.0], device=DEVICE)
    compare(arguments, gates=dict(dt=1e-4), dt_softplus=False)


BOUNDS = [0, 1, 1, 18, 64, 130, 131, 131]


@pytest.mark.parametrize("initial", [True, False])
def test_packed_sequences(initial, passes):
    """Boundaries everywhere, rows' among them; two sequences without tokens."""
    without = () if initial else ("initial_state",)
    arguments = inputs(batch=1, length=131, sequences=len(BOUNDS) - 1, without=without)
    compare(
        arguments,
        lambda **exact: packed_oracle(BOUNDS, **exact),
        {},
        cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICE),
    )


def test_packed_rows():
    bounds = [0, 30, 70, 100]
    arguments = inputs(batch=2, length=50, sequences=3)
    compare(
        arguments, lambda **exact: packed_oracle(bounds, **exact), {}, cu_seqlens=torch.tensor(bounds, device=DEVICE)
    )


def run(arguments, **options):
    """y, state and the gradients of the inputs that belong to tokens."""
    given = {n: t.detach().requires_grad_() for n, t in arguments.items()}
    with nk.backend("triton"):
        y, state = selective_scan(**given, return_state=True, **options)
        y.backward((y.detach() * 3).to(y.dtype))
    return y.detach(), state.detach(), {n: given[n].grad for n in PER_TOKEN}


def test_bits_depend_on_the_sequence_alone(passes):
    """Not on the batch around it, not on packing, and those of earlier tokens not on later ones."""
    arguments = inputs(batch=3, length=140)
    y, state, gradients = run(arguments)
    alone = {n: t[1:2] if n in (*PER_TOKEN, "initial_state") else t for n, t in arguments.items()}
    y_alone, state_alone, gradients_alone = run(alone)
    assert torch.equal(y_alone, y[1:2]) and torch.equal(state_alone, state[1:2])
    assert all(torch.equal(gradients_alone[n], gradients[n][1:2]) for n in PER_TOKEN)

    other = inputs(length=37)
    packed = {n: torch.cat((other[n], alone[n]), 1) if n in PER_TOKEN else alone[n] for n in alone}
    packed["initial_state"] = torch.cat((other["initial_state"], alone["initial_state"]))
    y_packed, state_packed, gradients_packed = run(packed, cu_seqlens=torch.tensor([0, 37, 177], device=DEVICE))
    assert torch.equal(y_packed[:, 37:], y_alone) and torch.equal(state_packed[1:], state_alone)
    assert all(torch.equal(gradients_packed[n][:, 37:], gradients_alone[n]) for n in PER_TOKEN)

    shorter = {n: t[:, :97] if n in PER_TOKEN else t for n, t in alone.items()}
    assert torch.equal(run(shorter)[0], y_alone[:, :97])


def test_a_sequence_goes_on_from_its_state_bit_for_bit(passes):
    """At borders of segments; over whole sequences at every border of blocks."""
    arguments = inputs(length=200)
    whole, last, _ = run(arguments)
    cut = 128
    first = {n: t[:, :cut] if n in PER_TOKEN else t for n, t in arguments.items()}
    y, state, _ = run(first)
    rest = {n: t[:, cut:] if n in PER_TOKEN else t for n, t in arguments.items()} | {"initial_state": state}
    y_rest, state_rest, _ = run(rest)
    assert torch.equal(torch.cat((y, y_rest), 1), whole) and torch.equal(state_rest, last)


def test_neighbours_cannot_leak(passes):
    arguments = inputs(length=150, without=("initial_state",))
    cu_seqlens = torch.tensor([0, 20, 90, 150], device=DEVICE)
    y, _, gradients = run(arguments, cu_seqlens=cu_seqlens)
    broken = {n: t.clone() for n, t in arguments.items()}
    for name in PER_TOKEN:
        broken[name][:, :20] = math.nan
        broken[name][:, 90:] = math.inf
    y_broken, _, gradients_broken = run(broken, cu_seqlens=cu_seqlens)
    assert torch.equal(y[:, 20:90], y_broken[:, 20:90])
    assert all(torch.equal(gradients[n][:, 20:90], gradients_broken[n][:, 20:90]) for n in PER_TOKEN)
    assert y_broken[:, :20].isnan().all()


def test_strided_views_are_read_where_they_lie():
    plain = inputs(length=40, heads=4, groups=2)
    wide = torch.cat([plain[n].flatten(2) for n in ("x", "B", "C", "dt")], -1)
    x, B, C, dt = wide.split((64, 32, 32, 4), -1)
    views = plain | dict(x=x.unflatten(-1, (4, 16)), B=B.unflatten(-1, (2, 16)), C=C.unflatten(-1, (2, 16)), dt=dt)
    transposed = plain | {n: plain[n].transpose(-1, -2).contiguous().transpose(-1, -2) for n in ("x", "B", "C")}
    y, state, gradients = run(plain)
    for arguments in (views, transposed):
        y_strided, state_strided, gradients_strided = run(arguments)
        assert torch.equal(y_strided, y) and torch.equal(state_strided, state)
        assert all(torch.equal(gradients_strided[n], gradients[n]) for n in PER_TOKEN)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs memory that is reserved and not there")
def test_offsets_beyond_two_to_the_31(monkeypatch):
    """A token's offset is formed in 64 bits: x in a sparse file, its tokens 2^21 - 64 elements apart."""
    length, stride = 1030, 2**21 - 64
    arguments = inputs(length=length, heads=1, dtype=torch.float16, without=("initial_state",))
    y, state, gradients = run(arguments)
    with tempfile.NamedTemporaryFile() as file:
        spread = np.memmap(file.name, np.float16, "w+", shape=(length * stride,))
        x = torch.from_numpy(spread).as_strided((1, length, 1, 16), (0, stride, 16, 1)).copy_(arguments["x"])
        assert _triton_call.lines(x, False) is x and length * stride > 2**31
        y_spread, state_spread, gradients_spread = run(arguments | {"x": x})
    assert torch.equal(y, y_spread) and torch.equal(state, state_spread)
    assert all(torch.equal(gradients[n], gradients_spread[n]) for n in PER_TOKEN)


@pytest.mark.parametrize("bounds", [[0, 0], [0, 5], [0, 64, 64, 65, 400], [0, *range(100, 9100, 100)]])
def test_plan_of_packed_sequences(bounds, monkeypatch):
    monkeypatch.setattr(_triton_plan, "SEGMENT", 128)
    plan = _triton_plan.plan(1, bounds[-1], torch.tensor(bounds, device=DEVICE), 32, 1, False)
    columns, firsts, block = [], [], 0
    for sequence, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        firsts.append(len(columns))
        for number in range(max(1, -(-(end - start) // 128))):
            columns.append((sequence, number, start + 128 * number, end, block + 4 * number))
        block += -(-(end - start) // 32)
    assert plan.table.T[: len(columns)].tolist() == [list(c) for c in columns]
    assert (plan.table[0, len(columns) :] == -1).all()
    assert plan.firsts.tolist() == [*firsts, len(columns)]
    assert plan.blocks >= block


@pytest.mark.parametrize(
    "heads, passes, multiprocessors, expected",
    [(64, 1, 132, False), (64, 2, 132, True), (128, 1, 132, True), (128, 1, 148, False), (24, 2, 132, False)],
)
def test_segments_where_heads_leave_multiprocessors_idle(heads, passes, multiprocessors, expected):
    assert _triton_call.whole(heads * passes, multiprocessors) is expected


def test_tiles():
    tile = _triton_call.tile
    nano = tile(torch.bfloat16, 64, 128, "wgmma", False)
    assert (nano.block, nano.channels, nano.columns, nano.warps, nano.forward) == (64, 64, 128, 4, 2)
    assert tile(torch.bfloat16, 64, 128, "tcgen05", True).forward == 3
    assert tile(torch.bfloat16, 64, 128, "mma.sync", True).warps == 8
    assert tile(torch.bfloat16, 80, 128, "wgmma", False).pieces(80) == 2
    assert (tile(torch.bfloat16, 1, 1, "wgmma", False).channels, tile(torch.float32, 1, 1, "wgmma", False).columns) == (
        16,
        16,
    )
    assert (nano.width, nano.together, nano.every) == (128, True, 2)
    ampere = tile(torch.bfloat16, 64, 128, "mma.sync", False)
    assert (ampere.width, ampere.together, ampere.every) == (32, False, 1)
    assert (ampere.slices(128), ampere.slices(100)) == (4, 4)
    assert [tile(torch.float32, 64, state, "wgmma", False).block for state in (32, 64, 128, 256)] == [64, 32, 16, 16]


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(x=torch.zeros(1, 70, 2, 16, dtype=torch.float64)), "float64"),
        (dict(x=torch.zeros(1, 70, 2, 129)), "head_dim 129"),
        (dict(B=torch.zeros(1, 70, 1, 257), C=torch.zeros(1, 70, 1, 257)), "state 257"),
        (dict(dt_softplus=False, low=-1.0), "steps below 0"),
    ],
)
def test_refusals(change, reason):
    names = "x dt A B C D dt_bias initial_state cu_seqlens dt_softplus low high chunk_size".split()
    given = dict.fromkeys(names) | inputs() | dict(dt_softplus=True, low=0.0, high=math.inf, chunk_size=128) | change
    assert reason in triton.refuses(**given)
