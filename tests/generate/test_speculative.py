"""Speculative decoding: greedy text is the plain text, sampled text has its distribution, drafts are the block's."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nvfp4_kernels.generate.engine import Engine
from nvfp4_kernels.generate.sample import Sampling
from nvfp4_kernels.generate.speculative import judge

PATTERNS = {
    "ME*M-E": {}, "M*E": dict(moe_latent_size=16), "*ME": dict(n_group=4, topk_group=2),
    "MM": dict(mamba_num_heads=3, n_groups=3, mamba_head_dim=20, conv_kernel=3), "*-": dict(attention_bias=True),
}  # fmt: skip


def speculating(build, pattern, seed=0, dtype="float32", **changes):
    return build(pattern, seed, dtype, num_nextn_predict_layers=1, **(PATTERNS.get(pattern, {}) | changes))


def teach(model):
    """The MTP block as it is after training on a text in which each token tells the next: now and then right."""
    with torch.no_grad():
        for block in model.mtp.layers:
            for parameter in block.mixer.parameters():
                parameter.mul_(0.1)
        size = model.config.hidden_size
        model.mtp.layers[0].eh_proj.weight.copy_(torch.cat([torch.eye(size) * 0.3, torch.eye(size)], 1))
    return model


def texts_of(model, prompts, speculative, slots, **options):
    """(tokens, why they end) of each (prompt, sampling, max_new_tokens, stop_ids), and the engine."""
    engine = Engine(model, slots=slots, speculative=speculative, **options)
    requests = [engine.add(*prompt) for prompt in prompts]
    for _ in engine.run():
        pass
    return [(request.tokens, request.finished) for request in requests], engine


@pytest.mark.parametrize("seed", range(10))
def test_greedy_speculative_is_greedy_plain(build, seed):
    """20 prompts of other lengths for each of 10 models, 8 slots, so that sequences enter and leave: 200 prompts."""
    model = teach(speculating(build, list(PATTERNS)[seed % 5], seed))
    prompts = [(torch.randint(0, 40, (1 + (7 * i) % 11,)).tolist(), None, 7 + i % 4) for i in range(20)]
    plain, _ = texts_of(model, prompts, 0, 8, prefill_chunk=32)
    for depth in (1, 2, 3, 4):
        drafted, engine = texts_of(model, prompts, depth, 8, prefill_chunk=32)
        assert drafted == plain, depth
        assert 1 < engine.acceptance.mean_length < depth + 1  # drafts were accepted, and drafts were refused


def test_bf16_too_with_all_forms_of_the_state(build):
    """bf16 logits have ties: equal texts mean equal bits."""
    for seed, options in enumerate(({}, dict(state_dtype="fp16", stochastic=True), dict(state_dtype="bf16"))):
        model = teach(speculating(build, "M*-M", seed, "bfloat16", mtp_hybrid_override_pattern="*-"))
        prompts = [([3, i], Sampling(0.0, seed=i), 16) for i in range(6)]
        texts = [texts_of(model, prompts, depth, 2, **options)[0] for depth in (0, 1, 3)]
        same = [sum(a == b for a, b in zip(texts[0], other, strict=True)) for other in texts[1:]]
        assert min(same) >= 5, same  # torch promises no bits, so one text may go another way


def test_penalty_stops_and_ends_hold_within_a_step(build):
    model = teach(speculating(build, "ME*M-E"))
    for sampling in (Sampling(0.0, repetition_penalty=1.5), Sampling(0.0)):
        prompts = [([i, 9], sampling, 3 + i, [11, 12, 13, 14]) for i in range(16)]
        plain, drafted = (texts_of(model, prompts, depth, 4)[0] for depth in (0, 3))
        assert plain == drafted and {"stop", "length"} == {finished for _, finished in plain}


def chi_square(counts, expected):
    """The statistic over its degrees of freedom, in standard deviations above 1; cells expected less than 5 times in one."""
    few = expected < 5
    counts = torch.cat([counts[~few], counts[few].sum()[None]])
    expected = torch.cat([expected[~few], expected[few].sum()[None].clamp(min=1e-9)])
    free = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - free) / (2 * free) ** 0.5)


def look_up(table, position, word):
    return table[position, word]


def test_the_rule_gives_the_models_distribution():
    torch.manual_seed(1)
    p, q = torch.softmax(torch.randn(3, 6), -1), torch.softmax(torch.randn(2, 6), -1)
    q[0, 3], p[0, 4] = 0, 0  # what is never drafted, and what may never come
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    n, position = 3000, 17
    uniforms = torch.rand(n, 3, 4, dtype=torch.float64).tolist()
    tables = [
        {(position + t, word): u for t, row in enumerate(table) for word, u in enumerate(row)} for table in uniforms
    ]
    requests = [
        SimpleNamespace(draws=SimpleNamespace(at=partial(look_up, table)), position=position) for table in tables
    ]
    drafts = torch.stack([torch.multinomial(row, n, replacement=True) for row in q], 1).tolist()
    made = judge(requests, drafts, q.expand(n, -1, -1), p.expand(n, -1, -1))
    first = torch.tensor([row[0] for row in made]).bincount(minlength=6)
    second = torch.tensor([row[1] for row in made if len(row) > 1]).bincount(minlength=6)
    third = torch.tensor([row[2] for row in made if len(row) > 2]).bincount(minlength=6)
    for counts, row in zip((first, second, third), p, strict=True):
        assert counts.sum() > 200 and chi_square(counts, row * counts.sum()) < 4
        assert chi_square(counts, q[0] * counts.sum()) > 10  # the test sees what is not the distribution
    assert first[4] == 0
    rate = sum(len(row) > 1 for row in made) / n
    assert abs(rate - float(torch.minimum(p[0], q[0]).sum())) < 0.03


@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_sampled_text_has_the_distribution_of_plain_text(build, depth):
    """The first to fourth new tokens of 1500 texts, against the products of the model's own probabilities."""
    model = speculating(build, "M*E", 3, vocab_size=5, initializer_range=0.4)
    sampling, n = dict(temperature=1.3, top_k=4), 1500
    first = int(model(torch.tensor([[1, 2]]))[0, -1].argmax())
    engine = Engine(model, slots=500, speculative=depth, pack_prompts=True)
    requests = [engine.add([1, 2, first], Sampling(**sampling, seed=seed), 4) for seed in range(n)]
    for _ in engine.run():
        pass
    cells = list(itertools.product(range(5), repeat=4))
    contexts = torch.tensor([[1, 2, first, *cell] for cell in cells])
    logits = model(contexts)[:, 2:-1].double() / 1.3
    kept = logits >= logits.topk(4).values[..., -1:]
    p = logits.masked_fill(~kept, -torch.inf).softmax(-1).gather(2, contexts[:, 3:, None])[..., 0].prod(1)
    counts = torch.zeros(len(cells))
    for request in requests:
        a, b, c, d = request.tokens
        counts[((a * 5 + b) * 5 + c) * 5 + d] += 1
    assert abs(float(p.sum()) - 1) < 1e-6 and chi_square(counts, p * n) < 4
    assert chi_square(counts, torch.full_like(p, n / len(cells))) > 10
    assert 1.05 < engine.acceptance.mean_length < depth + 1


