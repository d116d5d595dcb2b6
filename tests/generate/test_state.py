"""The pool: reading a prompt at once, in chunks, token by token, beside others, all give what the whole sequence gives."""

import pytest
import torch

from nvfp4_kernels.generate.state import PAGE, Pool

CASES = {
    "plain": ("ME*M-E", {}),
    "latent": ("MEM*", dict(moe_latent_size=16)),
    "expert groups": ("*EME", dict(n_group=4, topk_group=2)),
    "biases": ("MM*E-", dict(mlp_bias=True, mamba_proj_bias=True, attention_bias=True)),
    "odd heads": ("M*M", dict(mamba_num_heads=3, n_groups=3, num_attention_heads=3, num_key_value_heads=3)),
    "one key": ("**M", dict(num_attention_heads=5, num_key_value_heads=1, head_dim=12, mamba_head_dim=20, n_groups=1)),
    "narrow window": ("M*", dict(conv_kernel=2, use_conv_bias=False)),
    "no attention": ("MEM-", {}),
}  # fmt: skip


def pool_of(model, slots, state_dtype=torch.float32):
    return Pool(model.backbone.layers, slots, model.config.dtype, state_dtype)


@torch.no_grad()
def feed(model, pool, slots, pieces, **options):
    """Logits [tokens, vocab] of each slot's piece, read as one packed row."""
    counts = [len(piece) for piece in pieces]
    logits = model(torch.cat(pieces)[None], state=pool.begin(slots, counts, packed=True, **options))
    return logits[0].split(counts)


def check_readings(model, pool_of, ids, whole):
    """The logits of `ids` are `whole` however they are read: at once, in chunks, by token, by decoding."""
    for pieces in ([len(ids)], [7, len(ids) - 8, 1], [1] * len(ids)):
        pool = pool_of(model, 3)
        got = torch.cat([feed(model, pool, [1], [piece])[0] for piece in ids.split(pieces)])
        torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
    pool = pool_of(model, 3)
    steps = [model(token.view(1, 1), state=pool.begin([2], [1]))[0] for token in ids]
    torch.testing.assert_close(torch.cat(steps), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_reading_at_once_in_chunks_and_by_token_give_the_same(build, case):
    pattern, changes = CASES[case]
    model = build(pattern, **changes)
    ids = torch.randint(0, 40, (21,))
    check_readings(model, pool_of, ids, model(ids[None])[0])


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "one key", "odd heads"])
def test_neighbours_of_other_lengths_change_nothing(build, case):
    pattern, changes = CASES[case]
    model = build(pattern, **changes)
    prompts = [torch.randint(0, 40, (n,)) for n in (5, 1, 17)]
    more = torch.randint(0, 40, (3, 4))
    pool, slots = pool_of(model, 5), [3, 0, 4]
    read = feed(model, pool, slots, prompts)
    steps = torch.cat([model(more[:, t : t + 1], state=pool.begin(slots, [1] * 3)) for t in range(4)], 1)
    for row in range(3):
        whole = model(torch.cat([prompts[row], more[row]])[None])[0]
        torch.testing.assert_close(torch.cat([read[row], steps[row]]), whole, atol=1e-4, rtol=1e-4)
    assert pool.lengths == [5, 0, 0, 9, 21]


@torch.no_grad()
def test_kept_steps_are_settled_to_any_length(build):
    """Tokens that are not committed leave no trace: windows, SSM states, keys; each row accepts another number."""
    model = build("M*EM")
    ids = torch.randint(0, 40, (3, 30))
    pool, places = pool_of(model, 3), [4, 1, 6]
    feed(model, pool, [0, 1, 2], [row[:n] for row, n in zip(ids, places, strict=True)])
    for accepted in ([1, 4, 2], [3, 1, 4], [4, 4, 1], [2, 3, 3]):
        right = torch.stack([row[n : n + 4] for row, n in zip(ids, places, strict=True)])
        wrong = (right + 1 + torch.arange(3)[:, None]) % 40
        chosen = torch.where(torch.arange(4) < torch.tensor(accepted)[:, None], right, wrong)
        logits = model(chosen, state=pool.begin([0, 1, 2], [4] * 3, keep=True))
        pool.commit(accepted)
        for row, n in enumerate(accepted):
            whole = model(ids[row : row + 1, : places[row] + n])[0, places[row] :]
            torch.testing.assert_close(logits[row, :n], whole, atol=1e-4, rtol=1e-4)
        places = [place + n for place, n in zip(places, accepted, strict=True)]
        assert pool.lengths == places


