"""nvfp4 eval: how well a model predicts a text."""

import argparse
import json
from pathlib import Path

from nvfp4_kernels.cli.machine import share_the_cores

HELP = "Perplexity and bits a byte of a model on a text, by how much of it the model had seen before."
EXAMPLE = "nvfp4 eval --model runs/tiny-nvfp4 --text book.txt --length 1024"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH", required=True,
        help="folder of a run (--out of nvfp4 train), which is run by the recipe that it was trained with, or of a checkpoint, "
        "quantized or not; e.g. runs/a",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE", required=True, help="the text; e.g. book.txt")
    parser.add_argument(
        "--length", metavar="TOKENS", type=int, default=2048,
        help="the model sees at once, each window by itself; default 2048",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", default=None, help="write the figures there too; default: nowhere")


def run(arguments: argparse.Namespace) -> int:
    from nvfp4_kernels.cli import models

    models.check_number("length", arguments.length, 1)
    models.check_file("json", arguments.json)
    models.check_model("model", Path(arguments.model))
    models.check_text("text", arguments.text)
    share_the_cores()
    from nvfp4_kernels.ptq.evaluate import evaluate

    model, tokenizer = models.load_with_tokenizer(Path(arguments.model))
    got = evaluate(model, models.read_text("text", arguments.text, tokenizer), arguments.length)
    print(render(got))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"model": arguments.model} | got.to_dict(), indent=2) + "\n")
    return 0


def render(got) -> str:
    from nvfp4_kernels.cli.text import columns

    rows = [["position", "tokens", "nats a token", "perplexity"]]
    for b in got.buckets:
        rows.append([f"{b.first} - {b.last}", f"{b.tokens:,}", f"{b.nats:.4f}", f"{b.perplexity:.3f}"])
    rows.append(["all", f"{got.tokens:,}", f"{got.nats:.4f}", f"{got.perplexity:.3f}"])
    total = (
        f"{got.nats_a_byte:.4f} nats a byte, {got.bits_a_byte:.4f} bits a byte; "
        f"{got.tokens / got.seconds:,.0f} tokens/s in windows of {got.length}"
    )
    return "\n".join([*columns(rows, right=(1, 2, 3)), total])
