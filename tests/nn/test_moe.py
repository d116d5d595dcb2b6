"""The mixture of experts against transformers' nemotron_h block and against a loop in fp64, in training and at inference."""

import copy
import gc
import weakref

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.nn import served
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import MoE, Router, sequence_balance_loss
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts
from nvfp4_kernels.ptq.calibrate import experts_as_modules
from nvfp4_kernels.recipe import HIGH, NVFP4

CASES = {  # hidden, experts, top_k, width, shared, latent, n_group, topk_group
    "plain": (64, 8, 3, 48, 96, None, 1, 1),
    "latent": (64, 8, 3, 48, 96, 32, 1, 1),
    "groups": (64, 8, 2, 48, 96, None, 4, 2),
    "latent groups": (48, 16, 4, 80, 64, 16, 4, 3),
    "top_k is all": (32, 4, 4, 48, 32, None, 1, 1),
    "nano's width": (64, 4, 2, 1856, 64, None, 1, 1),
}


def block(case, normalize=True):
    hidden, experts, top_k, width, shared, latent, n_group, topk_group = CASES[case]
    moe = MoE(hidden, experts, top_k, width, shared, latent, 2.5, n_group, topk_group, normalize)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
        moe.gate.e_score_correction_bias.normal_(std=0.3)
    return moe


def theirs(moe, case):
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    hidden, experts, top_k, width, shared, latent, n_group, topk_group = CASES[case]
    config = transformers.NemotronHConfig(
        hidden_size=hidden, n_routed_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=width,
        moe_shared_expert_intermediate_size=shared, moe_latent_size=latent, n_group=n_group, topk_group=topk_group,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "eager"
    made = modeling.NemotronHMoE(config)
    made.load_state_dict({name: t for name, t in moe.state_dict().items() if "noise" not in name})
    return made


def close(got, wanted, bound=1e-5):
    assert (got - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize("tokens", [(1, 1), (1, 17), (3, 40)])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(backend, case, tokens):
    moe = block(case)
    other, x = theirs(moe, case), torch.randn(*tokens, moe.gate.weight.shape[1])
    with torch.no_grad():
        wanted = other(x)
        close(moe.eval()(x)[0], wanted)
        close(moe.train()(x)[0], wanted)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_to_those_of_transformers(backend, case):
    moe = block(case)
    other = theirs(moe, case)
    x = torch.randn(2, 21, moe.gate.weight.shape[1], requires_grad=True)
    dy = torch.randn_like(x)
    theirs_of = {name: p for name, p in other.named_parameters()}
    wanted = torch.autograd.grad(other(x), [x, *theirs_of.values()], dy)
    for training in (True, False):
        y, _ = moe.train(training)(x)
        got = torch.autograd.grad(y, [x, *(dict(moe.named_parameters())[name] for name in theirs_of)], dy)
        for name, g, w in zip(["x", *theirs_of], got, wanted, strict=True):
            assert (g - w).norm() <= 2e-5 * w.norm(), name


def test_gradcheck():
    """In fp64: of x, router, latent projections, experts and the shared expert; groups and the balance loss as well."""
    moe = MoE(6, 4, 2, 5, 4, latent=3, scale=2.5, n_group=2, topk_group=2).double()
    names = [name for name, _ in moe.named_parameters()]
    leaves = [torch.randn_like(p).mul(0.5).requires_grad_() for p in moe.parameters()]

    def call(x, *leaves):
        y, balance = torch.func.functional_call(moe, dict(zip(names, leaves, strict=True)), x)
        return y, balance.loss

    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *leaves))


