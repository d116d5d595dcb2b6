"""nvfp4 quantize: post-training quantization of a trained model into a checkpoint that others load."""

import argparse
import sys
from pathlib import Path

from nvfp4_kernels.cli.machine import share_the_cores

HELP = (
    "Quantize a trained model: by a published recipe, by patterns, or by measured sensitivity under a budget of bits. A "
    "checkpoint is read, run and written layer by layer; --bits, and runs of nvfp4 train, hold the whole model in memory."
)
EXAMPLE = "nvfp4 quantize --model runs/a --out quantized --recipe nano-nvfp4 --calibrate some.txt --text other.txt"

RECIPES = ("super-nvfp4", "nano-nvfp4", "lightning-w4a16", "nano-fp8")
LEAST_BITS = 4.5  # of a weight in nvfp4, with its share of a scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="PATH", required=True,
        help="folder of a run (--out of nvfp4 train) or of a checkpoint; e.g. runs/a",
    )  # fmt: skip
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        required=True,
        help="new folder for the checkpoint, in ModelOpt's layout, and the report",
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--recipe", metavar="NAME", choices=RECIPES, default=None,
        help="super-nvfp4, nano-nvfp4, lightning-w4a16 or nano-fp8",
    )  # fmt: skip
    how.add_argument(
        "--pattern", metavar="GLOB=FORMAT", action="append", default=None,
        help="the format (nvfp4, w4a16, fp8, bf16) of layers whose names match; may be repeated, the first match wins, "
        "and what none matches stays bf16; e.g. --pattern '*.experts.*=nvfp4'",
    )  # fmt: skip
    how.add_argument(
        "--bits", metavar="BITS", type=float, default=None,
        help="a weight of the layers, on average: nvfp4, fp8 or bf16 for each by what it costs the model; e.g. 4.8",
    )  # fmt: skip
    parser.add_argument(
        "--search", metavar="HOW", choices=("max", "mse"), default=None,
        help="NVFP4's scales: of the largest values (max), or those with the smallest squared error (mse); default: the "
        "recipe's, else max",
    )  # fmt: skip
    parser.add_argument(
        "--four-over-six", metavar="ERROR", choices=("mae", "mse"), default=None,
        help="with search max: each block's largest value becomes 6 or 4, whichever has less error (mae, mse); default: "
        "the recipe's, else none",
    )  # fmt: skip
    parser.add_argument(
        "--calibrate", metavar="FILE", default=None,
        help="text for input scales (nvfp4, fp8) and for --bits; default: none, which w4a16 alone can do without",
    )  # fmt: skip
    parser.add_argument(
        "--text", metavar="FILE", default=None, help="measure perplexity before and after on this text; default: not"
    )
    parser.add_argument(
        "--length", metavar="TOKENS", type=int, default=2048, help="the model sees at once of both texts; default 2048"
    )


def run(arguments: argparse.Namespace) -> int:
    out, source = Path(arguments.out), Path(arguments.model)
    rules = look(arguments, out, source)
    share_the_cores()
    from nvfp4_kernels.ptq.quantize import REPORT

    by_layer = arguments.bits is None and not (source / "run.json").is_file()
    report = (_by_layer if by_layer else _in_memory)(arguments, source, out, rules)
    print(render(report))
    held = "one layer at a time" if by_layer else "the whole model"
    print(f"in {out}: the checkpoint, {REPORT}, errors.png; {held} was held in memory")
    return 0


def look(arguments: argparse.Namespace, out: Path, source: Path):
    """The patterns; raises ValueError for what is wrong with the command line, before torch is imported."""
    from nvfp4_kernels.cli.models import check_model, check_number, check_out, check_text

    rules = patterns(arguments.pattern)
    check_number("length", arguments.length, 1)
    if arguments.bits is not None:
        check_number("bits", arguments.bits, LEAST_BITS)
        if arguments.calibrate is None:
            do = "a text file to measure costs on (do: --calibrate FILE)"
            raise ValueError(f"calibrate: got no text for --bits; allowed: {do}")
    check_out(out)
    check_text("calibrate", arguments.calibrate)
    check_text("text", arguments.text)
    check_model("model", source)
    return rules


def _in_memory(arguments: argparse.Namespace, source: Path, out: Path, rules):
    """The model of a run, or one whose layers' costs are measured in it."""
    from nvfp4_kernels.cli.models import load_with_tokenizer, read_text, save_quantized
    from nvfp4_kernels.ptq.quantize import quantize_model

    model, tokenizer = load_with_tokenizer(source)
    calibration = read_text("calibrate", arguments.calibrate, tokenizer)
    text = read_text("text", arguments.text, tokenizer)
    plan = plan_of(arguments, rules, model.config)
    report = quantize_model(model, plan, calibration, text, arguments.length, progress)
    return save_quantized(model, tokenizer, out, lambda folder: _write_report(report, folder))


