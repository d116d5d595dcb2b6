"""What only a GPU can show: graphs with fresh noise in each replay, no waiting for the host, tensors of 2^31 values."""

import pytest
import torch

import nvfp4_kernels as nk
from benchmarks.gpu.cases import all_cases
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.packed import pack
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def captured(run):
    """run() as a CUDA graph, after the warm-up that torch asks for, and the graph's outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def test_linear_in_a_graph():
    layer = nk.Linear(256, 128, recipe=nk.recipes.nvfp4.default, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    graph, (y, dx, dw) = captured(lambda: (y := layer(x), *torch.autograd.grad(y, (x, layer.weight), dy)))
    runs = []
    for _ in range(2):
        graph.replay()
        runs.append([t.clone() for t in (y, dx, dw)])
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][1], runs[1][1]) and not torch.equal(runs[0][2], runs[1][2])
    exact = x.double() @ layer.weight.double().t()
    assert (runs[0][0].double() - exact).norm() < 0.2 * exact.norm()
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    assert (y.double() - 2 * exact).norm() < 0.4 * exact.norm()


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_weight_only_in_a_graph(rows):
    weight = nk.quantize(torch.randn(512, 256, device="cuda"))
    a = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    graph, y = captured(lambda: nk.matmul(a, weight))
    a.copy_(torch.randn_like(a))
    graph.replay()
    exact = a.double() @ weight.dequantize().double().t()
    assert (y.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("rows", [1, 64, 65, 128, 257, 1024, 1025, 3000])
@pytest.mark.parametrize("out, cols", [(1856, 2688), (4096, 4096), (272, 250)])
def test_packed_weights_times_any_number_of_rows(rows, out, cols):
    """fp32 sums of exact products, the same bits twice, and no waiting for the host."""
    plain = nk.quantize(torch.randn(out, cols, device="cuda"))
    packed = nk.PackedNVFP4Tensor.pack(plain)
    a, bias = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16), torch.randn(out, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, again = (nk.matmul(a, packed, torch.float32) for _ in range(2))
        added = nk.matmul(a, packed, torch.bfloat16, bias=bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    w = plain.dequantize().double()
    assert ((y - a.double() @ w.t()).abs() <= (a.double().abs() @ w.abs().t()) * cols * 2.0**-23).all()
    assert torch.equal(y, again) and torch.equal(added, (y + bias).bfloat16())


@pytest.mark.parametrize("rows", [8, 200])
def test_packed_weights_in_a_graph(rows):
    """Of few rows k is split, twice in the graph: both splits count to the same place, and find it at zero each time."""
    packed = nk.PackedNVFP4Tensor.pack(nk.quantize(torch.randn(4096, 2048, device="cuda")))
    a = torch.randn(rows, 2048, device="cuda", dtype=torch.bfloat16)
    graph, outputs = captured(lambda: (nk.matmul(a, packed), nk.matmul(a, packed)))
    for _ in range(2):
        a.copy_(torch.randn_like(a))
        graph.replay()
        assert all(torch.equal(y, nk.matmul(a, packed)) for y in outputs)


def test_packed_weights_in_a_graph_of_torch_compile():
    """Which refuses memory that is kept when the call is over."""
    packed = nk.PackedNVFP4Tensor.pack(nk.quantize(torch.randn(4096, 2048, device="cuda")))
    a = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda a: nk.matmul(a, packed), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        assert torch.equal(compiled(a), nk.matmul(a, packed))


@pytest.mark.parametrize("tokens", [1, 8, 64, 700, 2000])
def test_packed_experts_in_a_graph(tokens):
    """Loads change from replay to replay; nothing waits for the host."""
    plain = [nk.quantize(torch.randn(32 * n, k, device="cuda")) for n, k in ((1856, 256), (256, 1856))]
    parts = [[t.view(32, -1, t.shape[1]) for t in (w.codes, w.scales)] for w in plain]
    up, down = (Stack(*pack(*p), w.global_scale.repeat(32)) for p, w in zip(parts, plain, strict=True))
    x, logits = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16), torch.randn(tokens, 32, device="cuda")
    graph, y = captured(lambda: expert_mlp(x, nk.route(logits, None, 6), up, down))
    w_up, w_down = (w.dequantize().double().view(32, -1, w.shape[1]) for w in plain)
    for load in (torch.randn_like(logits), torch.arange(32.0, device="cuda").expand_as(logits)):
        logits.copy_(load)
        graph.replay()
        routing = nk.route(logits, None, 6)
        dense = torch.zeros_like(logits, dtype=torch.float64).scatter_(1, routing.indices, routing.weights.double())
        exact = torch.stack(
            [dense[:, e : e + 1] * ((x.double() @ w_up[e].t()).relu() ** 2 @ w_down[e].t()) for e in range(32)]
        ).sum(0)
        assert (y.double() - exact).norm() < 1e-2 * exact.norm()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = expert_mlp(x, routing, up, down)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, again)


@pytest.mark.parametrize("rows, cols, k", [(1, 1, 16), (17, 300, 48), (300, 200, 1856), (5000, 3000, 512)])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_nvfp4_products(backend, rows, cols, k):
    """Against float64, with and without bias, added and in 16 bits; of the last size there are more tiles than processors."""
    a, b = (nk.quantize(torch.randn(n, k, device="cuda")) for n in (rows, cols))
    bias, out = torch.randn(cols, device="cuda"), torch.randn(rows, cols, device="cuda")
    left, right = a.dequantize(torch.float32).double(), b.dequantize(torch.float32).double()
    exact, magnitude = left @ right.t(), left.abs() @ right.abs().t()
    most = (k * magnitude + bias.abs() + out.abs()) * 2.0**-22  # tensor cores may cut off where fp32 rounds
    try:
        with nk.backend(backend):
            plain = nk.matmul(a, b, torch.float32)
            added = nk.matmul(a, b, bias=bias, out=out.clone(), accumulate=True)
            narrow = nk.matmul(a, b, torch.bfloat16)
    except nk.Refused as reason:
        pytest.skip(str(reason))
    assert ((plain - exact).abs() <= most).all()
    assert ((added - (exact + bias + out)).abs() <= most).all()
    assert torch.equal(narrow, plain.bfloat16())


def test_nvfp4_product_in_a_graph():
    a, other, b = (nk.quantize(torch.randn(n, 256, device="cuda")) for n in (300, 300, 512))
    expected = nk.matmul(other, b)
    graph, y = captured(lambda: nk.matmul(a, b))
    for part, to in a.tensors().items():
        to.view(torch.uint8).copy_(other.tensors()[part].view(torch.uint8)) if to.dim() else to.copy_(
            other.global_scale
        )
    graph.replay()
    assert torch.equal(y, expected)


def test_no_op_waits_for_the_device(no_sync):
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    noise = torch.zeros(2, dtype=torch.int64, device="cuda")
    noisy = nk.QuantSpec("1x16", "stochastic")
    row, col = nk.quantize_pair(x, noisy, noisy, noise)
    nk.matmul(row, row)
    nk.matmul(x, row)
    nk.matmul(col, col)
    row.dequantize()
    nk.hadamard(x)
    layer = nk.Linear(256, 64, device="cuda", recipe=nk.recipes.nvfp4.default)
    layer(x).sum().backward()
    state = torch.zeros(4, 2, 64, 128, device="cuda")
    heads, shared = x.view(4, 32, 1, 256)[..., :128].reshape(4, 32, 2, 64), x.view(4, 32, 1, 256)[..., 128:]
    A, dt = -torch.ones(2, device="cuda"), heads[..., 0]
    nk.state_update(state, heads[:, 0], dt[:, 0], A, shared[:, 0], shared[:, 0])
    nk.selective_scan(heads, dt, A, shared, shared)
    nk.causal_conv1d(x.view(4, 32, 256), torch.ones(256, 4, device="cuda"))
    nk.gated_rms_norm(x, x, torch.ones(256, device="cuda"), group_size=64)


def test_no_benchmark_waits_for_the_device():
    """Every op as the benchmarks call it, each backend alone, and a step of a model with all kinds of layers."""
    model = nk.HybridModel(nk.preset("tiny", hybrid_override_pattern="ME*-E"), "nvfp4").cuda().train()
    ids = torch.randint(0, 64, (2, 32), device="cuda")
    calls = [("hybrid model", lambda: model(ids).float().square().mean().backward(), ())]
    for case in all_cases("cuda", small=True):
        forced = (("native",), ("triton",)) if case.forced else ((),)
        calls += [(f"{case.op} {case.name} {backends}", case.ours, backends) for backends in forced]
    for name, call, backends in calls:
        with nk.backend(*backends):
            try:
                call()  # compiles
            except nk.Refused:
                continue
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            except RuntimeError as error:
                raise AssertionError(name) from error
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_more_than_2_31_values():
    """6 billion: the last rows must come out as they do alone."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GB of free memory")
    rows, cols = 1_500_000, 4096
    x = torch.ones(rows, cols, dtype=torch.bfloat16, device="cuda")
    x[-16:] = torch.randn(16, cols, device="cuda").clamp(-1, 1)
    q = nk.quantize(x)
    tail = nk.quantize(torch.cat([x[-16:], torch.ones_like(x[:1])]))  # the same amax
    assert torch.equal(q.codes[-16:], tail.codes[:16])
    assert torch.equal(q.scales[-16:].view(torch.uint8), tail.scales[:16].view(torch.uint8))
    assert torch.equal(q.dequantize(torch.bfloat16)[-16:], tail.dequantize(torch.bfloat16)[:16])


