"""nvfp4 demo: the tiny hybrid model in BF16 and in NVFP4, the same seed and batches, in under six minutes on two cores."""

import argparse

from nvfp4_kernels.cli.machine import share_the_cores

HELP = "Train the tiny hybrid model in BF16 and in NVFP4 side by side on this machine, and compare them."
EXAMPLE = "nvfp4 demo --minutes 2.4"


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
    share_the_cores()
    from nvfp4_kernels.cli.generate import sample_text
    from nvfp4_kernels.cli.train import preset_settings
    from nvfp4_kernels.recipe import bf16, nvfp4
    from nvfp4_kernels.train.compare import compare

    minutes = None if arguments.steps else arguments.minutes
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
    return 0
