"""Sequences that enter and leave, chunks, seeds and masks against each sequence alone and against the whole context anew."""

import copy
import threading

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.generate.engine import Engine
from nvfp4_kernels.generate.sample import Sampling
from nvfp4_kernels.generate.weights import serving
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.recipe import get_recipe


def prompts_of(count, longest=12):
    return [torch.randint(0, 40, (1 + (i * 5) % longest,)).tolist() for i in range(count)]


def run(engine):
    for _ in engine.run():
        pass


@pytest.mark.parametrize("chunk", [1, 5, 2048])
@pytest.mark.parametrize("pattern", ["ME*M-E", "M", "**E"])
def test_greedy_is_the_whole_context_again_for_each_token(build, greedy, pattern, chunk):
    model, prompts = build(pattern), prompts_of(4)
    engine = Engine(model, slots=3, prefill_chunk=chunk, pack_prompts=True)
    requests = [engine.add(prompt, max_new_tokens=8 + i) for i, prompt in enumerate(prompts)]
    run(engine)
    for i, request in enumerate(requests):
        assert request.tokens == greedy(model, prompts[i], 8 + i) and request.finished == "length"
    assert not engine.busy and sorted(engine._free) == [0, 1, 2] and set(engine.pool.lengths) == {0}


@pytest.mark.parametrize("speculative", [0, 2])
@pytest.mark.parametrize(
    "dtype, options",
    [
        ("float32", {}),
        ("float32", dict(state_dtype="fp16", stochastic=True)),
        ("float32", dict(state_dtype="bf16")),
        ("bfloat16", {}),
    ],
    ids=str,
)
def test_a_seed_gives_the_same_text_in_any_company(build, dtype, options, speculative):
    """Of 3 slots, of 1, entering early or late, in any order."""
    wide = dict(hidden_size=256, moe_intermediate_size=128) if dtype == "bfloat16" else {}  # much to round
    model, prompts = build(num_nextn_predict_layers=1, moe_latent_size=16, dtype=dtype, **wide), prompts_of(6)
    prompts = [prompt * 4 for prompt in prompts] if wide else prompts
    samplings = [Sampling(0.9, top_k=20, seed=i // 2) for i in range(6)]
    options = options | dict(speculative=speculative)

    def texts(order, slots, late):
        engine, got = Engine(model, slots=slots, **options), {}
        for place, i in enumerate(order):
            got[i] = engine.add(prompts[i], samplings[i], 12)
            for _ in range(late * place):
                engine.step()
        run(engine)
        return [got[i].tokens for i in range(6)]

    alone = texts(range(6), 1, 0)
    assert texts(range(6), 6, 0) == alone == texts([3, 1, 5, 0, 4, 2], 3, 2)
    assert len({tuple(t) for t in alone}) == 6


@pytest.mark.parametrize("steps", [0, 2], ids=["reading", "growing"])
def test_after_an_error_within_the_layers(build, greedy, steps):
    model = build("MEM*")
    engine = Engine(model, slots=1)
    lost, waiting = engine.add([1, 2, 3], max_new_tokens=9), engine.add([4, 5], max_new_tokens=6)
    for _ in range(steps):
        engine.step()

    def interrupted(*_):
        raise KeyboardInterrupt

    handle = engine.model.backbone.layers[2].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    handle.remove()
    assert lost.finished == "failed" and waiting.finished is None and engine._free == [0]
    again = engine.add([1, 2, 3], max_new_tokens=9)
    run(engine)
    assert waiting.tokens == greedy(model, [4, 5], 6) and again.tokens == greedy(model, [1, 2, 3], 9)


def test_requests_come_from_other_threads(build, greedy):
    model = build("M")
    engine, requests = Engine(model, slots=2), []

    def add(first):
        requests.extend(engine.add([first, i], max_new_tokens=3) for i in range(8))

    threads = [threading.Thread(target=add, args=(first,)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    while engine.busy or any(thread.is_alive() for thread in threads):
        engine.step()
    assert len(requests) == 16 and all(r.tokens == greedy(model, r.prompt, 3) for r in requests)


def test_stop_ids_and_length(build, greedy):
    model = build()
    whole = greedy(model, [1, 2, 3], 12)
    stop = whole[7]
    engine = Engine(model)
    stopped = engine.add([1, 2, 3], None, 12, [stop])
    one = engine.add([1, 2, 3], None, 1)
    events = list(engine.run())
    assert stopped.tokens == whole[: whole.index(stop)] and stopped.finished == "stop"
    assert one.tokens == whole[:1] and one.finished == "length"
    heard = [token for event in events if event.request is stopped for token in event.tokens]
    assert heard == stopped.tokens and [e.finished for e in events if e.request is stopped][-1] == "stop"


def test_cancelled_sequences_free_their_slots(build, greedy):
    model = build()
    engine = Engine(model, slots=1)
    first, second, third = (engine.add([i], None, 6) for i in (1, 2, 3))
    engine.step()
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(first)
    run(engine)
    assert first.finished == second.finished == "cancelled" and len(first.tokens) > 0 and second.tokens == []
    assert third.tokens == greedy(model, [3], 6)


def test_of_a_prompt_the_last_state_alone_is_kept(build):
    engine = Engine(build("M"), slots=1)
    request = engine.add([1, 2, 3, 4], max_new_tokens=2)
    engine.step()
    assert request.hidden.untyped_storage().nbytes() == request.hidden.nbytes


def test_those_that_grow_go_on_while_a_long_prompt_is_read(build):
    engine = Engine(build(), slots=2, prefill_chunk=4)
    short = engine.add([1], None, 40)
    engine.step()
    long = engine.add([2] * 20, None, 4)
    before = len(short.tokens)
    for _ in range(4):
        engine.step()
    assert len(short.tokens) == before + 4 and long.tokens == []
    engine.step()
    assert len(long.tokens) == 1


def test_repetition_penalty_counts_prompt_and_text(build):
    model, ids = build(initializer_range=0.1), [4, 5, 6]
    engine = Engine(model)
    penalized, plain = (engine.add(ids, Sampling(0.0, repetition_penalty=penalty), 25) for penalty in (1.4, 1.0))
    assert penalized.seen is None  # `add` does nothing on a device, where another thread may be recording a graph
    run(engine)
    for _ in range(25):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].tolist()
        for token in set(ids):
            logits[token] *= 1 / 1.4 if logits[token] > 0 else 1.4
        ids = [*ids, logits.index(max(logits))]
    assert penalized.tokens == ids[3:] != plain.tokens


def test_left_padded_batches_are_single_prompts(build):
    model = build("ME*M-E", moe_latent_size=16, eos_token_id=[7, 9], pad_token_id=3)
    lengths, width = (6, 1, 9, 4), 9
    ids, mask = torch.randint(0, 40, (4, width)), torch.zeros(4, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    for options in ({}, dict(temperature=1.0, seed=[5, 6, 7, 8], top_p=0.9)):
        got = model.generate(ids, 15, attention_mask=mask, **options)
        assert torch.equal(got[:, :width], ids)
        for row, length in enumerate(lengths):
            own = options | ({"seed": options["seed"][row]} if "seed" in options else {})
            alone = model.generate(ids[row : row + 1, -length:], 15, **own)[0, length:]
            new = got[row, width:]
            assert torch.equal(new[: len(alone)], alone) and (new[len(alone) :] == 3).all()
    assert model.generate(ids[:, :3], 2, stop_ids=[]).shape == (4, 5)


@torch.no_grad()
def decoded(model):
    """A copy of the model whose weights are, in fp32, what its recipe's forms of them stand for."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, Linear) and module.recipe.quantized:
            module.weight.copy_(nk.quantize(module.weight, module.recipe.fprop_w).dequantize(torch.float32))
        elif isinstance(module, Experts):
            for part, recipe in module.recipes.items():
                for matrix in getattr(module, part) if recipe.quantized else ():
                    matrix.copy_(nk.quantize(matrix, recipe.fprop_w).dequantize(torch.float32))
    plain.set_recipe("bf16")
    return plain


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4", "nemotron3"])
def test_served_weights_are_those_that_training_multiplies_with(build, recipe):
    model = build("MEM*E---", num_nextn_predict_layers=1)
    model.set_recipe(recipe)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    served, ids = serving(model), torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(served(ids), decoded(model)(ids), atol=2e-4, rtol=2e-4)
    kept = type(served.backbone.layers[1].mixer.experts).__name__
    assert kept == ("Experts" if recipe == "bf16" else "QuantizedExperts")
    assert served.backbone.layers[1].mixer.gate.weight is model.backbone.layers[1].mixer.gate.weight
    assert model.recipe == get_recipe(recipe) and model.lm_head.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    made = serving(build("M", tie_word_embeddings=True, dtype="bfloat16"))
    assert made.lm_head.weight.dtype == torch.bfloat16
    assert made.lm_head.weight.data_ptr() == made.backbone.embeddings.weight.data_ptr()


def test_experts_of_odd_widths_are_served_decoded(build):
    model = build("E", hidden_size=40, moe_intermediate_size=24)
    model.set_recipe(get_recipe("nvfp4").default)
    served, ids = serving(model), torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(served(ids), decoded(model)(ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("inside", ["Engine", "add", "step"])
def test_inference_mode_may_come_and_go(build, inside):
    model, prompt = build("ME*"), [1] * 510  # keys are to move within the steps
    want = model.generate(torch.tensor([prompt]), 6)[0, 510:].tolist()
    penalized = Sampling(repetition_penalty=1.1)  # marks what it has seen
    with torch.inference_mode(inside == "Engine"):
        engine = Engine(model)
    with torch.inference_mode(inside == "add"):
        requests = [engine.add(prompt, s, 6) for s in (None, penalized)]
    while engine.busy:
        with torch.inference_mode(inside == "step"):
            engine.step()
        inside = None if inside == "step" and len(requests[0].tokens) == 4 else inside
    assert requests[0].tokens == want and len(requests[1].tokens) == 6


@pytest.mark.parametrize("call, message", [
    (lambda m: Engine(m, slots="8"), "slots: got '8'; allowed: an int"),
    (lambda m: Engine(m, slots=0), "slots: got 0"), (lambda m: Engine(m, prefill_chunk=0), "prefill_chunk: got 0"),
    (lambda m: Engine(m, state_dtype="fp8"), "state_dtype: got 'fp8'; allowed: fp32, bf16, fp16"),
    (lambda m: Engine(m, stochastic=True), "stochastic: got True for fp32"),
    (lambda m: Engine(m, speculative=-1), "speculative: got -1"),
    (lambda m: Engine(m, speculative=1), "speculative: got a model without an MTP block"),
    (lambda m: Engine(m).add([]), "prompt: got no token"), (lambda m: Engine(m).add([40]), "prompt: got 40; allowed: 0 to 39"),
    (lambda m: Engine(m).add([1], stop_ids=[-2]), "stop_ids: got -2"),
    (lambda m: Engine(m).add([1], max_new_tokens=0), "max_new_tokens: got 0"),
    (lambda m: Engine(m).add("text"), "prompt: got 'text'; allowed: a sequence of token ids"),
    (lambda m: Engine(m).add(torch.ones(1, 2).long()), r"prompt: got shape \[1, 2\]"),
    (lambda m: Engine(m).add([1], stop_ids=2), "stop_ids: got 2"),
    (lambda m: Engine(m).add([1], max_new_tokens=2.5), "max_new_tokens: got 2.5; allowed: an int"),
    (lambda m: Engine(m).add([1], {"seed": 1}), "sampling: got dict"),
    (lambda m: Engine(m).cancel(Engine(m).add([1])), "request: got one of another engine"),
    (lambda m: Engine(m.lm_head), "model: got Linear; allowed: an nk.HybridModel"),
    (lambda m: m.generate([[1]]), "ids: got list"),
    (lambda m: m.generate(torch.zeros(3)), "ids: got torch.float32"),
    (lambda m: m.generate(torch.ones(2, 3).long(), seed=[1]), "seed: got 1 numbers; allowed: one, or 2"),
    (lambda m: m.generate(torch.ones(1, 3).long(), attention_mask=torch.ones(1, 2)), r"attention_mask: got shape \[1, 2\]"),
    (lambda m: m.generate(torch.ones(1, 3).long(), attention_mask=torch.tensor([[1, 0, 1]])), "attention_mask: got zeros"),
    (lambda m: m.generate(torch.ones(1, 3).long(), attention_mask=torch.zeros(1, 3)), "prompt: got no token"),
    (lambda m: m.generate(torch.ones(1, 3).long(), speculative=True), "speculative: got a model without"),
])  # fmt: skip
def test_errors_name_the_argument(build, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(build("M"))


def test_an_mtp_block_with_mamba_layers_cannot_draft(build):
    model = build("M", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*M")
    with pytest.raises(ValueError, match=r"speculative: got an MTP block '\*M'"):
        Engine(model, speculative=1)


def test_bf16_decoding_does_not_depend_on_the_neighbours(build):
    model = build("ME*M-E", hidden_size=256, dtype="bfloat16")
    prompts = prompts_of(8, 3)

    def texts(slots):
        engine = Engine(model, slots=slots, prefill_chunk=3)  # each prompt is read by itself
        requests = [engine.add(prompt, max_new_tokens=24) for prompt in prompts]
        run(engine)
        return [request.tokens for request in requests]

    assert texts(8) == texts(1)


def test_a_served_bf16_model_shares_its_experts(build):
    model = build("E", dtype="bfloat16").bfloat16()
    made = serving(model).backbone.layers[0].mixer.experts
    experts = model.backbone.layers[0].mixer.experts
    assert made.up_proj.data_ptr() == experts.up_proj.data_ptr()
    assert made.down_proj.data_ptr() == experts.down_proj.data_ptr()


def test_weights_that_a_recipe_rotates_are_served_unrotated(build):
    """Activations are not rotated in serving: what is left is the rounding of 4 bits, about a tenth."""
    model = build("-E", moe_intermediate_size=40)  # no multiple of 16: rotated forms are padded
    spec = nk.QuantSpec(hadamard=0xD7E8)
    model.set_recipe(nk.LinearRecipe(fprop_x=spec, fprop_w=spec))
    served = serving(model)
    x = torch.randn(5, 32)
    exact = x @ model.backbone.layers[0].mixer.up_proj.weight.t()
    assert 0.01 < (served.backbone.layers[0].mixer.up_proj(x) - exact).norm() / exact.norm() < 0.2
    for part in ("up_proj", "down_proj"):
        plain = getattr(model.backbone.layers[1].mixer.experts, part)
        mine = getattr(served.backbone.layers[1].mixer.experts, part)
        assert 0.01 < (mine - plain).norm() / plain.norm() < 0.2


def test_a_long_prompt_is_masked_in_parts(build, greedy, monkeypatch):
    monkeypatch.setattr("nvfp4_kernels.generate.state.MASK", 64)
    model, prompt = build("*M*"), prompts_of(2, 40)[1] * 8
    engine = Engine(model, slots=1, prefill_chunk=17)
    request = engine.add(prompt, max_new_tokens=6)
    run(engine)
    assert request.tokens == greedy(model, prompt, 6)
