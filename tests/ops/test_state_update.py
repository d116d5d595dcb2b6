"""state_update against the formula in float64, and what its bits may and may not depend on, on both backends."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops._dispatch import Refused
from nvfp4_kernels.ops._native import native
from nvfp4_kernels.ops.state_update import native as native_backend
from nvfp4_kernels.ops.state_update.op import state_update

TOKENS = ("x", "dt", "B", "C", "z")  # inputs with an axis of tokens
NARROW = (torch.bfloat16, torch.float16)
SHAPES = {  # batch, tokens, heads, head_dim, groups, state
    "plain": (2, 3, 4, 16, 2, 32),
    "head-dim-80": (1, 2, 3, 80, 3, 128),
    "one": (3, 1, 1, 1, 1, 1),
    "odd": (2, 5, 6, 7, 3, 17),
    "nothing": (2, 0, 2, 3, 1, 5),
    "no-rows": (0, 2, 2, 3, 1, 5),
}


def inputs(batch=2, heads=4, head_dim=3, groups=2, state=5, dtype=torch.float64):
    made = dict(
        state=torch.randn(batch, heads, head_dim, state), x=torch.randn(batch, heads, head_dim), dt=torch.randn(batch, heads),
        A=-torch.rand(heads), B=torch.randn(batch, groups, state), C=torch.randn(batch, groups, state), D=torch.randn(heads),
        z=torch.randn(batch, heads, head_dim), dt_bias=torch.randn(heads),
    )  # fmt: skip
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def element(v, b, h, p, dt_softplus=True):
    g = h // (v["x"].shape[1] // v["B"].shape[1])
    step = float(v["dt"][b, h] + (v["dt_bias"][h] if v.get("dt_bias") is not None else 0))
    step = math.log1p(math.exp(step)) if dt_softplus else max(step, 0.0)
    u = step * float(v["x"][b, h, p])
    after = [
        math.exp(float(v["A"][h]) * step) * float(s) + u * float(k)
        for s, k in zip(v["state"][b, h, p], v["B"][b, g], strict=True)
    ]
    y = sum(s * float(c) for s, c in zip(after, v["C"][b, g], strict=True))
    y += float(v["D"][h]) * float(v["x"][b, h, p]) if v.get("D") is not None else 0
    z = v.get("z")
    return (y if z is None else y * float(z[b, h, p]) / (1 + math.exp(-float(z[b, h, p])))), after


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("dt_softplus", [True, False])
def test_against_the_formula(without, dt_softplus):
    values = {name: tensor for name, tensor in inputs().items() if name not in without}
    before = {name: tensor.clone() for name, tensor in values.items()}
    y = state_update(**values, dt_softplus=dt_softplus)
    for b in range(2):
        for h in range(4):
            for p in range(3):
                expected, after = element(before, b, h, p, dt_softplus)
                assert math.isclose(y[b, h, p], expected, rel_tol=1e-12, abs_tol=1e-12)
                torch.testing.assert_close(values["state"][b, h, p], torch.tensor(after, dtype=torch.float64))


def test_state_keeps_its_dtype_and_memory():
    values = inputs(dtype=torch.float32)
    values["x"], values["z"] = values["x"].bfloat16(), values["z"].bfloat16()
    state = values["state"] = values["state"].bfloat16()
    y = state_update(**values)
    assert y.dtype == torch.bfloat16 and values["state"] is state and state.isfinite().all()


def several(batch=2, tokens=3, heads=4, head_dim=16, groups=2, state=32, dtype=torch.float32, kept=torch.float32):
    made = dict(
        x=torch.randn(batch, tokens, heads, head_dim).to(dtype), dt=torch.randn(batch, tokens, heads).to(dtype),
        B=torch.randn(batch, tokens, groups, state).to(dtype), C=torch.randn(batch, tokens, groups, state).to(dtype),
        z=torch.randn(batch, tokens, heads, head_dim).to(dtype), A=-torch.rand(heads), D=torch.randn(heads),
        dt_bias=torch.randn(heads), state=torch.randn(batch, heads, head_dim, state).to(kept),
    )  # fmt: skip
    return made


def update(values, **options):
    """y and the states afterwards; the given state stays as it is."""
    state = values["state"].clone()
    return state_update(**(values | {"state": state}), **options), state


def token(values, t):
    return {name: tensor[:, t] if name in TOKENS else tensor for name, tensor in values.items()}


def oracle(values, dt_softplus=True, low=0.0, high=math.inf):
    """In float64, head by head: y, the state after each token, and the sum of the magnitudes that y is a sum of."""
    v = {name: tensor.double() for name, tensor in values.items()}
    batch, tokens, heads, head_dim = v["x"].shape
    ys, sizes, states = torch.zeros_like(v["x"]), torch.zeros_like(v["x"]), []
    current = v["state"].clone()
    for t in range(tokens):
        for b in range(batch):
            for h in range(heads):
                raw = float(v["dt"][b, t, h] + v["dt_bias"][h])
                step = min(max(math.log1p(math.exp(raw)) if dt_softplus else raw, low), high)
                g, x = h // (heads // v["B"].shape[2]), v["x"][b, t, h]
                current[b, h] *= math.exp(float(v["A"][h]) * step)
                current[b, h] += step * x[:, None] * v["B"][b, t, g][None, :]
                skip = v["D"][h] * x
                gate = v["z"][b, t, h] / (1 + torch.exp(-v["z"][b, t, h]))
                ys[b, t, h] = ((current[b, h] * v["C"][b, t, g]).sum(1) + skip) * gate
                sizes[b, t, h] = ((current[b, h] * v["C"][b, t, g]).abs().sum(1) + skip.abs()) * gate.abs()
        states.append(current.clone())
    return ys, states, sizes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, dict(dt_softplus=False), dict(dt_limit=(0.1, 0.6))], ids=str)
def test_several_tokens_against_the_formula(backend, shape, options):
    check(several(*SHAPES[shape]), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_against_the_formula(isa, shape):
    with nk.backend("native"):
        check(several(*SHAPES[shape]))
        check(several(*SHAPES[shape]) | {"D": torch.randn(SHAPES[shape][2:4])})


def check(values, **options):
    y, state = update(values, **options)
    low, high = options.get("dt_limit", (0.0, math.inf))
    D = values["D"]
    if D.dim() == 2:  # the oracle has one weight for each head: all of y but the skip, then the skip
        plain, states, sizes = oracle(values | {"D": torch.zeros(len(D))})
        z = values["z"].double()
        skip = values["x"].double() * D.double() * z / (1 + torch.exp(-z))
        exact, sizes = plain + skip, sizes + skip.abs()
    else:
        exact, states, sizes = oracle(values, options.get("dt_softplus", True), low, high)
    assert y.shape == values["x"].shape and ((y.double() - exact).abs() <= 2e-6 * sizes).all()
    if states:
        assert (state.double() - states[-1]).norm() <= 2e-6 * states[-1].norm()
    else:
        assert torch.equal(state, values["state"])


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_inputs_are_rounded_once(backend, dtype):
    """bf16 and fp16 inputs, an fp32 state: y is off by half a unit of its last place, and by what fp32 loses."""
    values = several(dtype=dtype)
    exact, states, sizes = oracle(values)
    y, state = update(values)
    assert y.dtype == dtype
    half = torch.finfo(dtype).eps / 2
    assert ((y.double() - exact).abs() <= 1.01 * half * exact.abs() + 3e-6 * sizes + 2.0**-25).all()
    assert (state.double() - states[-1]).norm() <= 2e-6 * states[-1].norm()


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_in_bf16_count_in_full(backend, dtype):
    """A, D and dt_bias of a narrow dtype: the same bits as their values in fp32."""
    values = several(dtype=dtype)
    narrow = {name: values[name].bfloat16() for name in ("A", "D", "dt_bias")}
    for a, b in zip(
        update(values | narrow), update(values | {name: t.float() for name, t in narrow.items()}), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept", [torch.float32, *NARROW])
@pytest.mark.parametrize("shape", ["plain", "head-dim-80", "odd"])
@pytest.mark.parametrize("drawn", [False, True])
def test_several_tokens_are_as_many_calls(backend, kept, shape, drawn):
    if drawn and kept == torch.float32:
        pytest.skip("an fp32 state takes no noise")
    values = several(*SHAPES[shape], kept=kept)
    noise = torch.tensor([99, (1 << 32) - 2]) if drawn else None
    y, state = update(values, noise=noise)
    current = values["state"].clone()
    for t in range(values["x"].shape[1]):
        advanced = None if noise is None else noise + torch.tensor([0, t])
        one = state_update(**(token(values, t) | {"state": current}), noise=advanced)
        assert torch.equal(one, y[:, t]), t
    assert torch.equal(current, state)


@pytest.mark.parametrize("kept", [torch.float32, *NARROW])
def test_intermediate_holds_each_state_and_leaves_the_state_alone(backend, kept):
    values = several(*SHAPES["odd"], kept=kept)
    batch, tokens, heads, head_dim, _, n = SHAPES["odd"]
    made = torch.full((batch, tokens, heads, head_dim, n), math.nan, dtype=kept)
    y, state = update(values, intermediate=made)
    assert torch.equal(state, values["state"])
    for count in range(1, tokens + 1):
        first = {name: t[:, :count] if name in TOKENS else t for name, t in values.items()}
        expected, after = update(first)
        assert torch.equal(y[:, :count], expected) and torch.equal(made[:, count - 1], after)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("drawn", [False, True])
def test_indices_choose_slots(backend, index, drawn):
    """Rows 0, 1, 3 in the slots 4, 0, 2; row 2 has none: y is 0 and no slot but these three changes. Noise goes by row."""
    values = several(4, 2, 4, 7, 2, 17, kept=torch.bfloat16)
    options = dict(noise=torch.tensor([5, 6])) if drawn else {}
    slots = torch.tensor([4, 0, -1, 2], dtype=index)
    cache = torch.randn(6, 4, 7, 17).bfloat16()
    expected_y, expected = update(values, **options)
    before = cache.clone()
    cache[[4, 0, 2]] = values["state"][[0, 1, 3]]
    y = state_update(**(values | {"state": cache}), indices=slots, **options)
    assert torch.equal(y[[0, 1, 3]], expected_y[[0, 1, 3]]) and not y[2].any()
    assert torch.equal(cache[[4, 0, 2]], expected[[0, 1, 3]]) and torch.equal(cache[[1, 3, 5]], before[[1, 3, 5]])


def test_rows_without_a_slot_read_nothing(backend):
    values = several(2)
    for name in TOKENS:
        values[name][1] = math.nan
    state = torch.cat([torch.full((1, 4, 16, 32), math.nan), values["state"]])
    before = state.clone()
    y = state_update(**(values | {"state": state}), indices=torch.tensor([1, -1]))
    assert y[0].isfinite().all() and not y[1].any()
    assert state[0].isnan().all() and torch.equal(state[2], before[2])


@pytest.mark.parametrize("place", [6, 1 << 40])
def test_native_refuses_slots_that_are_none(place):
    values = several(2)
    before = values["state"].clone()
    with nk.backend("native"), pytest.raises(ValueError, match="indices: got a slot beyond the 2 of state"):
        state_update(**values, indices=torch.tensor([0, place]))
    assert torch.equal(values["state"], before)


@pytest.mark.parametrize("dtype", NARROW)
def test_nan_and_inf_stay_where_they_are(backend, dtype):
    values = several(kept=dtype)
    values["state"][0, 1, 2, 3], values["state"][1, 0, 5, 6] = math.nan, -math.inf
    for noise in (None, torch.tensor([1, 2])):
        y, state = update(values, noise=noise)
        assert state[0, 1, 2, 3].isnan() and state[1, 0, 5, 6] == -math.inf
        rest = state.isfinite()
        assert (~rest).sum() == 2 and (~y.isfinite()).sum() == 2 * values["x"].shape[1]


def test_an_infinite_input_in_a_part_of_a_vector(isa):
    """State 17: what an Inf makes of the lanes beyond it reaches no sum."""
    values = token(several(1, 1, 1, 5, 1, 17), 0) | dict(x=torch.full((1, 1, 5), math.inf), z=None, D=None)
    values["B"], values["C"] = values["B"].abs(), values["C"].abs()
    with nk.backend("native"):
        assert (update(values)[0] == math.inf).all()


@pytest.mark.parametrize("kept", [torch.float32, *NARROW])
def test_views_of_wider_tensors(isa, kept):
    """x, B and C as the convolution gives them, dt, z and the states inside others: the bits of contiguous copies."""
    wide = torch.randn(2, 3, 4 * 16 + 2 * 2 * 32 + 8).bfloat16()
    x, B, C, dt = wide.split((64, 64, 64, 8), -1)
    values = several(dtype=torch.bfloat16, kept=kept)
    values |= dict(x=x.unflatten(-1, (4, 16)), B=B.unflatten(-1, (2, 32)), C=C.unflatten(-1, (2, 32)), dt=dt[..., 1::2])
    views = values | dict(z=values["z"].mT.contiguous().mT, D=torch.randn(4, 16).mT.contiguous().mT)
    copies = {name: t.contiguous() for name, t in views.items()}
    cache = torch.full((5, 6, 17, 40), 7.0, dtype=kept)
    inside = cache[1::2, 1:5, :16, 3:35]
    inside.copy_(views["state"])
    made = torch.zeros(4, 2, 3, 16, 32, dtype=kept).permute(1, 2, 0, 3, 4)
    with nk.backend("native"):
        expected_y, expected = update(copies)
        assert torch.equal(state_update(**(views | {"state": copies["state"].clone()}), intermediate=made), expected_y)
        assert torch.equal(made[:, -1], expected)
        assert torch.equal(state_update(**(views | {"state": inside})), expected_y)
    assert torch.equal(inside, expected)
    inside.fill_(7.0)
    assert (cache == 7.0).all()


@pytest.mark.parametrize("kept", [torch.float32, *NARROW])
def test_threads_and_neighbours_change_no_bit(isa, kept):
    values = several(3, 2, 12, 64, 4, 32, kept=kept)
    noise = None if kept == torch.float32 else torch.tensor([8, 9])
    before = torch.get_num_threads()
    try:
        with nk.backend("native"):
            expected = update(values, noise=noise)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, update(values, noise=noise), expected)), threads
            for b in range(3):
                alone = {name: t[b : b + 1] if name in (*TOKENS, "state") else t for name, t in values.items()}
                if noise is None:
                    assert all(map(torch.equal, update(alone), (t[b : b + 1] for t in expected)))
    finally:
        torch.set_num_threads(before)


def test_refusals():
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "indices", "intermediate", "noise")

    def refused(**change):
        values = several() | change
        return native_backend.refuses(*(values.get(name) for name in names), True, 0.0, math.inf)

    assert refused() is None or native is None
    for name in ("state", "x", "dt", "B", "C", "z"):
        assert refused(**{name: several()[name].double()}) == f"bf16, fp16 and fp32 only, {name} is torch.float64"
    turned = torch.zeros(2, 4, 32, 16).mT
    assert refused(state=turned) == "the last axis of state is not contiguous"
    assert "intermediate" in refused(intermediate=torch.zeros(2, 3, 4, 32, 16).mT)
    with nk.backend("native"), pytest.raises(Refused, match="last axis of state"):
        state_update(**(several() | {"state": turned}))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_opcheck(backend, kept):
    v = several(kept=kept)
    arguments = [v[name] for name in ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    noise = torch.tensor([1, 2]) if kept == torch.bfloat16 else None
    made = torch.zeros(2, 3, 4, 16, 32, dtype=kept)
    for rest in ((None, None, noise), (torch.tensor([1, -1]), made, noise)):
        torch.library.opcheck(torch.ops.nvfp4.state_update, (*arguments, *rest, True, 0.0, math.inf))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_tokens_at_once_are_a_scan(backend, kept):
    """y and the last state of a scan from the same state, up to rounding; of a 16-bit state that of the state too."""
    values = several(2, 9, 6, 16, 3, 32, kept=kept)
    y, state = update(values)
    rest = {name: t for name, t in values.items() if name != "state"}
    scanned, last = nk.selective_scan(**rest, initial_state=values["state"].float(), return_state=True, chunk_size=4)
    bound = 2e-6 if kept == torch.float32 else 1e-2
    assert (y - scanned).norm() <= bound * scanned.norm() and (state - last).norm() <= bound * last.norm()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="state: got strides .*; allowed: memory of its own for each element"):
        state_update(**(inputs() | {"state": torch.zeros(1, 4, 3, 5, dtype=torch.float64).expand(2, -1, -1, -1)}))
    for name, wrong in (("indices", [0, 1]), ("intermediate", 1.0), ("noise", [1, 2])):
        with pytest.raises(TypeError, match=f"{name}: got {type(wrong).__name__}"):
            state_update(**(inputs() | {"state": torch.zeros(2, 4, 3, 5).half(), name: wrong}))
    for wrong in (None, (1.0, 0.0), (0.0, 1.0, 2.0), 0.1):
        with pytest.raises(ValueError, match=r"dt_limit: got .*; allowed: \(low, high\)"):
            state_update(**inputs(), dt_limit=wrong)
    with pytest.raises(ValueError, match="state: got shape"):
        state_update(**(inputs() | {"state": torch.zeros(2, 4, 3, 4)}))
    with pytest.raises(ValueError, match="B: got 3 groups"):
        state_update(**(inputs() | {"B": torch.zeros(2, 3, 5)}))