@torch.no_grad()
def test_a_kept_step_is_close_to_single_ones(build):
    """The states after several tokens at once, and after one at a time."""
    model = build("M")
    ids = torch.randint(0, 40, (2, 4))
    for state_dtype, noise in ((torch.float32, None), (torch.float16, [(7, 0), (9, 100)]), (torch.bfloat16, None)):
        one, several = pool_of(model, 2, state_dtype), pool_of(model, 2, state_dtype)
        for t in range(3):
            now = noise and [(seed, offset + t) for seed, offset in noise]
            model(ids[:, t : t + 1], state=one.begin([0, 1], [1, 1], noise=now))
        model(ids, state=several.begin([0, 1], [4, 4], keep=True, noise=noise))
        several.commit([3, 3])
        # the projections of 2 and of 8 rows may round differently; the states do not drift apart
        torch.testing.assert_close(one.layers[0].conv, several.layers[0].conv, atol=1e-6, rtol=1e-5)
        difference = (one.layers[0].ssm.float() - several.layers[0].ssm.float()).abs()
        assert (difference > 1e-6).float().mean() < 0.01 and difference.max() < 0.02


@torch.no_grad()
def test_stochastic_rounding_depends_on_seed_and_place_alone(build):
    model = build("M")
    ids = torch.randint(0, 40, (3, 6))

    def states(rows, seeds, slots):
        pool = pool_of(model, 4, torch.float16)
        for t in range(6):
            noise = [(seed, t) for seed in seeds]
            model(ids[rows, t : t + 1], state=pool.begin(slots, [1] * len(rows), noise=noise))
        return pool.layers[0].ssm[slots]

    together, alone = states([0, 1, 2], [5, 6, 7], [0, 1, 2]), states([1], [6], [3])
    difference = (together[1] - alone[0]).float().abs()
    assert (difference > 1e-6).float().mean() < 0.01  # all but those where the projections' rounding crosses a border
    other = states([1], [8], [3])
    assert ((other - alone).float().abs() > 1e-6).float().mean() > 0.1


@torch.no_grad()
def test_keys_beyond_a_page(build):
    model = build("*", num_attention_heads=2)
    ids = torch.randint(0, 40, (PAGE + 5,))
    whole, pool = model(ids[None])[0], pool_of(model, 2)
    feed(model, pool, [0], [ids[:3]])
    got = [feed(model, pool, [1], [ids[: PAGE - 2]])[0][-1:]]
    got += [model(token.view(1, 1), state=pool.begin([1], [1]))[0] for token in ids[PAGE - 2 :]]
    torch.testing.assert_close(torch.cat(got), whole[PAGE - 3 :], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        model(ids[3].view(1, 1), state=pool.begin([0], [1]))[0, 0], whole[3], atol=1e-4, rtol=1e-4
    )  # the other slot's keys moved with the pool


@torch.no_grad()
def test_a_cleared_slot_is_as_new_even_after_nan(build):
    model = build("M*")
    ids = torch.randint(0, 40, (9,))
    pool = pool_of(model, 2)
    table = model.backbone.embeddings.weight
    kept = table[3].clone()
    table[3] = float("nan")
    feed(model, pool, [0], [torch.full((6,), 3)])
    table[3] = kept
    pool.clear(0)
    feed(model, pool, [0, 1], [ids[:2], ids[:8]])
    logits = model(ids[2].view(1, 1).expand(2, 1), state=pool.begin([0, 1], [1, 1]))
    torch.testing.assert_close(logits[0, 0], model(ids[None, :3])[0, -1], atol=1e-4, rtol=1e-4)
