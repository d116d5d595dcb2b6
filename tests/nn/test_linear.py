"""nn.Linear and convert: caching, state, compiling, patterns."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import nvfp4_kernels as nk
from nvfp4_kernels.nn.forms import Derived
from nvfp4_kernels.nn.mamba2 import Mamba2
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.ops.matmul.op import few_rows
from nvfp4_kernels.ops.quantize import op as quantize_op
from nvfp4_kernels.recipe import HIGH, NVFP4


def count_quantized_weights(monkeypatch):
    calls = []
    import nvfp4_kernels.autograd.linear as module

    plain = quantize_op.quantize_pair
    monkeypatch.setattr(
        module, "quantize_pair", lambda x, row, col, noise=None: calls.append(row) or plain(x, row, col, noise)
    )
    return lambda: sum(spec is not None and spec.block == "16x16" for spec in calls)


@pytest.mark.parametrize("option", ["fused", "foreach", "capturable"])
def test_weight_is_quantized_once_a_step(monkeypatch, option):
    layer = nk.Linear(32, 48, recipe=NVFP4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **{option: option != "capturable"})
    counted = count_quantized_weights(monkeypatch)
    for step in range(3):
        for _ in range(4):
            layer(torch.randn(5, 32)).square().sum().backward()
        assert counted() == step + 1
        optimizer.step()
    before = layer(torch.ones(1, 32))
    with torch.no_grad():
        layer.weight.mul_(2)
    assert not torch.equal(layer(torch.ones(1, 32)), before)
    layer.recipe = NVFP4.switch(two_dimensional=False)
    assert layer(torch.ones(1, 32)).isfinite().all()


def test_state_holds_the_noise_and_resumes_bitwise():
    torch.manual_seed(5)
    layer = nk.Linear(32, 48, bias=True, recipe=NVFP4)

    def step(module):
        generator = torch.Generator().manual_seed(int(module.noise[1]))
        module.zero_grad()
        module(torch.randn(19, 32, generator=generator)).square().sum().backward()
        return module.weight.grad.clone()

    step(layer)
    state = copy.deepcopy(layer.state_dict())
    assert set(state) == {"weight", "bias", "noise"} and state["noise"][1] == 2
    continued = [step(layer) for _ in range(3)]
    torch.manual_seed(77)
    other = nk.Linear(32, 48, bias=True, recipe=NVFP4)
    other.load_state_dict(state)
    resumed = [step(other) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(continued, resumed, strict=True))
    assert not torch.equal(continued[0], continued[1])


@pytest.mark.parametrize("name", ["nvfp4", "nemotron3", "bf16"])
def test_compiles_to_one_graph(name):
    layer = nk.Linear(48, 32, bias=True, recipe=nk.recipes.RECIPES[name].for_module("layers.0.mixer.out_proj", 0.1))
    x = torch.randn(2, 17, 48, dtype=torch.bfloat16, requires_grad=True)
    state, results = copy.deepcopy(layer.state_dict()), []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.load_state_dict(state)
        layer.zero_grad()
        x.grad = None
        y = call(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.noise.clone()))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_copies_and_pickles():
    layer = nk.Linear(32, 16, recipe=NVFP4)
    layer(torch.randn(2, 32))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(torch.ones(3, 32)), layer(torch.ones(3, 32)))
    with torch.no_grad():
        twin.weight.zero_()
    assert twin(torch.ones(3, 32)).abs().max() == 0 and layer(torch.ones(3, 32)).abs().max() > 0
    import pickle

    assert torch.equal(pickle.loads(pickle.dumps(layer))(torch.ones(3, 32)), layer(torch.ones(3, 32)))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in range(10)
        )
        self.lm_head = nn.Linear(32, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return self.lm_head(x)


def test_convert_follows_names_and_depth():
    model = Toy()
    weights = {name: p for name, p in model.named_parameters()}
    assert nk.convert(model, "nvfp4") is model
    assert all(p is weights[name] for name, p in model.named_parameters())
    formats = {name: m.recipe.format for name, m in model.named_modules() if isinstance(m, nk.Linear)}
    assert formats.pop("lm_head") == "high"
    assert {name for name, f in formats.items() if f == "high"} == {
        f"layers.{i}.{n}" for i in (9,) for n in ("up", "down")
    } | {f"layers.8.{n}" for n in ("up", "down") if 8.5 / 10 > 0.85}
    model(torch.randint(10, (2, 7))).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_convert_include_exclude():
    model = nk.convert(Toy(), NVFP4, include=["layers.*.up"], exclude=["layers.0.*"])
    made = {name for name, m in model.named_modules() if isinstance(m, nk.Linear)}
    assert made == {f"layers.{i}.up" for i in range(1, 10)}
    assert not any(isinstance(m, nk.Linear) for m in nk.convert(Toy(), include=[]).modules())
    one = nk.convert(Toy(), include="*.up")
    assert sum(isinstance(m, nk.Linear) for m in one.modules()) == 10
    with pytest.raises(ValueError, match="include, exclude: got 'layer.\\*'"):
        nk.convert(Toy(), exclude=["layer.*"])
    assert isinstance(nk.convert(nn.Linear(16, 16), NVFP4), nk.Linear)
    again = nk.convert(model, "bf16")
    assert all(m.recipe == HIGH for m in again.modules() if isinstance(m, nk.Linear))


def test_a_recipe_by_name():
    assert nk.Linear(16, 8, recipe="nvfp4").recipe == nk.Linear(16, 8, recipe=nk.recipes.nvfp4).recipe == NVFP4
    assert nk.Linear(16, 8).recipe == nk.Linear.from_linear(nn.Linear(16, 8)).recipe == HIGH
    with pytest.raises(ValueError, match="recipe: got 'fp4'"):
        nk.Linear(16, 8, recipe="fp4")


def test_convert_keeps_the_modules():
    """What others hold of a model is what is converted: hooks, a layer used twice, a pruned weight."""
    first, hits = nn.Linear(16, 16), []
    first.register_forward_hook(lambda *_: hits.append("forward"))
    model = nn.ModuleDict({"a": first, "b": first, "pruned": prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.5)})
    nk.convert(model, NVFP4)
    assert model["a"] is model["b"] is first and type(first) is nk.Linear
    model["pruned"](model["b"](torch.randn(3, 16))).square().sum().backward()
    assert hits == ["forward"] and model["pruned"].weight_orig.grad.abs().max() > 0
    assert nk.convert(model, None) is model and type(first) is nn.Linear and hits == ["forward"]
    assert set(first.state_dict()) == {"weight", "bias"} and str(first) == str(nn.Linear(16, 16))
    first.forward = first.forward  # as tools do that hook in by assignment
    with pytest.raises(ValueError, match="a: got a forward of its own"):
        nk.convert(model, NVFP4)
    with pytest.raises(TypeError, match="model: got str"):
        nk.convert("model")


def test_convert_tells_of_weights_that_it_leaves():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 16, 16))

    model = nn.ModuleDict({"linear": nn.Linear(16, 16), "stacked": Stacked(), "embed": nn.Embedding(10, 16)})
    with pytest.warns(UserWarning, match="quantizes 25% .* Stacked 75%"):
        nk.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nk.convert(model, "bf16")
        nk.convert(model, include="linear")
        del model["stacked"]
        nk.convert(model)


@pytest.mark.parametrize("meta", [False, True])
def test_a_plain_checkpoint_loads_strictly(meta):
    plain = nn.Sequential(nn.Linear(16, 16))
    with torch.device("meta" if meta else "cpu"):
        model = nk.convert(nn.Sequential(nn.Linear(16, 16)), NVFP4)
    model.load_state_dict(plain.state_dict(), strict=True, assign=meta)
    assert torch.equal(model[0].weight, plain[0].weight)
    model(torch.randn(2, 16)).square().sum().backward()
    assert model[0].noise.tolist()[1] == 2


def test_inference_mode_between_two_steps():
    """The forms that an evaluation made are what the next training step saves for backward."""
    layer, stack, offsets = nk.Linear(16, 16, recipe=NVFP4), Experts(2, 16, 16), torch.tensor([0, 2, 4])
    stack.recipes = {"up_proj": NVFP4, "down_proj": NVFP4}
    for parameter in stack.parameters():
        nn.init.normal_(parameter)
    for call in (layer, lambda x: stack(x, offsets)):
        with torch.inference_mode():
            evaluated = call(torch.ones(4, 16))
        trained = call(torch.ones(4, 16))
        trained.sum().backward()
        assert torch.equal(trained, evaluated)


def test_a_decoded_token_is_multiplied_by_our_kernel(monkeypatch):
    layer = nk.Linear(64, 48, bias=True, dtype=torch.bfloat16)
    x = torch.randn(2, 4, 64).bfloat16()
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()
    found = []

    def watched(*operands):
        found.append(few_rows(*operands))
        return found[-1]

    monkeypatch.setattr("nvfp4_kernels.nn.linear.few_rows", watched)
    monkeypatch.setattr("nvfp4_kernels.ops._device.slow_in_16_bits", lambda: False)
    with torch.no_grad():
        few, many = layer(x), layer(x.repeat(2, 1, 1))
        with nk.backend("reference"):
            plain = layer(x)
        with pytest.raises(RuntimeError, match="shape|size"):
            layer(x[..., :32])
        mapped = torch.func.vmap(layer)(x)
    assert layer(x).requires_grad
    assert [y is not None for y in found] == [True] + [False] * 5
    for y in (few, many[:2], plain, mapped):
        assert y.dtype == torch.bfloat16 and (y.double() - exact).norm() < 5e-3 * exact.norm()


def test_the_short_way_is_taken_only_where_it_is_the_same():
    """Not for weights elsewhere than on the CPU, nor where torch records or casts."""
    layer, x = nk.Linear(64, 48, dtype=torch.bfloat16), torch.randn(2, 64).bfloat16()
    with torch.no_grad():
        assert few_rows(x, layer.weight) is not None
        assert few_rows(x, layer.weight.to("meta")) is None
        assert few_rows(x, layer.weight, torch.zeros(48, device="meta")) is None
        with torch.autocast("cpu", torch.float16):
            assert few_rows(x, layer.weight) is None and layer(x).dtype == torch.float16
        traced = torch.jit.trace(layer, x, check_trace=False)
        other = torch.randn(2, 64).bfloat16()
        torch.testing.assert_close(traced(other), layer(other), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_bias_in_fp32_beside_a_bf16_weight(rows):
    """As from_pretrained gives them, whether our kernel serves the rows or torch's."""
    layer, x = nk.Linear(32, 48, True, dtype=torch.bfloat16), torch.randn(rows, 32).bfloat16()
    with torch.no_grad():
        layer.bias = nn.Parameter(layer.bias.float() + 3.1)
        y, wanted = layer(x), x.double() @ layer.weight.double().T + layer.bias.double()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted, atol=0.04, rtol=0)  # an ulp at 4, of the bias or of the sum, is 1/32
    layer(x).sum().backward()
    assert layer.bias.grad.dtype == torch.float32 and bool((layer.bias.grad == rows).all())