def test_serving_and_training_agree_in_bf16():
    moe = block("latent").bfloat16()
    moe.gate.float()
    x = torch.randn(2, 17, 64).bfloat16()
    with torch.no_grad():
        exact, _ = copy.deepcopy(moe).float().eval()(x.float())
    with torch.no_grad():
        for training in (True, False):
            y, _ = moe.train(training)(x)
            assert (y - exact).norm() <= 3 * 2**-8 * exact.norm()


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_quantized_experts_are_served_as_their_decoded_weights(tokens, kind):
    moe = block("latent").eval()

    def kept(stacked):
        if kind == "nvfp4":
            return NVFP4Weight.from_tensors([nk.quantize(w) for w in stacked])
        scales = torch.arange(1, len(stacked) + 1) / 1000
        return FP8Weight.from_tensors(
            (stacked / scales[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scales
        )

    up, down = (kept(stacked.detach()) for stacked in (moe.experts.up_proj, moe.experts.down_proj))
    x = torch.randn(1, tokens, 64, requires_grad=True)
    with torch.no_grad():
        moe.experts.up_proj.copy_(up.dequantize())
        moe.experts.down_proj.copy_(down.dequantize())
        wanted, _ = moe(x)
    moe.experts = QuantizedExperts(up, down)
    with torch.no_grad():
        close(moe(x)[0], wanted)
    y, _ = moe(x)  # with gradients: another path
    close(y, wanted)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.fixture
def calls(monkeypatch):
    """How often the one call was taken."""
    made, call = [], served.call
    monkeypatch.setattr(served, "call", lambda *given: made.append(1) or call(*given))
    return made


def as_parts(moe, x):
    """What the modules give one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served, "in_one_call", lambda x: False)
        return moe(x)[0]


def quantized_block(case):
    """In bf16, of all formats."""
    moe = block(case).bfloat16().eval()
    moe.gate.float()
    up, down = (
        NVFP4Weight.from_tensors([nk.quantize(w) for w in m.detach()])
        for m in (moe.experts.up_proj, moe.experts.down_proj)
    )
    moe.experts = QuantizedExperts(up, down)
    codes = moe.shared_experts.down_proj.weight.detach().to(torch.float8_e4m3fn)
    moe.shared_experts.down_proj = FP8Weight.from_tensors(codes, torch.tensor(0.5))
    moe.shared_experts.up_proj = NVFP4Weight.from_tensors(nk.quantize(moe.shared_experts.up_proj.weight.detach()))
    return moe


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_few_tokens_take_one_call(calls, case):
    moe = block(case).bfloat16().eval()
    moe.gate.float()
    hidden = moe.gate.weight.shape[1]
    for tokens in (1, 8):
        x = torch.randn(tokens, 1, hidden).bfloat16()
        assert torch.equal(moe(x)[0], as_parts(moe, x))
    assert len(calls) == 2
    moe = quantized_block(case)
    for tokens in (1, 64):
        x = torch.randn(1, tokens, hidden).bfloat16()
        close(moe(x)[0].float(), as_parts(moe, x).float(), 2**-7)
    assert len(calls) == 4
    moe(torch.randn(65, 1, hidden).bfloat16())
    assert len(calls) == 4


@torch.no_grad()
def test_what_was_made_of_the_block_follows_its_weights(calls):
    moe, x = quantized_block("latent"), torch.randn(2, 1, 64).bfloat16()
    changes = (
        lambda: moe.gate.weight.neg_(),
        lambda: moe.experts.down_proj.weight_scale_2.mul_(3),
        lambda: moe.fc1_latent_proj.weight.mul_(2),
        lambda: setattr(moe.fc2_latent_proj, "weight", torch.nn.Parameter(-moe.fc2_latent_proj.weight)),
        lambda: (
            setattr(moe.experts, "up_proj", copy.deepcopy(moe.experts.up_proj))
            or moe.experts.up_proj.weight.fill_(0x21)
        ),
        lambda: moe.gate.bfloat16().weight.neg_(),
        lambda: moe.gate.e_score_correction_bias.copy_(torch.arange(8) % 3),
    )
    before = moe(x)[0]
    for change in changes:
        change()
        y = moe(x)[0]
        assert not torch.equal(y, before) and torch.equal(y, copy.deepcopy(moe)(x)[0])
        close(y.float(), as_parts(moe, x).float(), 2**-7)
        before = y
    assert len(calls) == 1 + 2 * len(changes)
    held = weakref.ref(moe.experts)
    moe.experts = block("latent").bfloat16().experts
    gc.collect()
    assert held() is None  # what was made holds no weights


@torch.no_grad()
def test_modules_that_must_run_by_themselves_do(calls):
    x, seen = torch.randn(2, 1, 64).bfloat16(), []
    names = (
        "gate",
        "shared_experts",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
        "fc1_latent_proj",
        "fc2_latent_proj",
    )
    for name in names:
        moe = block("latent").bfloat16().eval()
        moe.gate.float()
        module = moe.get_submodule(name)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *given, name=name: seen.append(name))
            moe(x)
            handle.remove()
        forward = module.forward
        module.forward = lambda *given, forward=forward, name=name: seen.append(name) or forward(*given)
        moe(x)
        del module.forward
        assert not calls and seen == [name] * 3
        seen.clear()
        if isinstance(module, Linear):
            module.recipe = NVFP4
            moe(x)
            module.recipe, module.bias = HIGH, torch.nn.Parameter(torch.ones(module.out_features).bfloat16())
            moe(x)
            assert not calls
            module.bias = None
        moe(x)
        assert calls.pop() and not calls
    moe.experts.recipes = {"up_proj": NVFP4, "down_proj": HIGH}
    moe(x)
    moe.experts.recipes = {"up_proj": HIGH, "down_proj": HIGH}
    with experts_as_modules(moe):
        moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        moe(x)
    with nk.backend("reference"):
        moe(x)
    with torch.enable_grad():
        moe(x)
    assert not calls


def test_balance_is_for_training():
    moe, x = block("plain"), torch.randn(2, 9, 64)
    assert moe.eval()(x)[1] is None
    balance = moe.train()(x)[1]
    routing, logits = moe.gate(x.flatten(0, 1))
    assert torch.equal(balance.load, routing.offsets.diff()) and int(balance.load.sum()) == 2 * 9 * 3
    torch.testing.assert_close(balance.loss, sequence_balance_loss(torch.sigmoid(logits), routing.indices, 2))


def test_the_balance_loss_against_its_definition():
    """DeepSeek-V3, equations 17 to 20, sequence by sequence and expert by expert."""
    scores, top_k = torch.rand(12, 5, dtype=torch.float64), 2
    indices = scores.argsort(dim=1)[:, :top_k].contiguous()
    total = 0.0
    for tokens in (range(0, 4), range(4, 8), range(8, 12)):
        for e in range(5):
            f = 5 / (top_k * 4) * sum(e in indices[t].tolist() for t in tokens)
            p = sum(float(scores[t, e] / scores[t].sum()) for t in tokens) / 4
            total += f * p / 3
    assert float(sequence_balance_loss(scores, indices, 3)) == pytest.approx(total, rel=1e-14)


def test_a_model_in_bf16_still_moves_its_bias():
    """By steps that bf16 would round away, against loads that it could not count."""
    gate = Router(64, 4, 2, 1.0, 1, 1, True)
    gate.e_score_correction_bias.fill_(1.0)
    gate = gate.bfloat16().to("cpu")
    for _ in range(3):
        gate.load += torch.tensor([100, 1, 1, 1])
    gate.load[3] += 300
    gate.balance(1e-3)
    assert gate.weight.dtype == torch.bfloat16 and not gate.load.any()
    torch.testing.assert_close(
        gate.e_score_correction_bias, torch.tensor([0.999, 1.001, 1.001, 0.999]), atol=1e-7, rtol=0
    )
    assert gate.to_empty(device="meta").e_score_correction_bias.dtype == torch.float32


def test_run_to_run(backend):
    moe, x = block("latent"), torch.randn(2, 30, 64)
    results = []
    for _ in range(2):
        moe.zero_grad()
        y, balance = moe(x)
        (y.square().mean() + balance.loss).backward()
        results.append([y, *(p.grad for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 64), (2, 0, 64)])
def test_no_tokens(backend, shape):
    moe, x = block("latent"), torch.zeros(shape, requires_grad=True)
    with torch.no_grad():
        assert moe.eval()(x)[0].shape == x.shape
    y, balance = moe.train()(x)
    (y.sum() + balance.loss).backward()
    assert balance.loss == 0 and not balance.load.any() and x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in moe.parameters())


def test_errors_name_the_argument():
    for shape in ((7, 64), (1, 2, 7, 64), (2, 7, 63)):
        with pytest.raises(ValueError, match=r"x: got shape .*; allowed: \[batch, length, 64\]"):
            block("plain")(torch.zeros(shape))
