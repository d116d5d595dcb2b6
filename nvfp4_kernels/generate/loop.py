"""From prompts to tokens and text: HybridModel.generate for ids, nk.stream for text as it comes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from nvfp4_kernels.checkpoint.source import read_json
from nvfp4_kernels.generate.engine import Engine
from nvfp4_kernels.generate.sample import Sampling
from nvfp4_kernels.generate.text import Detokenizer, StopStrings
from nvfp4_kernels.model.hybrid import HybridModel


def generate(
    model,
    ids: Tensor,
    max_new_tokens: int = 256,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | None = None,
    speculative: bool | int = False,
    **engine,
) -> Tensor:
    """ids and what the model says after them: int64 [batch, length + the longest continuation].

    ids: int64 [batch, length]. attention_mask: [batch, length], zeros on the left of shorter prompts; a row is continued as if
    its prompt stood alone. temperature 0 is greedy; the other numbers are those of Sampling. seed: one for all rows, or one for
    each. stop_ids: tokens that end a row, which is then filled up with config.pad_token_id; None: config.eos_token_id, and
    those of generation_config.json and tokenizer_config.json in the folder that the model was read from.
    speculative: draft with the MTP block, as many tokens a step as it was trained for (True), or so many.
    engine: further arguments of Engine; slots is the batch where it is not given.
    For more than one call, an Engine of one's own prepares the weights once.

    Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: got {type(ids).__name__}; allowed: an int64 tensor [batch, length]")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids: got {ids.dtype} {list(ids.shape)}; allowed: int64 [batch, length]")
    batch, length = ids.shape
    seeds = [seed] * batch if isinstance(seed, Integral) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"seed: got {len(seeds)} numbers; allowed: one, or {batch}, one for each row of ids")
    stop_ids = end_ids(model) if stop_ids is None else stop_ids
    prompts = ids.tolist() if attention_mask is None else _without_padding(ids, attention_mask)
    served = Engine(model, **({"slots": max(batch, 1), "speculative": depth_of(model, speculative)} | engine))
    requests = [
        served.add(
            prompt, Sampling(temperature, top_k, top_p, min_p, repetition_penalty, own), max_new_tokens, stop_ids
        )
        for prompt, own in zip(prompts, seeds, strict=True)
    ]
    for _ in served.run():
        pass
    longest = max((len(request.tokens) for request in requests), default=0)
    new = torch.full((batch, longest), model.config.pad_token_id or 0)
    for row, request in zip(new, requests, strict=True):
        row[: len(request.tokens)] = torch.tensor(request.tokens, dtype=torch.int64)
    return torch.cat([ids, new.to(ids)], 1)


@dataclass
class Pace:
    """Of one stream: tokens and seconds of the prompt and of what came after it, and what a pass over drafts gave."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0
    acceptance_length: float | None = None

    def __str__(self) -> str:
        prefill = (
            f"prefill {self.prompt_tokens} tokens, {self.prompt_tokens / max(self.prompt_seconds, 1e-9):,.0f} tokens/s"
        )
        decode = f"decode {self.new_tokens} tokens, {self.new_tokens / max(self.new_seconds, 1e-9):,.1f} tokens/s"
        drafts = "" if self.acceptance_length is None else f"; mean acceptance length {self.acceptance_length:.2f}"
        return f"{prefill}; {decode}{drafts}"


def stream(
    engine: Engine,
    tokenizer,
    prompt: Sequence[int],
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    stop_ids: Sequence[int] = (),
    stop: Sequence[str] = (),
    pace: Pace | None = None,
) -> Iterator[str]:
    """The text after `prompt` (token ids) in pieces, as it comes; no piece ends within a character.

    tokenizer: has decode(ids) -> bytes and bytewise (see text.Detokenizer). sampling, max_new_tokens, stop_ids: as in
    Engine.add. stop: texts that end it; neither they nor what follows is among the pieces. pace: is filled in. Leaving the
    iterator early frees the engine's slot. Raises as Engine.add does; RuntimeError where another caller's step failed.
    """
    pace, ending = pace or Pace(), StopStrings(stop)
    request = engine.add(prompt, sampling, max_new_tokens, stop_ids)
    pace.prompt_tokens, started, first, given = len(request.prompt), time.perf_counter(), None, 0
    try:
        detokenizer = Detokenizer(tokenizer, request.prompt)
        while not request.finished or given < len(request.tokens):
            if given == len(request.tokens):
                engine.step()
            new = request.tokens[given:]  # of the request, not of the step: another stream may have taken steps too
            given += len(new)
            now = time.perf_counter()
            if first is None and (new or request.finished):
                first, pace.prompt_seconds = now, now - started
            elif first is not None:
                pace.new_tokens, pace.new_seconds = len(request.tokens) - 1, now - first
            if engine.acceptance:
                pace.acceptance_length = engine.acceptance.mean_length
            piece = ending.push(detokenizer.push(new))
            if piece:
                yield piece
            if ending.stopped:
                return
        if request.finished == "failed":
            raise RuntimeError(
                "engine: a step that another caller took raised an error, and this sequence was lost with it"
            )
        piece = ending.push(detokenizer.finish()) + ending.finish()
        if piece:
            yield piece
    finally:
        engine.cancel(request)


def end_ids(model) -> list[int]:
    """The tokens that end a text, by the model's config, or an answer, by what lies beside its tokenizer: by
    generation_config.json, which some exports leave empty or out, and by tokenizer_config.json. Those that the model has no
    logit for (-1, or a token that a tokenizer was given later) never come, and are left out."""
    folder, named = model.source, [model.config.eos_token_id]
    if folder:
        path = folder / "generation_config.json"
        named += [read_json(path).get("eos_token_id") if path.is_file() else None, _end_of_tokenizer(folder)]
    ids = [i for ids in named if ids is not None for i in (ids if isinstance(ids, (list, tuple)) else [ids])]
    return [i for i in dict.fromkeys(ids) if 0 <= i < model.config.vocab_size]


def _end_of_tokenizer(folder: Path) -> int | None:
    config, vocabulary = folder / "tokenizer_config.json", folder / "tokenizer.json"
    token = read_json(config).get("eos_token") if config.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    if token is None or not vocabulary.is_file():
        return None
    added = read_json(vocabulary).get("added_tokens") or []
    return next((each["id"] for each in added if each.get("content") == token), None)


def depth_of(model, speculative: bool | int) -> int:
    """How many tokens to draft at a step; True: as many as the block was trained for."""
    return model.config.mtp_num_depths if speculative is True else int(speculative)


def _without_padding(ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    if attention_mask.shape != ids.shape:
        raise ValueError(f"attention_mask: got shape {list(attention_mask.shape)}; allowed: {list(ids.shape)}, as ids")
    kept = attention_mask.bool()
    if bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise ValueError("attention_mask: got zeros to the right of ones; allowed: zeros on the left alone")
    return [row[mask].tolist() for row, mask in zip(ids, kept, strict=True)]


# A method for users; set here, since a model knows nothing of what is built upon it.
HybridModel.generate = generate
