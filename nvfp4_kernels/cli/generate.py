"""nvfp4 generate: text from a trained run or from a Hugging Face folder, as it comes."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nvfp4_kernels.cli.machine import share_the_cores
from nvfp4_kernels.cli.text import check_text

HELP = "Continue a prompt, or answer it with --chat, with a run of nvfp4 train or a Hugging Face folder."
EXAMPLE = "nvfp4 generate --model runs/tiny-nvfp4 --prompt 'import ' --tokens 300"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def flag(name: str, kind: type, metavar: str, default, what: str) -> None:
        parser.add_argument(name, metavar=metavar, type=kind, default=default, help=what)

    parser.add_argument(
        "--model", metavar="PATH", required=True,
        help="folder of a run (--out of nvfp4 train), or with config.json, safetensors and tokenizer.json; e.g. runs/a",
    )  # fmt: skip
    flag("--prompt", str, "TEXT", "def ", "the text to continue; default 'def '")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message: put it into the chat template"
    )
    flag("--tokens", int, "TOKENS", 200, "new tokens at most; default 200")
    flag("--temperature", float, "RATE", 0.8, "0 is greedy; default 0.8")
    flag("--top-k", int, "TOKENS", None, "draw from the k likeliest; default: all")
    flag("--top-p", float, "SHARE", 1.0, "draw from the likeliest that have this share together; default 1, all")
    flag("--min-p", float, "SHARE", 0.0, "draw from those this share as likely as the likeliest; default 0, all")
    flag("--repetition-penalty", float, "FACTOR", 1.0, "on tokens that are there already; default 1, none")
    flag("--seed", int, "NUMBER", 0, "the same seed, the same text; default 0")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated"
    )
    flag("--speculative", int, "TOKENS", 0, "draft so many at a step with the model's MTP block; default 0, none")
    parser.add_argument(
        "--kv-cache", metavar="FORMAT", choices=("fp8", "checkpoint"), default=None,
        help="keep keys and values in fp8, or as the checkpoint says; default: as the activations are",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print the new text alone, without prompt and figures")


def look(arguments: argparse.Namespace) -> None:
    """What is wrong with the command line, before torch is imported."""
    from nvfp4_kernels.cli.models import check_model, check_number

    a, folder = arguments, Path(arguments.model)
    check_number("tokens", a.tokens, 1)
    check_number("speculative", a.speculative, 0)
    check_text("prompt", a.prompt)
    for text in a.stop:
        check_text("stop", text)
    config = check_model("model", folder)
    if a.chat and (folder / "run.json").is_file():
        raise ValueError(f"chat: {folder} is a run of nvfp4 train, which knows no chats; do: leave out --chat")
    if a.speculative and config is not None and not config.num_nextn_predict_layers:
        raise ValueError(f"speculative: got {a.speculative}; allowed: 0, for {folder} has no MTP block")


def run(arguments: argparse.Namespace) -> int:
    look(arguments)
    share_the_cores()
    from nvfp4_kernels.generate.engine import Engine
    from nvfp4_kernels.generate.loop import Pace, stream
    from nvfp4_kernels.generate.sample import Sampling

    a = arguments
    sampling = Sampling(a.temperature, a.top_k, a.top_p, a.min_p, a.repetition_penalty, a.seed)
    source = load_source(Path(a.model))
    prompt = source.chat(a.prompt) if a.chat else source.encode(a.prompt)
    engine, pace = Engine(source.model, slots=1, speculative=a.speculative, kv_dtype=a.kv_cache), Pace()
    if not a.quiet:
        print(source.label, file=sys.stderr)
        print("" if a.chat else a.prompt, end="", flush=True)
    for piece in stream(engine, source.tokenizer, prompt, sampling, a.tokens, source.stop_ids, a.stop, pace):
        print(piece, end="", flush=True)
    print()
    if not a.quiet:
        print(pace, file=sys.stderr)
    return 0


@dataclass
class Source:
    """A model and how text gets into it and out of it. chat: a user's message -> ids."""

    model: object
    tokenizer: object
    encode: Callable[[str], list[int]]
    chat: Callable[[str], list[int]]
    stop_ids: list[int]
    label: str


def load_source(folder: Path) -> Source:
    """Of a run of nvfp4 train, or of a Hugging Face folder."""
    from nvfp4_kernels.cli.models import load_model
    from nvfp4_kernels.generate.chat import FolderTokenizer
    from nvfp4_kernels.generate.loop import end_ids

    model, tokenizer, step = load_model(folder)
    if tokenizer is None:
        tokenizer = FolderTokenizer(folder)

        def chat(message: str) -> list[int]:
            return tokenizer.chat([{"role": "user", "content": message}])

        return Source(model, tokenizer, tokenizer.encode, chat, end_ids(model), str(folder))

    def refuse(message: str) -> list[int]:
        raise ValueError(f"chat: {folder} is a run of nvfp4 train, which knows no chats; do: leave out --chat")

    stop_ids = [] if tokenizer.separator is None else [tokenizer.separator]
    return Source(
        model, tokenizer, lambda text: tokenizer.encode(text.encode()).tolist(), refuse, stop_ids, f"{folder}, step {step}"
    )  # fmt: skip


def sample_text(model, tokenizer, prompt: str, tokens: int) -> str:
    """Prompt and continuation of a model in training, at temperature 0.8; bytes that are no UTF-8 become U+FFFD."""
    from nvfp4_kernels.generate.engine import Engine
    from nvfp4_kernels.generate.loop import stream
    from nvfp4_kernels.generate.sample import Sampling

    ids = tokenizer.encode(prompt.encode()).tolist()
    stop = () if tokenizer.separator is None else (tokenizer.separator,)
    return prompt + "".join(stream(Engine(model, slots=1), tokenizer, ids, Sampling(0.8), tokens, stop))