def test_what_is_derived_is_made_anew():
    made = []
    derived = Derived(lambda t: made.append(1) or t.clone())
    x = torch.ones(2)
    assert torch.equal(derived.get(x), x) and derived.get(x) is derived.get(x) and len(made) == 1
    x += 1
    assert torch.equal(derived.get(x), x) and len(made) == 2
    x.data.mul_(2)  # nothing tells
    derived.clear()
    assert torch.equal(derived.get(x), x) and len(made) == 3
    assert torch.equal(derived.get(x.clone()), x) and len(made) == 4
    with torch.inference_mode():
        y = torch.ones(2)
        derived.get(y)
        y.mul_(3)
        assert torch.equal(derived.get(y), y)


def test_another_weight_at_the_same_address_is_another_weight():
    layer, x = nk.Linear(32, 32, recipe=NVFP4), torch.randn(4, 32)
    with torch.no_grad():
        for value in range(1, 30):
            layer(x)
            layer.weight = None
            layer.weight = nn.Parameter(torch.full((32, 32), float(value)))
            torch.testing.assert_close(layer(x), nk.linear(x, layer.weight, recipe=NVFP4), rtol=1e-5, atol=1e-5)


def test_refresh_after_writing_by_hand():
    layer, x = nk.Linear(32, 32, recipe=NVFP4), torch.randn(4, 32)
    with torch.no_grad():
        before = layer(x)
        layer.weight.data.mul_(2)
        layer.refresh()
        torch.testing.assert_close(layer(x), 2 * before, rtol=1e-5, atol=1e-5)


def test_refresh_of_experts_and_mixers():
    experts, mixer = Experts(1, 32, 32), Mamba2(32, 2, 16, 16, 1)
    experts.recipes = {"up_proj": NVFP4, "down_proj": NVFP4}
    x, token, offsets = torch.randn(4, 32), torch.randn(1, 1, 32), torch.tensor([0, 4])
    with torch.no_grad():
        experts.up_proj.normal_(), experts.down_proj.normal_()
        before, state = experts(x, offsets), mixer.new_state(1, torch.float32)
        mixer(token, state=state)
        experts.down_proj.data.mul_(2)
        mixer.D.data.zero_()
        experts.refresh(), mixer.refresh()
        torch.testing.assert_close(experts(x, offsets), 2 * before)
        fresh = copy.deepcopy(mixer)
        torch.testing.assert_close(mixer(token, state=copy.deepcopy(state)), fresh(token, state=copy.deepcopy(state)))
