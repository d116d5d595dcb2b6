"""The native scan on every instruction set against the float64 recurrence, and what its bits may not depend on."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.selective_scan import native
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.selective_scan.reference import recurrence
from tests.drawing import given, settings, st

# Relative L2 error against the recurrence on the same rounded inputs. bf16: that of mamba_ssm's Triton kernels, times 1.2;
# fp16: what rounding the results costs; fp32: theirs is 2.6e-6. The gradients of A and dt_bias are sums over all tokens of
# terms of both signs: with few heads little is left of them, so the shapes below have several, and fp32 leaves some room.
BF16 = dict(y=5.0e-3, state=3.2e-3, x=5.8e-3, dt=6.5e-3, B=6.2e-3, C=6.2e-3, A=3.1e-3, D=4.1e-3, dt_bias=3.6e-3,
            initial_state=6.2e-3)  # fmt: skip
GATES = {
    torch.bfloat16: {name: 1.2 * gate for name, gate in BF16.items()},
    torch.float16: dict.fromkeys(BF16, 8e-4),
    torch.float32: dict.fromkeys(BF16, 2.6e-6) | dict(A=2e-5, dt_bias=2e-5),
}
TOKENS = ("x", "dt", "B", "C")  # inputs with an axis of tokens


def inputs(batch=2, length=37, heads=4, head_dim=20, groups=2, state=12, dtype=torch.float32, without=()):
    made = dict(
        x=torch.randn(batch, length, heads, head_dim).to(dtype), dt=(torch.randn(batch, length, heads) - 2).to(dtype),
        A=-torch.rand(heads) * 8 - 0.1, B=torch.randn(batch, length, groups, state).to(dtype),
        C=torch.randn(batch, length, groups, state).to(dtype), D=torch.randn(heads), dt_bias=torch.randn(heads),
        initial_state=torch.randn(batch, heads, head_dim, state),
    )  # fmt: skip
    return {name: tensor for name, tensor in made.items() if name not in without}


def tokens(arguments, part):
    return {name: t[:, part] if name in TOKENS else t for name, t in arguments.items()}


def scan(arguments, chunk_size=16, **options):
    with nk.backend("native"):
        return selective_scan(**arguments, return_state=True, chunk_size=chunk_size, **options)


def results(arguments, chunk_size=16, dy=None, dstate=None, **options):
    """y, the state and the gradient of every tensor, by name, the gradients of y and state being `dy` and `dstate`."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in arguments.items()}
    y, state = scan(leaves, chunk_size, **options)
    torch.autograd.backward((y, state), (dy, dstate))
    return dict(y=y.detach(), state=state.detach()) | {name: t.grad for name, t in leaves.items()}


def slopes(arguments, sequences=None):
    """Gradients to send into y and the states."""
    x, state = arguments["x"], arguments["B"].shape[3]
    return torch.randn_like(x), torch.randn(sequences or x.shape[0], *x.shape[2:], state)


