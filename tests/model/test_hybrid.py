"""The model as trained: packed documents, checkpointing, losses, balancing, recipes, saving."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvfp4_kernels.checkpoint.huggingface import from_pretrained, save_pretrained
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.model.presets import preset

ROOT = Path(__file__).parents[2]
SMALL = dict(
    vocab_size=40, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=48,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, chunk_size=8, n_routed_experts=8,
    num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, moe_latent_size=16,
    routed_scaling_factor=2.5, initializer_range=0.2,
)  # fmt: skip


def small(pattern="ME*M-E", dtype="float32", **changes):
    torch.manual_seed(0)
    return HybridModel(HybridConfig(hybrid_override_pattern=pattern, torch_dtype=dtype, **(SMALL | changes)))


def ids_and_labels(batch=2, length=24, vocab=40):
    ids = torch.randint(0, vocab, (batch, length + 1))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pattern", ["M", "E", "*", "-", "ME*M-E"])
@pytest.mark.parametrize("bounds", [[0, 5, 24, 30, 31, 48], [0, 24, 36, 48], [0, 1, 2, 24, 48]])
def test_packed_documents_are_separate_documents(pattern, bounds):
    model = small(pattern).eval()
    ids, _ = ids_and_labels()
    packed = model(ids, torch.tensor(bounds, dtype=torch.int32)).flatten(0, 1)
    flat = ids.flatten()
    for start, end in zip(bounds, bounds[1:], strict=False):
        alone = model(flat[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["M", "*", "ME*M-E"])
def test_neighbours_cannot_leak(pattern):
    """Not by a bit; but experts multiply the rows of all documents at once, and their number sways the order of sums, by some
    roundings of their terms, which are as large as the largest of results."""
    model = small(pattern).eval()
    ids, _ = ids_and_labels(batch=1, length=48)
    cu_seqlens = torch.tensor([0, 13, 31, 48])
    before = model(ids, cu_seqlens)[:, 13:31]
    ids[:, :13] = (ids[:, :13] + 7) % 40
    ids[:, 31:] = (ids[:, 31:] + 3) % 40
    roundings = 8 * torch.finfo(torch.float32).eps * before.detach().abs().max().item() if "E" in pattern else 0.0
    torch.testing.assert_close(model(ids, cu_seqlens)[:, 13:31], before, atol=roundings, rtol=0)


@pytest.mark.parametrize("pattern", ["M", "E", "*", "ME*M-E"])
def test_no_token_sees_the_future(pattern):
    model = small(pattern).eval()
    ids, _ = ids_and_labels(batch=1, length=30)
    before = model(ids)[:, :17]
    ids[:, 17:] = (ids[:, 17:] + 5) % 40
    torch.testing.assert_close(model(ids)[:, :17], before, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 1), (1, 17), (2, 9)])
@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_odd_sizes_train(batch, length, recipe):
    model = small(dtype="bfloat16", num_nextn_predict_layers=1)
    model.set_recipe(recipe)
    losses = model.loss(*ids_and_labels(batch, length))
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(g.isfinite().all() for g in gradients(model).values())


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4", "nemotron3"])
def test_checkpointed_activations_change_no_bit(recipe):
    model = small(dtype="bfloat16", num_nextn_predict_layers=1)
    model.set_recipe(recipe)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, labels = ids_and_labels()
    results = []
    for model.checkpoint_activations in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        losses = model.loss(ids, labels, torch.tensor([0, 7, 24, 48]))
        losses.total.backward()
        loads = {name: router.load.clone() for name, router in model.routers().items()}
        results.append((losses, gradients(model), loads, {n: t.clone() for n, t in model.state_dict().items()}))
        model.update_router_bias()
    (losses, grads, loads, state), (losses_2, grads_2, loads_2, state_2) = results
    assert all(torch.equal(a, b) for a, b in zip(losses, losses_2, strict=True))
    for one, other in ((grads, grads_2), (loads, loads_2), (state, state_2)):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("pattern", ["M", "*", "ME*M-E"])
@pytest.mark.parametrize("pieces", [[1] * 12, [7, 1, 1, 3], [12]])
def test_decoding_with_a_state_equals_the_whole_sequence(pattern, pieces):
    model = small(pattern).eval()
    ids, _ = ids_and_labels(length=12)
    state, parts = model.new_state(2), []
    with torch.no_grad():
        for piece in ids.split(pieces, 1):
            parts.append(model(piece, state=state))
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=2e-5, rtol=2e-5)
    with pytest.raises(ValueError, match="state: got both"):
        model(ids, torch.tensor([0, 12, 24]), state=state)


def test_compiles_whole():
    model, (ids, labels) = small("ME*-"), ids_and_labels()
    model.set_recipe("nvfp4")
    noise = [b.clone() for b in model.buffers()]

    def step(loss):
        for b, before in zip(model.buffers(), noise, strict=True):
            b.copy_(before)
        model.zero_grad()
        losses = loss(ids, labels)
        losses.total.backward()
        return losses, gradients(model), [b.clone() for b in model.buffers()]

    compiled = step(torch.compile(model.loss, fullgraph=True, backend="eager"))
    torch.testing.assert_close(compiled, step(model.loss), rtol=0, atol=0)


def test_losses_are_their_formulas():
    model = small("*E", num_nextn_predict_layers=1, mtp_num_depths=2)
    ids, labels = ids_and_labels()
    labels[0, :5] = -100
    losses = model.loss(ids, labels)
    logits = model.eval()(ids).log_softmax(-1)
    counted = [(b, t) for b in range(2) for t in range(24) if labels[b, t] != -100]
    expected = -sum(logits[b, t, labels[b, t]] for b, t in counted) / len(counted)
    torch.testing.assert_close(losses.lm, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.total.detach(), losses.lm + losses.mtp + losses.balance)
    none = model.loss(ids, torch.full_like(labels, -100))
    assert none.lm == 0 and none.mtp == 0


def test_mtp_reads_the_token_d_further_on_and_predicts_the_one_after():
    model = small("*-", num_nextn_predict_layers=1, mtp_num_depths=2, mtp_hybrid_override_pattern="*-").eval()
    ids, labels = ids_and_labels(batch=1, length=12)
    losses = model.loss(ids, labels)
    hidden = model._hidden(ids, None)[0]
    table, total = model.backbone.embeddings.weight, 0.0
    for depth in (1, 2):
        known = (
            12 - depth
        )  # the positions whose token d further on lies in the row; the rest read token 0, and do not count
        following = torch.cat([ids[0, depth:], torch.zeros(depth, dtype=torch.long)])
        first, last = model.mtp.layers[0], model.mtp.layers[-1]
        x = first.eh_proj(torch.cat([first.enorm(table[following][None]), first.hnorm(hidden)], -1))
        for layer in model.mtp.layers:
            x = layer(x)[0]
        hidden = last.final_layernorm(x)
        logs = model.lm_head(hidden)[0].log_softmax(-1)
        total += -sum(logs[t, labels[0, t + depth]] for t in range(known)) / known
    torch.testing.assert_close(losses.mtp, (0.3 / 2 * total).detach(), atol=1e-5, rtol=1e-5)


def test_mtp_does_not_look_into_the_next_document():
    model = small("M-", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*-")
    ids, labels = ids_and_labels(batch=1, length=20)
    cu_seqlens = torch.tensor([0, 11, 20])
    for depth in (1, 2):  # the mean runs over 20 - 2 * depth positions
        object.__setattr__(model.config, "mtp_num_depths", depth)
        parts = [(model.loss(ids[:, a:b], labels[:, a:b]).mtp, b - a) for a, b in ((0, 11), (11, 20))]
        if depth == 1:
            expected = sum(mtp * (n - 1) for mtp, n in parts) / 18
            torch.testing.assert_close(model.loss(ids, labels, cu_seqlens).mtp, expected, atol=1e-5, rtol=1e-5)
    before = model.loss(ids, labels, cu_seqlens).mtp
    ids[0, 11:], labels[0, 11:] = (ids[0, 11:] + 1) % 40, -100  # the second document changes and no longer counts
    labels[0, 10] = -100
    after = model.loss(ids, labels, cu_seqlens).mtp
    alone = model.loss(ids[:, :11], labels[:, :11]).mtp
    assert before != after
    torch.testing.assert_close(after, alone, atol=1e-5, rtol=1e-5)


def test_the_block_of_mtp_can_be_left_out():
    assert small().mtp is None and small().loss(*ids_and_labels()).mtp == 0


def test_weights_before_and_after_the_second_matrix_are_equal_up_to_rounding():
    model = small("E")
    ids, _ = ids_and_labels()
    torch.testing.assert_close(model.train()(ids), model.eval()(ids), atol=1e-5, rtol=1e-5)


def test_the_bias_moves_against_the_load():
    model = small("EE", n_routed_experts=4)
    model.loss(*ids_and_labels()).total.backward()
    model.loss(*ids_and_labels()).total.backward()
    loads = [router.load.double() for router in model.routers().values()]
    assert all(load.sum() == 2 * 2 * 24 * 2 for load in loads)
    stats = model.expert_load()
    worst = max(float(load.max() / load.mean() - 1) for load in loads)
    assert stats["max_violation"] == pytest.approx(worst) and 0 <= stats["idle"] < 1
    shares = [[n / float(load.sum()) for n in load.tolist()] for load in loads]
    entropies = [-sum(p * math.log(p) for p in share if p) for share in shares]
    assert stats["entropy"] == pytest.approx(sum(entropies) / len(entropies))
    model.update_router_bias()
    for load, router in zip(loads, model.routers().values(), strict=True):
        expected = [1e-3 if n < load.mean() else -1e-3 if n > load.mean() else 0.0 for n in load]
        torch.testing.assert_close(router.e_score_correction_bias, torch.tensor(expected))
        assert router.load.sum() == 0
    assert model.expert_load() == {}
    model.eval().loss(*ids_and_labels())
    assert model.expert_load() == {}


def test_balancing_evens_out_a_skewed_router():
    model = small("E", n_routed_experts=4, num_experts_per_tok=1, router_bias_update_rate=2e-2)
    router = next(iter(model.routers().values()))
    with torch.no_grad():
        router.e_score_correction_bias.copy_(torch.tensor([2.0, 0.0, 0.0, -2.0]))
    ids, _ = ids_and_labels(8, 32)
    with torch.no_grad():
        model(ids)
        first = model.expert_load()["max_violation"]
        for _ in range(150):
            model(ids)
            last = model.expert_load()["max_violation"]
            model.update_router_bias()
    assert first > 2.5 and last < 0.5


def test_recipes_reach_every_linear_by_name_and_depth():
    model = small("MEM*EMEM-E", num_nextn_predict_layers=1)
    model.set_recipe("nemotron3")
    layers = model.backbone.layers
    assert layers[0].mixer.in_proj.recipe.format == "nvfp4"
    assert layers[0].mixer.out_proj.recipe.format == "mxfp8"
    assert layers[1].mixer.experts.recipes["up_proj"].format == "nvfp4"
    assert layers[1].mixer.shared_experts.up_proj.recipe.format == "nvfp4"
    high = (
        layers[1].mixer.fc1_latent_proj, layers[3].mixer.q_proj, layers[3].mixer.o_proj, layers[9].mixer.shared_experts.up_proj,
        model.lm_head, model.mtp.layers[0].eh_proj,
    )  # fmt: skip
    assert all(not linear.recipe.quantized for linear in high)
    assert not model.mtp.layers[1].mixer.experts.recipes["down_proj"].quantized
    assert not layers[9].mixer.experts.recipes["up_proj"].quantized  # the last 15 % of the layers
    model.set_recipe("bf16")
    assert not layers[0].mixer.in_proj.recipe.quantized


@pytest.mark.parametrize("recipe", ["nvfp4", "nemotron3"])
def test_quantized_training_learns(recipe):
    model = small("MEM*E---", dtype="bfloat16")
    model.set_recipe(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, labels = ids_and_labels()
    first = model.loss(ids, labels).lm
    for _ in range(12):
        loss = model.loss(ids, labels)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.lm < 0.7 * first


def test_save_and_load(tmp_path):
    model = small(num_nextn_predict_layers=1).eval()
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config
    ids, _ = ids_and_labels()
    assert torch.equal(loaded(ids), model(ids))


def test_tied_embeddings_are_one_parameter():
    model = small(tie_word_embeddings=True)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert sum("embeddings" in n or "lm_head" in n for n, _ in model.named_parameters()) == 1


def test_initial_weights_are_as_published():
    torch.manual_seed(0)
    model = HybridModel(preset("tiny", initializer_range=0.02, num_nextn_predict_layers=1, use_conv_bias=True))
    layers, depth = model.backbone.layers, math.sqrt(model.config.num_hidden_layers)
    mamba, moe = layers[0].mixer, layers[1].mixer
    for weight, std in (
        (model.backbone.embeddings.weight, 0.02), (model.lm_head.weight, 0.02), (mamba.in_proj.weight, 0.02),
        (mamba.out_proj.weight, 0.02 / depth), (moe.experts.up_proj, 0.02), (moe.experts.down_proj, 0.02 / depth),
        (moe.gate.weight, 0.02), (moe.shared_experts.down_proj.weight, 0.02 / depth),
    ):  # fmt: skip
        weight = weight.detach()
        assert float(weight.std()) == pytest.approx(std, rel=0.1) and abs(float(weight.mean())) < 0.1 * std
    heads = [layer.mixer for layer in layers if hasattr(layer.mixer, "A_log")]
    A = torch.cat([m.A_log.exp() for m in heads])
    steps = torch.nn.functional.softplus(torch.cat([m.dt_bias for m in heads]))
    assert 1 <= A.min() and A.max() <= 16 and A.std() > 2
    assert 0.99e-3 < steps.min() < 4e-3 and 0.03 < steps.max() < 0.101
    assert all((m.D == 1).all() and (m.norm.weight == 1).all() for m in heads)


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_nothing_depends_on_the_default_dtype(default, recipe):
    ids, labels = ids_and_labels(length=9)

    def results():
        model = small(num_nextn_predict_layers=1)
        model.set_recipe(recipe)
        model.to("cpu").loss(ids, labels).total.backward()
        states = [*model.parameters(), *gradients(model).values(), *model.buffers()]
        return [*states, model.eval().generate(ids, 4), model(ids, state=model.new_state(2))]

    want = results()
    torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, ids: m(ids[0]), r"ids: got torch.int64 \[24\]"),
        (lambda m, ids: m(ids.float()), "ids: got torch.float32"),
        (lambda m, ids: m.loss(ids, ids[:, 1:]), r"labels: got shape \[2, 23\]; allowed: \[2, 24\]"),
        (lambda m, ids: m(ids.tolist()), "ids: got list; allowed: an int64 tensor"),
        (lambda m, ids: m.loss(ids, ids.int()), "labels: got torch.int32; allowed: int64"),
        (lambda m, ids: m(ids, [0, 24, 48]), "cu_seqlens: got list; allowed: an int32 or int64 tensor"),
        (lambda m, ids: m(ids, torch.tensor([0, 30, 48])), "cu_seqlens: got .* with each multiple of 24"),
        (lambda m, ids: m(ids, torch.tensor([0, 24])), "cu_seqlens: got"),
        (lambda m, ids: m(ids, torch.tensor([0, 24, 24, 48])), "cu_seqlens: got"),
        (lambda m, ids: m.set_recipe("int4"), "recipe: got 'int4'; allowed: bf16"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(small(), ids_and_labels()[0])


def test_a_model_on_the_meta_device_imports_no_compiler():
    """torch draws and stacks there in Python, by way of torch._dynamo: half of what nvfp4 generate waited for."""
    code = (
        "import sys, torch; from nvfp4_kernels.api import HybridModel, preset\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "with torch.device('meta'): HybridModel(preset('tiny', num_nextn_predict_layers=1), 'nvfp4')\n"
        "print('torch._dynamo' in sys.modules, before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(set(done.stdout.split())) == 1
