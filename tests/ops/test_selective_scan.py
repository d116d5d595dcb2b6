"""selective_scan against a float64 recurrence written out here, head by head and token by token."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.selective_scan.op import selective_scan
from nvfp4_kernels.ops.selective_scan.reference import recurrence
from nvfp4_kernels.ops.state_update.op import state_update

BACKENDS = ("reference", "native")
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")


def inputs(batch=2, length=21, heads=4, head_dim=6, groups=2, state=5, dtype=torch.float64, without=(), scale=1.0):
    shapes = dict(
        x=(batch, length, heads, head_dim), dt=(batch, length, heads), A=(heads,), B=(batch, length, groups, state),
        C=(batch, length, groups, state), D=(heads,), z=(batch, length, heads, head_dim), dt_bias=(heads,),
        initial_state=(batch, heads, head_dim, state),
    )  # fmt: skip
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items() if name not in without}
    made["A"] = -torch.rand(heads, dtype=torch.float64) * 4 * scale
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in made.items()}


def oracle(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=True, dt_limit=(0, math.inf), initial_state=None):
    """Scalars of one head at a time: S [head_dim, state], no chunk, no einsum."""
    batch, length, heads, head_dim = x.shape
    rows, last = [], []
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // B.shape[2])
            S = x.new_zeros(head_dim, B.shape[3]) if initial_state is None else initial_state[b, h]
            for t in range(length):
                step = dt[b, t, h] + (0 if dt_bias is None else dt_bias[h])
                step = torch.log(1 + torch.exp(step)) if dt_softplus else step
                step = step.clamp(*dt_limit)
                S = torch.exp(A[h] * step) * S + step * torch.outer(x[b, t, h], B[b, t, g])
                y = S @ C[b, t, g]
                if D is not None:
                    y = y + D[h] * x[b, t, h]
                if z is not None:
                    y = y * z[b, t, h] * torch.sigmoid(z[b, t, h])
                rows.append(y)
            last.append(S)
    y = torch.stack(rows).view(batch, heads, length, head_dim).transpose(1, 2)
    return y, torch.stack(last).view(batch, heads, head_dim, -1)


def compare(arguments, tolerance=1e-9, **options):
    """Values and every gradient, from both outputs, of the scan and of the oracle."""
    scan_options = {k: v for k, v in options.items()}
    oracle_options = {k: v for k, v in options.items() if k != "chunk_size"}
    y, state = selective_scan(**arguments, return_state=True, **scan_options)
    copies = {name: tensor.detach().double().requires_grad_() for name, tensor in arguments.items()}
    expected_y, expected_state = oracle(**copies, **oracle_options)
    dy, dstate = torch.randn_like(expected_y), torch.randn_like(expected_state)
    ((y * dy.to(y.dtype)).sum() + (state * dstate.to(state.dtype)).sum()).backward()
    ((expected_y * dy).sum() + (expected_state * dstate).sum()).backward()
    pairs = {"y": (y, expected_y), "state": (state, expected_state)}
    pairs |= {name: (arguments[name].grad, copies[name].grad) for name in arguments}
    for name, (got, expected) in pairs.items():
        error = (got.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < tolerance, (name, float(error))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 21])
def test_any_length_against_any_chunk(length):
    compare(inputs(length=length), chunk_size=8)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "without", [(), ("D",), ("z",), ("dt_bias",), ("initial_state",), ("D", "z", "dt_bias", "initial_state")]
)
def test_every_optional_input_in_every_grouping(groups, without):
    compare(inputs(length=11, groups=groups, without=without), chunk_size=4)


@pytest.mark.parametrize(
    "options", [dict(dt_softplus=False), dict(dt_limit=(0.3, 0.9)), dict(dt_limit=(0.0, 0.5), dt_softplus=False)]
)
def test_step_rules(options):
    compare(inputs(length=9), chunk_size=4, **options)


@pytest.mark.parametrize("head_dim, state", [(1, 1), (80, 3), (48, 16), (3, 33)])
def test_odd_head_and_state_sizes(head_dim, state):
    compare(inputs(batch=1, length=9, heads=2, groups=1, head_dim=head_dim, state=state), chunk_size=4)


@pytest.mark.parametrize("sizes", [dict(), dict(state=1), dict(head_dim=1)])
def test_axes_in_the_opposite_order(backend, sizes):
    arguments = inputs(batch=1, length=11, dtype=torch.float32, **sizes)
    turned = {name: t.detach().permute(*reversed(range(t.dim()))).contiguous() for name, t in arguments.items()}
    turned = {name: t.permute(*reversed(range(t.dim()))).requires_grad_() for name, t in turned.items()}
    assert all(t.is_contiguous() for t in selective_scan(**turned, return_state=True, chunk_size=4))
    compare(turned, 1e-4, chunk_size=4)


def test_no_rows(backend):
    arguments = inputs(batch=0, dtype=torch.float32)
    y, state = selective_scan(**arguments, return_state=True)
    assert y.shape == (0, 21, 4, 6) and state.shape == (0, 4, 6, 5)
    (y.sum() + state.sum()).backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in arguments.values())


def test_one_skip_weight_for_each_channel():
    arguments = inputs()
    D = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = selective_scan(**(arguments | {"D": D}), chunk_size=8)
    without = selective_scan(**(arguments | {"D": None, "z": None}), chunk_size=8)
    z = arguments["z"]
    torch.testing.assert_close(y, (without + arguments["x"] * D) * torch.nn.functional.silu(z))
    assert torch.autograd.gradcheck(lambda D: selective_scan(**(arguments | {"D": D}), chunk_size=8), D)


def test_gradcheck():
    arguments = inputs(batch=1, length=5, heads=2, head_dim=2, groups=1, state=2)
    names = list(arguments)

    def function(*tensors):
        return selective_scan(**dict(zip(names, tensors, strict=True)), return_state=True, chunk_size=2)

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


def test_recurrence_is_the_oracle():
    arguments = {name: tensor.detach() for name, tensor in inputs().items()}
    for got, expected in zip(recurrence(**arguments), oracle(**arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
def test_rounding_stays_within_the_dtype(dtype, tolerance, backend):
    arguments = inputs(length=130, heads=4, head_dim=16, groups=1, state=8, dtype=dtype)
    for name in ("A", "D", "dt_bias", "initial_state"):
        arguments[name] = arguments[name].detach().float().requires_grad_()
    with nk.backend(backend):
        compare(arguments, tolerance, chunk_size=64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_decay_stays_finite(backend):
    """|A| dt summed over a chunk far above 88, where an exponential taken before its mask overflows in fp32."""
    arguments = inputs(length=64, dtype=torch.float32, scale=100.0)
    with nk.backend(backend):
        y = selective_scan(**arguments, chunk_size=64)
        y.sum().backward()
    assert y.isfinite().all() and all(tensor.grad.isfinite().all() for tensor in arguments.values())


def test_steps_and_decays_of_any_size():
    """The reference; steps of 1e-6 to 100, rates up to -1e4: products from 1 to 1e-430,000, finite and right everywhere."""
    arguments = inputs(length=40, dtype=torch.float32, without=("dt_bias", "z"))
    arguments["dt"] = (10 ** (torch.rand(2, 40, 4) * 8 - 6)).requires_grad_()
    arguments["A"] = torch.tensor([-1e4, -1.0, -1e-3, -30.0], requires_grad=True)
    with nk.backend("reference"):
        compare(arguments, 2e-6, chunk_size=32, dt_softplus=False)


@pytest.mark.parametrize("wide", ["x", "A", "dt", "B", "D", "dt_bias"])
def test_the_reference_computes_in_the_type_of_x(wide):
    """Of operands of fp32 and fp64; each gradient has the type of its own."""
    arguments = inputs(length=7, dtype=torch.float32)
    arguments[wide] = arguments[wide].detach().double().requires_grad_()
    y, state = selective_scan(**arguments, return_state=True, chunk_size=4)
    assert y.dtype == state.dtype == (torch.float64 if wide == "x" else torch.float32)
    (y.sum() + state.sum()).backward()
    assert all(t.grad.dtype == t.dtype for t in arguments.values())
    expected = oracle(**{name: t.detach().double() for name, t in arguments.items()})
    for got, want in zip((y, state), expected, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_steps_keep_their_relative_accuracy(backend):
    dt = torch.full((1, 1, 1), -12.0)  # softplus 6.1e-6; log(1 + exp(dt)) in fp32 is 1e-2 off
    one = torch.ones(1, 1, 1, 1)
    with nk.backend(backend):
        y = selective_scan(one, dt, -torch.ones(1), one, one)
    torch.testing.assert_close(y.double().item(), math.log1p(math.exp(-12.0)), rtol=1e-6, atol=0)


BOUNDS = [0, 1, 5, 6, 14, 20, 20 + 9, 40]


@pytest.mark.parametrize("state", [False, True])
def test_packed_sequences_are_separate_sequences(state):
    arguments = inputs(batch=2, length=20, without=("initial_state",))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    out = selective_scan(**arguments, cu_seqlens=cu_seqlens, return_state=state, chunk_size=8)
    y = (out[0] if state else out).flatten(0, 1)
    dy = torch.randn_like(y)
    (y * dy).sum().backward()
    gradients = {name: tensor.grad.clone() for name, tensor in arguments.items()}
    for tensor in arguments.values():
        tensor.grad = None
    flat = {n: t.flatten(0, 1)[None] if n in ("x", "dt", "B", "C", "z") else t for n, t in arguments.items()}
    for i, (start, end) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        part = {n: t[:, start:end] if n in ("x", "dt", "B", "C", "z") else t for n, t in flat.items()}
        expected, last = oracle(**part)
        torch.testing.assert_close(y[start:end], expected[0], rtol=1e-9, atol=1e-9)
        if state:
            torch.testing.assert_close(out[1][i], last[0], rtol=1e-9, atol=1e-9)
        (expected[0] * dy[start:end]).sum().backward(retain_graph=True)
    for name, tensor in arguments.items():
        torch.testing.assert_close(gradients[name], tensor.grad, rtol=1e-8, atol=1e-8)


def test_packed_sequences_each_start_from_their_own_state():
    arguments = {name: tensor.detach() for name, tensor in inputs(batch=1, length=12).items()}
    states = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    y = selective_scan(**(arguments | {"initial_state": states}), cu_seqlens=torch.tensor([0, 4, 5, 12]))
    for i, (start, end) in enumerate([(0, 4), (4, 5), (5, 12)]):
        part = {n: t[:, start:end] if n in ("x", "dt", "B", "C", "z") else t for n, t in arguments.items()}
        expected, _ = oracle(**(part | {"initial_state": states[i : i + 1]}))
        torch.testing.assert_close(y[:, start:end], expected)


def test_neighbours_cannot_leak():
    arguments = {n: t.detach() for n, t in inputs(batch=1, length=24, without=("initial_state",)).items()}
    cu_seqlens = torch.tensor([0, 7, 17, 24])
    before = selective_scan(**arguments, cu_seqlens=cu_seqlens, chunk_size=8)[:, 7:17]
    for name in ("x", "dt", "B", "C"):
        arguments[name][:, :7] = torch.randn_like(arguments[name][:, :7]) * 1e3
        arguments[name][:, 17:] = torch.randn_like(arguments[name][:, 17:]) * 1e3
    assert torch.equal(before, selective_scan(**arguments, cu_seqlens=cu_seqlens, chunk_size=8)[:, 7:17])


def test_states_hand_over_between_calls():
    arguments = {name: tensor.detach() for name, tensor in inputs(length=19).items()}
    whole, last = selective_scan(**arguments, return_state=True, chunk_size=8)
    first = {n: t[:, :13] if n in ("x", "dt", "B", "C", "z") else t for n, t in arguments.items()}
    second = {n: t[:, 13:] if n in ("x", "dt", "B", "C", "z") else t for n, t in arguments.items()}
    y, state = selective_scan(**first, return_state=True, chunk_size=8)
    torch.testing.assert_close(y, whole[:, :13])
    decoded = []
    for t in range(second["x"].shape[1]):  # token by token, in place
        tokens = {
            n: v[:, t] if n in ("x", "dt", "B", "C", "z") else v for n, v in second.items() if n != "initial_state"
        }
        decoded.append(state_update(state, **tokens))
    torch.testing.assert_close(torch.stack(decoded, 1), whole[:, 13:])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 3)), r"x: got shape \[2, 3\]; allowed"),
        (dict(x=torch.zeros(2, 21, 4, 6, dtype=torch.int64)), "x: got torch.int64; allowed"),
        (dict(dt=torch.zeros(2, 21, 3)), "dt: got shape"),
        (dict(A=torch.zeros(3)), "A: got shape"),
        (dict(B=torch.zeros(2, 21, 3, 5)), "B: got 3 groups; allowed: a divisor of 4"),
        (dict(B=torch.zeros(2, 21, 0, 5)), "B: got 0 groups; allowed: a divisor of 4"),
        (dict(C=torch.zeros(2, 21, 2, 4)), "C: got shape"),
        (dict(D=torch.zeros(5)), "D: got shape"),
        (dict(initial_state=torch.zeros(2, 4, 6, 4)), "initial_state: got shape"),
        (dict(chunk_size=0), "chunk_size: got 0"),
        (dict(dt_limit=(1.0, 0.0)), "dt_limit: got"),
        (dict(dt_limit=None), "dt_limit: got None; allowed: .low, high"),
        (dict(cu_seqlens=[0, 42]), "cu_seqlens: got list; allowed: an int32 or int64 tensor"),
        (dict(cu_seqlens=torch.zeros(3)), "cu_seqlens: got torch.float32; allowed: int32, int64"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        selective_scan(**(inputs() | change))
