"""moe_step: the bits of its ops; a loop over tokens and choices in float64; errors."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul, plain_parts
from nvfp4_kernels.ops.moe_step.op import MATRICES, moe_step
from nvfp4_kernels.ops.router_logits.op import router_logits
from tests.ops.test_grouped_matmul import drawn, error
from tests.oracles.experts_brute import decode, moe

OPTIONS = {"plain": (3, 2.5, 1, 1, True), "groups": (2, 1.0, 4, 2, False)}
HIDDEN, EXPERTS, WIDTH, LATENT, SHARED = 48, 8, 80, 32, 64


def fp8(count, rows, cols):
    return Stack(drawn(count, rows, cols).to(torch.float8_e4m3fn), None, torch.rand(count) / 4)


def nvfp4(count, rows, cols):
    parts = [nk.quantize(drawn(rows, cols) / cols**0.5) for _ in range(count)]
    return Stack(*(torch.stack([getattr(p, name) for p in parts]) for name in ("codes", "scales", "global_scale")))


def plain(dtype):
    return lambda count, rows, cols: (drawn(count, rows, cols) / cols**0.5).to(dtype)


def block(make, latent=True, shared=True):
    size = LATENT if latent else HIDDEN
    given = dict(router=drawn(EXPERTS, HIDDEN), bias=drawn(EXPERTS))
    given |= dict(up=make(EXPERTS, WIDTH, size), down=make(EXPERTS, size, WIDTH))
    given |= dict(fc1=make(1, LATENT, HIDDEN), fc2=make(1, HIDDEN, LATENT)) if latent else {}
    return given | (dict(shared_up=make(1, SHARED, HIDDEN), shared_down=make(1, HIDDEN, SHARED)) if shared else {})


def step(x, given, options):
    first = [given[name] for name in ("router", "bias", "up", "down")]
    rest = {name: given[name] for name in given if name in ("fc1", "fc2", "shared_up", "shared_down")}
    return moe_step(x, *first, *options, **rest)


def by_parts(x, given, options):
    def product(x, name):
        return grouped_matmul(x, given[name], torch.tensor([0, len(x)]), x.dtype)

    routing = nk.route(router_logits(x, given["router"]), given["bias"], *options)
    inner = product(x, "fc1") if "fc1" in given else x
    y = expert_mlp(inner, routing, given["up"], given["down"])
    y = product(y, "fc2") if "fc1" in given else y
    return y + product(nk.relu2(product(x, "shared_up")), "shared_down") if "shared_up" in given else y


MAKERS = {"plain": None, "nvfp4": nvfp4, "fp8": fp8}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", MAKERS)
def test_the_bits_of_its_ops(isa, dtype, form):
    make = MAKERS[form] or plain(dtype)
    with nk.backend("native"):
        for latent, shared, options in ((True, True, "plain"), (False, True, "groups"), (True, False, "groups")):
            given = block(make, latent, shared)
            for tokens in (0, 1, 2, 9, 33, 64):
                x = (drawn(2 * tokens, HIDDEN) / 8).to(dtype)[::2]  # rows apart
                assert torch.equal(step(x, given, OPTIONS[options]), by_parts(x, given, OPTIONS[options]))


@pytest.mark.parametrize("form", ["plain", "nvfp4"])
@pytest.mark.parametrize("options", OPTIONS)
def test_against_float64(backend, form, options):
    given, x = block(MAKERS[form] or plain(torch.float32)), drawn(5, HIDDEN) / 8
    top_k, scale, groups, kept, normalize = OPTIONS[options]
    exact = {n: decode(*m[:3]) if isinstance(m, Stack) else m.double() for n, m in given.items()}
    rows = x.double()
    scores = torch.sigmoid(rows @ exact["router"].t())
    choice, indices = scores + exact["bias"], []
    for token in range(len(x)):
        parts = choice[token].view(groups, -1)
        best = parts.sort(descending=True).values[:, :2].sum(1).sort(descending=True).indices[:kept]
        allowed = [e for e in range(EXPERTS) if e // (EXPERTS // groups) in best.tolist()]
        indices.append(sorted(allowed, key=lambda e: -choice[token, e])[:top_k])
    indices = torch.tensor(indices)
    weights = scores.gather(1, indices)
    weights = (weights / weights.sum(1, keepdim=True) if normalize else weights) * scale
    y = moe(rows @ exact["fc1"][0].t(), indices, weights, exact["up"], exact["down"]) @ exact["fc2"][0].t()
    y += (rows @ exact["shared_up"][0].t()).relu().square() @ exact["shared_down"][0].t()
    assert error(step(x, given, OPTIONS[options]), y) < 2e-6


def test_threads_and_neighbours_change_nothing():
    given, x, before = block(nvfp4), drawn(7, HIDDEN, dtype=torch.bfloat16) / 8, torch.get_num_threads()
    y = step(x, given, OPTIONS["plain"])
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(step(x, given, OPTIONS["plain"]), y)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([step(row[None], given, OPTIONS["plain"]) for row in x]), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(router=torch.zeros(8, 47)), r"router: got shape \[8, 47\]; allowed: \[8, 48\]"),
        (dict(bias=torch.zeros(7)), r"bias: got shape \[7\]; allowed: \[8\]"),
        (dict(up=torch.zeros(7, 80, 32)), r"up: got shape \[7, 80, 32\]; allowed: \[8, 80, 32\]"),
        (dict(down=torch.zeros(8, 80, 32)), r"down: got shape \[8, 80, 32\]; allowed: \[8, 32, 80\]"),
        (dict(fc1=None), "fc2: got one of two; allowed: fc1 and fc2, or neither"),
        (dict(fc2=torch.zeros(48, 32)), r"fc2: got 2 dimensions; allowed: 3"),
        (dict(shared_down=None), "shared_down: got one of two; allowed: shared_up and shared_down, or neither"),
        (dict(shared_up=torch.zeros(2, 64, 48)), r"shared_up: got shape \[2, 64, 48\]; allowed: \[1, 64, 48\]"),
        (dict(up=torch.zeros(8, 80, 32).double()), "up: got float64; allowed: bfloat16"),
    ],
)
def test_errors(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        step(torch.zeros(2, HIDDEN), block(plain(torch.float32)) | change, OPTIONS["plain"])


def test_errors_of_x_and_of_the_choice():
    given = block(plain(torch.float32))
    with pytest.raises(ValueError, match=r"x: got shape \[48\]; allowed: \[tokens, hidden\]"):
        step(torch.zeros(HIDDEN), given, OPTIONS["plain"])
    with pytest.raises(RuntimeError, match="x: got a tensor that requires grad"):
        step(torch.zeros(1, HIDDEN, requires_grad=True), given, OPTIONS["plain"])
    with pytest.raises(ValueError, match="top_k: got 9; allowed: 1 to 8"):
        step(torch.zeros(1, HIDDEN), given, (9,))


def test_registered_op_is_sound():
    for make, latent in ((plain(torch.float32), False), (fp8, True)):
        given, parts = block(make, latent), []
        for name in MATRICES:
            m = given.get(name)
            parts += [None] * 3 if m is None else plain_parts(m if isinstance(m, Stack) else Stack(m))
        arguments = drawn(3, HIDDEN), given["router"], given["bias"], *parts, *OPTIONS["plain"]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.nvfp4.moe_step.default, arguments, test_utils=checks)


def test_compiled_in_one_graph():
    given, x = block(nvfp4), drawn(3, HIDDEN, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: step(x, given, OPTIONS["plain"]), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), step(x, given, OPTIONS["plain"]))
