"""The decode step is what a CUDA graph can hold: shown by one that records a call's ops and calls them again on the same
tensors, whatever the host does in between, against decoding without one."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nvfp4_kernels as nk
from nvfp4_kernels.generate import decode, graph, state
from nvfp4_kernels.generate.engine import Engine
from nvfp4_kernels.generate.sample import Form, Sampling
from nvfp4_kernels.generate.state import Pool, cache_scales
from nvfp4_kernels.generate.weights import serving
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts
from tests.test_no_host_sync import NoHost


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Graph:
    """The ops of run(), to be called again on the same tensors, the results put where they were the first time."""

    made = []

    def __init__(self, run):
        with Recording() as recording:
            self.result = run()
        self.calls, self.replays = recording.calls, 0
        self.made.append(self)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


@pytest.fixture
def graphs(monkeypatch):
    """Decoders have Graphs, and what those consist of is all in torch's ops."""
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(decode, "recorder", lambda device: Graph)
    with nk.backend("reference"):
        yield Graph.made


def test_the_graph_freezes_what_the_host_does():
    x, host = torch.zeros(2), [1.0]
    recorded = Graph(lambda: (x * 2 + host[0]).view(1, 2))
    x.fill_(5)
    host[0] = 7.0
    assert recorded.replay().tolist() == [[11.0, 11.0]]


MIXED = [
    Sampling(),
    Sampling(0.9, 20, seed=5),
    Sampling(0.8, top_p=0.9, min_p=0.02, seed=6),
    Sampling(0.0, repetition_penalty=1.3),
]
SCENES = {
    "greedy": ({}, [Sampling()]),
    "sampled": ({}, MIXED),
    "keys in fp8": (dict(kv_dtype="fp8"), MIXED[:2]),
    "noisy states": (dict(state_dtype="fp16", stochastic=True), [Sampling(0.9, seed=1 << 62), Sampling(1.1, seed=3)]),
}  # fmt: skip


def talk(model, options, samplings):
    """Tokens of nine requests over five slots, entering at different times, of different lengths, one taken out."""
    engine = Engine(model, slots=5, prefill_chunk=16, **options)
    generator, requests = torch.Generator().manual_seed(3), []
    for i in range(9):
        prompt = torch.randint(0, 40, (1 + 7 * i % 30,), generator=generator).tolist()
        requests.append(engine.add(prompt, samplings[i % len(samplings)], 4 + 5 * i % 17))
        for _ in range(i % 3):
            engine.step()
    engine.cancel(requests[4])
    for _ in engine.run():
        pass
    assert set(engine.pool.lengths) == {0}
    return [request.tokens for request in requests]


@pytest.mark.parametrize("scene", SCENES)
def test_decoding_by_graphs_says_the_same(build, graphs, monkeypatch, scene):
    for module in (state, decode):
        monkeypatch.setattr(module, "PAGE", 8)  # so that keys move while sequences grow
    options, samplings = SCENES[scene]
    model = build("ME*M-E")
    said = talk(model, options, samplings)
    assert len(graphs) > 3 and sum(made.replays for made in graphs) > 2 * len(graphs)
    monkeypatch.setattr(decode, "recorder", lambda device: None)
    made = len(graphs)
    assert talk(model, options, samplings) == said and len(graphs) == made
    assert len({tuple(tokens) for tokens in said}) == 9


@torch.no_grad()
def test_rows_without_a_sequence_leave_no_trace(build, graphs):
    """Neither in slots that have none, nor in those of prompts that are being read."""
    engine = Engine(build("M*M"), slots=4, prefill_chunk=4)
    engine.add([1], None, 30)
    engine.step()
    engine.add([2] * 12, None, 4)
    engine.step()

    def tensors():
        return [t for layer in engine.pool.layers for t in vars(layer).values() if isinstance(t, torch.Tensor)]

    before = [t.clone() for t in tensors()]
    engine.decoder(engine.running[:1])
    after = [t.clone() for t in tensors()]
    assert all(torch.equal(now[1:], then[1:]) for now, then in zip(after, before, strict=True))
    assert not any(torch.equal(now[0], then[0]) for now, then in zip(after, before, strict=True))
    engine.decoder._steps.clear()
    for leading in (True, False):  # and a step in which no row has one
        engine.decoder._prepare(decode.Shape(4, 512, leading, Form.of([Sampling()]))).graph.replay()
        assert all(torch.equal(now, then) for now, then in zip(tensors(), after, strict=True))


