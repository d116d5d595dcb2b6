"""nvfp4 demo: the tiny hybrid model in BF16 and in NVFP4, the same seed and batches, in under six minutes on two cores."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from nvfp4_kernels.cli.machine import keep_freed_memory, share_the_cores

HELP = "Train the tiny hybrid model in BF16 and in NVFP4 side by side on this machine, and compare them."
EXAMPLE = "nvfp4 demo --minutes 2.4"

DRAFTING = 0.05  # of the time that both runs took together: how long the block that drafts is trained
DEPTHS, TOKENS = (1, 2, 3), 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        metavar="MINUTES",
        type=float,
        default=2.4,
        help="for each of the two runs, on average; both take the same number of steps; default 2.4",
    )
    parser.add_argument(
        "--steps", metavar="STEPS", type=int, default=None, help="in place of --minutes; e.g. --steps 300"
    )
    parser.add_argument(
        "--data", metavar="PATH", default=None, help="text to train on; default: Python's standard library"
    )
    parser.add_argument(
        "--seed", metavar="NUMBER", type=int, default=0, help="of weights, batches and noise; default 0"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default="runs/demo", help="an earlier demo there is replaced; default runs/demo"
    )


def run(arguments: argparse.Namespace) -> int:
    from nvfp4_kernels.cli.models import check_folder
    from nvfp4_kernels.cli.train import check_data, preset_settings

    check_folder(Path(arguments.out))
    check_data(arguments.data)
    share_the_cores()
    keep_freed_memory()
    from nvfp4_kernels.cli.generate import sample_text
    from nvfp4_kernels.recipe import bf16, nvfp4
    from nvfp4_kernels.train.compare import compare

    minutes = None if arguments.steps is not None else arguments.minutes
    settings = preset_settings(
        preset="tiny",
        data=arguments.data,
        seed=arguments.seed,
        out=arguments.out,
        steps=arguments.steps,
        minutes=minutes,
    )
    got = compare(settings, {"bf16": bf16, "nvfp4": nvfp4})
    print(got.table())
    if any(result.stopped for result in got.results.values()):
        return 130
    final = got.results["nvfp4"]
    print(f"in {arguments.out}: loss.png; in {final.out}: health.png, metrics.jsonl, checkpoints/")
    print(f"200 bytes from the NVFP4 model:\n{sample_text(final.model, final.tokenizer, 'def ', 200)}")
    trained = sum(r.steps * settings.tokens_a_step / r.tokens_per_second for r in got.results.values())
    for line in draft(final.model, settings, got.corpus, DRAFTING * trained):
        print(line)
    return 0


def draft(model, settings, corpus, seconds: float) -> Iterator[str]:
    """Gives the model an MTP block, and says what speculative decoding with it comes to."""
    from nvfp4_kernels.generate.engine import Engine
    from nvfp4_kernels.generate.sample import Sampling
    from nvfp4_kernels.train.drafting import with_drafting

    model = with_drafting(model, settings, corpus, seconds)
    what = f"drafts of an MTP block trained for {seconds:.0f} s on the frozen NVFP4 model"
    yield f"speculative decoding of one sequence of {TOKENS} bytes, {what}:"
    for label, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
        engines = {depth: Engine(model, slots=1, speculative=depth) for depth in (0, *DEPTHS)}
        requests = {depth: engine.add(b"def ", Sampling(temperature), TOKENS) for depth, engine in engines.items()}
        for engine in engines.values():
            engine.step()  # the prompt
        spent = dict.fromkeys(engines, 0.0)
        while any(engine.busy for engine in engines.values()):  # they take turns, so that all see the same machine
            for depth, engine in engines.items():
                begun = time.perf_counter()
                engine.step()
                spent[depth] += time.perf_counter() - begun
        paces = {depth: (len(request.tokens) - 1) / spent[depth] for depth, request in requests.items()}
        plain = paces[0]
        parts = [
            f"{depth} drafts {paces[depth]:,.0f} ({paces[depth] / plain:.2f}x, "
            f"acceptance length {engines[depth].acceptance.mean_length:.2f})"
            for depth in DEPTHS
        ]
        yield f"{label}: plain {plain:,.0f} tokens/s; {'; '.join(parts)}"
