"""nvfp4 generate: text from a trained run."""

import argparse
import sys
from pathlib import Path

HELP = "Continue a prompt with a model that nvfp4 train has trained."
EXAMPLE = "nvfp4 generate --model runs/tiny-nvfp4 --prompt 'import ' --tokens 300"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="RUN", required=True, help="folder of a run (--out of nvfp4 train); e.g. runs/a"
    )
    parser.add_argument("--prompt", metavar="TEXT", default="def ", help="the text to continue; default 'def '")
    parser.add_argument("--tokens", metavar="TOKENS", type=int, default=200, help="new tokens at most; default 200")
    parser.add_argument("--temperature", metavar="RATE", type=float, default=0.8, help="0 is greedy; default 0.8")
    parser.add_argument(
        "--top-k", metavar="TOKENS", type=int, default=None, help="draw from the k likeliest; default: all"
    )
    parser.add_argument("--seed", metavar="NUMBER", type=int, default=0, help="the same seed, the same text; default 0")
    parser.add_argument("--quiet", action="store_true", help="print the new text alone, once it is whole")


def run(arguments: argparse.Namespace) -> int:
    from nvfp4_kernels.train.setup import load_run

    model, tokenizer, step = load_run(Path(arguments.model))
    if not arguments.quiet:
        print(f"{arguments.model}, step {step}", file=sys.stderr)
    text = sample_text(
        model, tokenizer, arguments.prompt, arguments.tokens, arguments.temperature, arguments.top_k, arguments.seed
    )
    print(text.removeprefix(arguments.prompt) if arguments.quiet else text)
    return 0


def sample_text(
    model, tokenizer, prompt: str, tokens: int, temperature: float = 0.8, top_k: int | None = None, seed: int = 0
) -> str:
    """Prompt and continuation; bytes that are no UTF-8 become U+FFFD."""
    from nvfp4_kernels.generate.loop import sample

    ids = tokenizer.encode(prompt.encode()).tolist()
    stop = () if tokenizer.separator is None else (tokenizer.separator,)
    new = sample(model, ids, tokens, temperature, top_k, seed, stop)
    return tokenizer.decode(ids + new).decode("utf-8", "replace")