def _by_layer(arguments: argparse.Namespace, source: Path, out: Path, rules):
    """Each layer is read, run, quantized and written by itself."""
    from nvfp4_kernels.checkpoint.huggingface import open_model
    from nvfp4_kernels.cli.models import read_text, require_checkpoint, save_quantized, tokenizer_beside
    from nvfp4_kernels.ops._device import default_device
    from nvfp4_kernels.ptq.stream import Stream

    require_checkpoint(source)
    opened = open_model(source)
    tokenizer = tokenizer_beside(source, opened.config)
    calibration = read_text("calibrate", arguments.calibrate, tokenizer)
    text = read_text("text", arguments.text, tokenizer)
    plan = plan_of(arguments, rules, opened.config)
    stream = Stream(opened, plan, default_device(), calibration, text, arguments.length, progress)
    return save_quantized(
        stream.model, tokenizer, out, lambda folder: _write_report(stream.report(folder), folder), stream.read
    )


def _write_report(report, folder: Path):
    from nvfp4_kernels.ptq.plots import plot_errors

    report.save(folder)
    plot_errors(report, folder / "errors.png")
    return report


def patterns(given: list[str] | None):
    """(pattern, format) of each "GLOB=FORMAT"; None for none."""
    rules = []
    for text in given or ():
        pattern, equals, form = text.rpartition("=")
        if not (pattern and equals and form):
            raise ValueError(f"pattern: got {text!r}; allowed: GLOB=FORMAT, such as '*.experts.*=nvfp4'")
        rules.append((pattern, form))
    return tuple(rules) if given else None


def plan_of(arguments: argparse.Namespace, rules, config):
    from nvfp4_kernels.ptq.quantize import Plan

    search, four_over_six = arguments.search, arguments.four_over_six
    if arguments.recipe is not None:
        return Plan.of_recipe(arguments.recipe, config, search, four_over_six)
    label = "patterns" if rules else f"{arguments.bits} bits"
    return Plan(label, rules, arguments.bits, search or "max", four_over_six)


def progress(what: str, done: int, total: int) -> None:
    """One line that is written over, where somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}: {done}/{total}", end="" if done < total else "\r\033[K", file=sys.stderr, flush=True)


def render(report) -> str:
    """Like layers of one format together: their mean error, and the worst of them."""
    from nvfp4_kernels.cli.text import columns, ranges

    together: dict[tuple, list] = {}
    for loss in report.losses:
        prefix, inside, rest = loss.target.name.partition("layers.")
        index, _, kind = rest.partition(".")
        key = (prefix + (f"layers.[{{}}].{kind}" if inside else ""), loss.format, loss.target.shape)
        together.setdefault(key, []).append((int(index) if inside else None, loss))
    rows = [["layer", "weight", "format", "bits", "weights", "mean error", "worst"]]
    for (name, form, shape), members in together.items():
        errors = [loss.relative_error for _, loss in members]
        indices = [i for i, _ in members if i is not None]
        shown = "-" if form == "bf16" else f"{sum(errors) / len(errors):.2%}"
        rows.append([
            name.format(ranges(indices)) if indices else name, "x".join(map(str, shape)), form, f"{members[0][1].bits:g}",
            f"{sum(loss.target.weights for _, loss in members):,}", shown, "-" if form == "bf16" else f"{max(errors):.2%}",
        ])  # fmt: skip
    lines = [*columns(rows, right=(3, 4, 5, 6))]
    lines.append(
        f"{report.plan.label}, search {report.plan.search}"
        + (f" with four over six by {report.plan.four_over_six}" if report.plan.four_over_six else "")
        + f": {report.bits:.2f} bits a weight, {report.bytes_before / 1e6:.2f} MB -> {report.bytes_after / 1e6:.2f} MB"
    )
    for stack, idle in (report.unseen or {}).items():
        lines.append(
            f"{stack}: {idle} experts saw no token of the calibration text and took the stack's largest input scale"
        )
    for what, got in (("", report.after), ("inputs quantized too: ", report.served)):
        if got is not None:
            b = report.before
            lines.append(
                f"{what}perplexity {b.perplexity:.4f} -> {got.perplexity:.4f}, bits a byte {b.bits_a_byte:.4f} -> "
                f"{got.bits_a_byte:.4f} ({got.nats / b.nats - 1:+.2%}) on {got.source}"
            )
    return "\n".join(lines)