def test_graphs_go_when_keys_move(build, graphs, monkeypatch):
    """A long sequence between two short ones, which one shape serves."""
    for module in (state, decode):
        monkeypatch.setattr(module, "PAGE", 8)
    engine, said = Engine(build("**"), slots=1), []
    for length in (2, 30, 2):
        request = engine.add(list(range(1, 1 + length)), None, 5)
        for _ in engine.run():
            pass
        said.append(request.tokens)
    assert said[0] == said[2] != said[1] and len(graphs) == 4


def test_old_graphs_go_and_a_device_that_cannot_record_decodes_without(build, graphs, monkeypatch):
    monkeypatch.setattr(decode, "MOST_STEPS", 2)
    model = build("M")
    engine = Engine(model, slots=4)
    for i in range(4):
        engine.add([i], None, 2 + i)
    for _ in engine.run():
        assert len(engine.decoder._steps) <= 2
    assert len(graphs) == 3  # rows of 4, 2 and 1
    monkeypatch.setattr(decode, "recorder", lambda device: lambda run: None)
    other = Engine(model, slots=1)
    request = other.add([3], None, 5)
    for _ in other.run():
        pass
    assert other.decoder.record is None and len(request.tokens) == 5


def test_why_there_is_no_graph_is_said(monkeypatch):
    def refuse(run, device, memory):
        raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(graph, "CudaGraph", refuse)
    record = graph.recorder(torch.device("cuda"))
    with pytest.warns(UserWarning, match="decoding without a CUDA graph: called a synchronizing"):
        assert record(lambda: torch.ones(1)) is None
    assert graph.recorder(torch.device("cpu")) is None


def test_other_threads_may_use_their_gpus_while_a_graph_is_recorded(monkeypatch):
    """The default mode breaks a recording off, and their calls too, when one of them so much as allocates."""
    cuda = mock.MagicMock()
    cuda.graph = lambda made, pool, capture_error_mode="global": modes.append(capture_error_mode) or nullcontext()
    modes = []
    monkeypatch.setattr(graph.torch, "cuda", cuda)
    assert graph.CudaGraph(lambda: 5, "a device", (0, 1)).replay() == 5
    assert modes == ["thread_local"]


@pytest.mark.parametrize("rows, served", [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (17, 24), (64, 64)])
def test_buckets(rows, served):
    assert decode.bucket(rows) == served


def quantize_on_meta(model):
    """NVFP4 and FP8 layers in the place of linear ones, NVFP4 experts, all without values."""
    for name, module in list(model.named_modules()):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if isinstance(module, Linear) and leaf in ("up_proj", "out_proj", "q_proj"):
            kind = FP8Weight if leaf == "q_proj" else NVFP4Weight
            setattr(owner, leaf, kind(module.in_features, module.out_features, device="meta"))
        elif isinstance(module, Experts):
            experts, width, size = module.up_proj.shape
            options = dict(experts=experts, device="meta")
            setattr(
                owner, leaf, QuantizedExperts(NVFP4Weight(size, width, **options), NVFP4Weight(width, size, **options))
            )


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_step_reads_nothing_on_the_host_and_sends_nothing(noisy, quantized):
    """On tensors without values, of a device that is not the CPU: as tests/test_no_host_sync.py."""
    with torch.device("meta"):
        model = nk.HybridModel(nk.preset("tiny", hybrid_override_pattern="ME*-E", torch_dtype="bfloat16")).eval()
    if quantized:
        quantize_on_meta(model)
    model = serving(model.bfloat16())
    blocks, states = model.backbone.layers, torch.float16 if noisy else torch.float32
    pool = Pool(blocks, 4, torch.bfloat16, states, "meta", cache_scales(blocks, "meta") if quantized else None)
    for form, leading in ((Form.of(MIXED), False), (Form.of([Sampling()] * 4), True)):
        step = decode.Step(model, pool, decode.Shape(4, 512, leading, form), True, noisy)
        with NoHost():
            tokens = step.run()
        assert tokens.shape == (4,) and tokens.dtype == torch.int64 and tokens.is_meta