@torch.no_grad()
def test_the_first_draft_is_the_blocks_own_prediction(build):
    """Of the whole text read anew, chunks of prompts and accepted drafts notwithstanding; acceptance counts what came."""
    model = teach(speculating(build, "ME*M-E", 2))
    engine, prompt = Engine(model, slots=2, speculative=2, prefill_chunk=4), [5, 1, 7, 2, 9, 4, 3]
    engine.add([1, 2], None, 50)
    request, propose, looked = engine.add(prompt, None, 24), engine.drafter.propose, []

    def watched(requests, shaper):
        drafts, q = propose(requests, shaper)
        looked.extend(([*r.prompt, *r.tokens], d[0]) for r, d in zip(requests, drafts, strict=True) if r is request)
        return drafts, q

    engine.drafter.propose = watched
    while not request.finished:
        engine.step()
    assert len(looked) >= 8
    for ids, draft in looked:
        hidden = model.hidden(torch.tensor([ids[:-1]]))
        out, _ = model.mtp(hidden, model.embed(torch.tensor([ids[1:]])))
        assert draft == int(model.lm_head(out)[0, -1].argmax())
    counted = engine.acceptance
    assert counted.tokens == counted.passes + sum(counted.by_depth) and counted.by_depth[0] >= counted.by_depth[1]