@pytest.mark.parametrize(
    "options", [{}, dict(state_dtype="fp16", stochastic=True)], ids=["fp32 states", "noisy states"]
)
def test_a_decode_step_is_one_graph(options):
    """Sequences that enter and leave say the same with graphs and without; every step but prefill is a replay."""
    torch.manual_seed(0)
    config = nk.preset("tiny", hybrid_override_pattern="ME*-E", torch_dtype="float32", initializer_range=0.2)
    model = nk.HybridModel(config).cuda().eval()
    said = []
    for graphs in (True, False):
        engine = nk.Engine(model, slots=5, **options)
        if not graphs:
            engine.decoder.record = None
        samplings = nk.Sampling(), nk.Sampling(0.9, 20, seed=5), nk.Sampling(0.0, repetition_penalty=1.3)
        requests = []
        for i in range(9):
            requests.append(engine.add(list(range(1, 3 + 7 * i)), samplings[i % 3], 4 + 5 * i))
            engine.step()
        for _ in engine.run():
            pass
        assert all((step.graph is not None) == graphs for step in engine.decoder._steps.values())
        said.append([request.tokens for request in requests])
    assert said[0] == said[1]


def test_packed_weights_of_an_engine():
    """NVFP4 matrices stay packed on the device, once, and the graph multiplies by them."""
    model = (
        nk.HybridModel(nk.preset("tiny", hybrid_override_pattern="M-*E-", torch_dtype="bfloat16"), "nvfp4")
        .cuda()
        .eval()
    )
    engine = nk.Engine(model, slots=2)
    weight = engine.model.backbone.layers[1].mixer.up_proj.weight
    request = engine.add([1, 2, 3], None, 12)
    for _ in engine.run():
        pass
    assert engine.model.backbone.layers[3].mixer.experts.up_proj.is_packed
    assert isinstance(weight, nk.PackedNVFP4Tensor) and len(request.tokens) == 12
    assert all(step.graph is not None for step in engine.decoder._steps.values())


@pytest.mark.parametrize("recipe", [nk.recipes.nvfp4.switch(stochastic=False), nk.recipes.bf16], ids=["nvfp4", "bf16"])
def test_shared_experts_on_a_second_stream(recipe, monkeypatch):
    """The bits that one stream gives, forward and backward, the memory of each step's tensors used again by the next."""
    from nvfp4_kernels.nn import moe as module

    moe = module.MoE(256, 16, 4, 128, 4096, 128).cuda().train()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.05)
    for linear in (moe.shared_experts.up_proj, moe.shared_experts.down_proj):
        linear.recipe = recipe.default
    xs = [torch.randn(4, 256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def steps():
        out = []
        for x in xs:
            y, _ = moe(x)
            out += [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *moe.shared_experts.parameters()))]
        return out

    beside = steps()
    monkeypatch.setattr(module, "aside", lambda f, x: lambda: f(x))
    for a, b in zip(beside, steps(), strict=True):
        assert torch.equal(a, b)