def check(arguments, chunk_size=16, **options):
    """Values and all gradients against the recurrence, within the gates of x's dtype."""
    dy, dstate = slopes(arguments)
    got = results(arguments, chunk_size, dy, dstate, **options)
    leaves = {name: t.double().requires_grad_() for name, t in arguments.items()}
    y, state = recurrence(**leaves, **options)
    torch.autograd.backward((y, state), (dy.double(), dstate.double()))
    expected = dict(y=y.detach(), state=state.detach()) | {name: t.grad for name, t in leaves.items()}
    gates = GATES[arguments["x"].dtype]
    for name, value in got.items():
        error = (value.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < gates[name], (name, float(error), gates[name])


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


SHAPES = {
    "plain": (dict(), 16),
    "head-dim-80": (dict(batch=1, length=70, heads=3, head_dim=80, groups=3, state=33), 32),
    "one": (dict(length=33, heads=2, head_dim=1, groups=1, state=1), 8),
    "largest": (dict(batch=1, length=34, heads=4, head_dim=256, groups=2, state=256), 100),
    "blocks-of-heads": (dict(length=40, heads=10, head_dim=16, groups=1, state=16), 24),
    "many-heads": (dict(batch=1, length=40, heads=33, head_dim=8, groups=3, state=8), 128),
    "odd": (dict(length=45, heads=3, head_dim=5, groups=1, state=17), 7),
    "long": (dict(batch=1, length=300, heads=8, head_dim=64, groups=1, state=32), 128),
}


@pytest.mark.parametrize("dtype", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(isa, shape, dtype):
    sizes, chunk_size = SHAPES[shape]
    check(inputs(**sizes, dtype=dtype), chunk_size)


@pytest.mark.parametrize("chunk_size", [8, 16])
def test_every_short_length(isa, chunk_size):
    for length in range(1, 41):
        check(inputs(length=length, heads=2, head_dim=3, groups=1, state=5), chunk_size)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("without", [(), ("D",), ("dt_bias",), ("initial_state",), ("D", "dt_bias", "initial_state")])
def test_every_optional_input_in_every_grouping(groups, without):
    for dtype in GATES:
        check(inputs(heads=8, groups=groups, without=without, dtype=dtype))


@pytest.mark.parametrize(
    "options", [dict(dt_softplus=False), dict(dt_limit=(0.05, 0.3)), dict(dt_limit=(0.0, 0.2), dt_softplus=False)]
)
def test_step_rules(isa, options):
    arguments = inputs()
    arguments["dt"] = arguments["dt"].abs() / 4
    check(arguments, **options)


def test_one_skip_weight_for_each_channel(isa):
    arguments = inputs() | {"D": torch.randn(4, 20)}
    check(arguments)


def test_states_formed_segment_by_segment(isa):
    """Backward keeps some megabytes of states: here eight spans of one token each."""
    check(inputs(batch=1, length=35, heads=4, head_dim=256, groups=1, state=256), chunk_size=1)


def test_dtypes_may_differ(isa):
    for dtypes in ((torch.bfloat16, torch.float32, torch.float16), (torch.float32, torch.bfloat16, torch.bfloat16)):
        arguments = inputs()
        arguments |= {name: arguments[name].to(dtype) for name, dtype in zip(("x", "dt", "B"), dtypes, strict=True)}
        arguments["A"], arguments["D"] = arguments["A"].double(), arguments["D"].bfloat16()
        made = results(arguments, 16, *slopes(arguments))
        assert all(made[name].dtype == t.dtype for name, t in arguments.items())
        dtype = torch.bfloat16 if torch.bfloat16 in dtypes else torch.float32
        for got, expected in zip(scan(arguments), recurrence(**arguments), strict=True):
            assert (got.double() - expected).norm() / expected.norm() < GATES[dtype]["y"]


def test_views_of_wider_tensors(isa):
    """x, B and C as the convolution gives them, dt as in_proj does: the same bits as from contiguous copies."""
    for dtype in GATES:
        wide = torch.randn(2, 37, 4 * 20 + 2 * 2 * 12).to(dtype)
        x, B, C = wide.split((80, 24, 24), -1)
        dt = torch.randn(2, 37, 9).to(dtype)[..., 3:7] - 2
        views = inputs() | dict(
            x=x.unflatten(-1, (4, 20)), B=B.unflatten(-1, (2, 12)), C=C.unflatten(-1, (2, 12)), dt=dt
        )
        turned = views | dict(x=views["x"].mT.contiguous().mT, B=views["B"].mT.contiguous().mT)
        copies = {name: t.contiguous() for name, t in views.items()}
        dy = torch.randn(2, 37, 20, 4).to(dtype).mT
        dstate = torch.randn(2, 4, 12, 20).mT
        expected = results(copies, 16, dy.contiguous(), dstate.contiguous())
        for arguments in (views, turned):
            leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
            y, state = scan(leaves)
            torch.autograd.backward((y, state), (dy, dstate))
            equal(expected, dict(y=y.detach(), state=state.detach()) | {name: t.grad for name, t in leaves.items()})
            cu_seqlens = torch.tensor([0, 30, 74])  # over the border of the rows
            packed = {name: t for name, t in arguments.items() if name != "initial_state"}
            plain = {name: copies[name] for name in packed}
            for got, same in zip(scan(packed, cu_seqlens=cu_seqlens), scan(plain, cu_seqlens=cu_seqlens), strict=True):
                assert torch.equal(got, same)


def test_an_expanded_gradient(isa):
    arguments = inputs(dtype=torch.bfloat16)
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
    scan(leaves)[0].sum().backward()
    expected = results(arguments, 16, torch.ones_like(arguments["x"]), torch.zeros(2, 4, 20, 12))
    equal({name: t.grad for name, t in leaves.items()}, {name: expected[name] for name in leaves})


@pytest.mark.parametrize("dtype", GATES)
def test_outputs_depend_on_nothing_that_follows(isa, dtype):
    """y of the first tokens has the same bits whatever comes later: fewer tokens, others, NaN and Inf."""
    arguments = inputs(length=60, dtype=dtype)
    for chunk_size in (16, 64):
        y, _ = scan(arguments, chunk_size)
        for length in (1, 2, 7, 8, 16, 31, 32, 33, 47, 48, 59):
            first = tokens(arguments, slice(length))
            assert torch.equal(scan(first, chunk_size)[0], y[:, :length]), length
            for value in (math.nan, math.inf, -3.0):
                changed = {name: t.clone() for name, t in arguments.items()}
                for name in TOKENS:
                    changed[name][:, length:] = value
                assert torch.equal(scan(changed, chunk_size)[0][:, :length], y[:, :length]), (length, value)


@pytest.mark.parametrize("dtype", GATES)
def test_rows_threads_and_neighbours_change_no_bit(isa, dtype):
    arguments = inputs(batch=3, length=50, heads=12, groups=2, dtype=dtype)
    dy, dstate = slopes(arguments)
    expected = results(arguments, 16, dy, dstate)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            equal(expected, results(arguments, 16, dy, dstate))
    finally:
        torch.set_num_threads(before)
    of_rows = (*TOKENS, "initial_state", "y", "state")
    for row in range(3):
        alone = {name: t[row : row + 1] if name in of_rows else t for name, t in arguments.items()}
        got = results(alone, 16, dy[row : row + 1], dstate[row : row + 1])
        equal({name: got[name] for name in of_rows}, {name: expected[name][row : row + 1] for name in of_rows})


@pytest.mark.parametrize("dtype", GATES)
def test_packed_sequences_are_separate_sequences(isa, dtype):
    """A boundary at every position of a short sequence, empty sequences and uneven ones among them: the same bits as alone."""
    for cut in range(19):
        bounds = [0, cut, cut, 18, 36]
        arguments = inputs(batch=2, length=18, dtype=dtype) | {"initial_state": torch.randn(4, 4, 20, 12)}
        dy, dstate = slopes(arguments, 4)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32 if cut % 2 else torch.int64)
        got = results(arguments, 8, dy, dstate, cu_seqlens=cu_seqlens)
        flat = {name: t.flatten(0, 1)[None] if name in TOKENS else t for name, t in arguments.items()}
        sums = dict.fromkeys(("A", "D", "dt_bias"), 0.0)
        for i, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            alone = tokens(flat, slice(start, end)) | {"initial_state": arguments["initial_state"][i : i + 1]}
            expected = results(alone, 8, dy.flatten(0, 1)[None, start:end], dstate[i : i + 1])
            for name in (*TOKENS, "y"):
                assert torch.equal(got[name].flatten(0, 1)[start:end], expected[name][0]), (cut, i, name)
            for name in ("state", "initial_state"):
                assert torch.equal(got[name][i : i + 1], expected[name]), (cut, i, name)
            sums = {name: total + expected[name].double() for name, total in sums.items()}
        for name, total in sums.items():
            torch.testing.assert_close(got[name].double(), total, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_state_carries_over_at_any_border_of_chunks(data):
    chunk_size = data.draw(st.integers(1, 70), "chunk_size")
    chunks = data.draw(st.integers(1, 4), "chunks before")
    rest = data.draw(st.integers(0, 80), "tokens after")
    dtype = data.draw(st.sampled_from(list(GATES)), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    border = chunks * chunk_size
    arguments = inputs(batch=1, length=border + rest, dtype=dtype)
    y, last = scan(arguments, chunk_size)
    first, state = scan(tokens(arguments, slice(border)), chunk_size)
    second, end = scan(tokens(arguments, slice(border, None)) | {"initial_state": state}, chunk_size)
    assert torch.equal(torch.cat([first, second], 1), y) and torch.equal(end, last)


def test_every_length_and_every_cut():
    """1 to 1000 tokens in chunks of 128, against the recurrence; at each of them a state is handed on, and a boundary gives
    the bits of two calls."""
    arguments = inputs(batch=1, length=1000, heads=2, head_dim=3, groups=1, state=5, without=("initial_state",))
    ys, states = [], [torch.zeros(1, 2, 3, 5, dtype=torch.float64)]
    for t in range(1000):
        y, state = recurrence(**tokens(arguments, slice(t, t + 1)), initial_state=states[-1])
        ys.append(y)
        states.append(state)
    exact = torch.cat(ys, 1)

    def close(got, wanted):
        assert (got.double() - wanted).norm() <= 2e-6 * wanted.norm()

    for cut in range(1, 1001):
        before, after = tokens(arguments, slice(cut)), tokens(arguments, slice(cut, None))
        y, state = scan(before, 128)
        close(y, exact[:, :cut])
        close(state, states[cut])
        rest, last = scan(after | {"initial_state": state}, 128)
        close(rest, exact[:, cut:])
        close(last, states[-1])
        packed, both = scan(arguments, 128, cu_seqlens=torch.tensor([0, cut, 1000]))
        alone, end = scan(after, 128)
        assert torch.equal(packed, torch.cat([y, alone], 1)) and torch.equal(both, torch.cat([state, end]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_and_decays_of_any_size(isa, dtype):
    """Steps of 1e-6 to 100, rates up to -1e4: products from 1 to 1e-43000, finite and right everywhere."""
    arguments = inputs(length=80, dtype=dtype, without=("dt_bias",))
    arguments["dt"] = (10 ** (torch.rand(2, 80, 4) * 8 - 6)).to(dtype)
    arguments["A"] = -torch.tensor([1e4, 1.0, 1e-3, 30.0])
    check(arguments, 64, dt_softplus=False)


def test_no_tokens_and_no_rows(isa):
    arguments = inputs(length=0)
    dy, dstate = slopes(arguments)
    got = results(arguments, 16, dy, dstate)
    assert got["y"].shape == (2, 0, 4, 20) and torch.equal(got["state"], arguments["initial_state"])
    assert torch.equal(got["initial_state"], dstate) and not got["A"].any() and not got["dt_bias"].any()
    assert not scan(inputs(length=0, without=("initial_state",)))[1].any()
    assert scan(inputs(batch=0))[1].shape == (0, 4, 20, 12)


def test_refusals():
    assert native.refuses(**_schema(inputs(dtype=torch.float64))) == "bf16, fp16 and fp32 only, x is torch.float64"
    assert "dt is torch.float64" in native.refuses(**_schema(inputs() | {"dt": torch.zeros(2, 37, 4).double()}))
    assert native.refuses(**_schema(inputs(state=0))) == "no heads, groups, channels or states"
    assert native.refuses(**_schema(inputs())) is None
    for bounds in ([0, 40, 30, 74], [0, 75], [1, 74]):
        with pytest.raises(ValueError, match="cu_seqlens: got"):
            scan(inputs(without=("initial_state",)), cu_seqlens=torch.tensor(bounds))


def _schema(arguments):
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state", "cu_seqlens")
    return {name: arguments.get(name) for name in names}


def test_opcheck():
    arguments = {name: t.requires_grad_() for name, t in inputs(length=9).items()}
    cu_seqlens, options = torch.tensor([0, 5, 18]), (True, 0.0, math.inf, 8)
    with nk.backend("native"):
        torch.library.opcheck(torch.ops.nvfp4.selective_scan, (*_schema(arguments).values(), *options))
        packed = _schema(arguments | {"cu_seqlens": cu_seqlens, "D": None})
        torch.library.opcheck(torch.ops.nvfp4.selective_scan, (*packed.values(), *options))


def test_compiles_whole():
    arguments = inputs(dtype=torch.bfloat16)
    dy, dstate = slopes(arguments)
    expected = results(arguments, 16, dy, dstate)
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.items()}
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    with nk.backend("native"):
        y, state = compiled(**leaves, return_state=True, chunk_size=16)
        torch.autograd.backward((y, state), (dy, dstate))
    equal(expected, dict(y=y.detach(), state=state.detach()) | {name: t.grad for name, t in leaves.items()})
