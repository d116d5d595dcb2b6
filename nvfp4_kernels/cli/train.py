"""nvfp4 train: train a hybrid model; every field of train.settings.Settings is a flag."""

import argparse
import dataclasses
import json
from pathlib import Path

from nvfp4_kernels.cli.machine import keep_freed_memory, share_the_cores
from nvfp4_kernels.cli.text import check_text
from nvfp4_kernels.train.settings import Settings

HELP = "Train a model in NVFP4 or BF16; with no data named, on the Python standard library's sources of this machine."
EXAMPLE = """nvfp4 train --preset tiny --recipe nvfp4 --minutes 5
  torchrun --nproc-per-node 2 -m nvfp4_kernels train --preset tiny --shard"""
PRESETS = ("tiny", "small", "nano-30b", "super-120b", "ultra-550b")
RECIPES = ("nvfp4", "nemotron3", "bf16")
# What makes a run the run it is: a resumed one keeps it.
FIXED = (
    "preset", "config", "from_", "quantized", "train_only", "data", "bin_dtype", "tokenizer", "batch", "length", "validation",
    "seed",
)  # fmt: skip
FINE_TUNING = {"lr": 1e-4}  # where a run starts from a checkpoint and not from a preset's random weights

# field of Settings -> (group, type or choices, unit, what, example)
FLAGS = {
    "preset": ("model", PRESETS, "name", "geometry of the model", "small"),
    "config": ("model", str, "path", "a config.json (or its folder) in place of --preset", "my/config.json"),
    "from_": ("model", str, "path", "a checkpoint's folder, or a run's, to start from; default: random weights in the "
              "geometry of --preset or --config", "models/nano-nvfp4"),
    "quantized": ("model", ("dequantize", "keep"), "what", "becomes of the quantized matrices of --from: weights to train, or "
                  "left as they are", "keep"),
    "train_only": ("model", str, "patterns", "of the parameters to train, by commas; the others are frozen",
                   "'*.q_proj.*,*.norm.*'"),
    "recipe": ("model", RECIPES, "name", "which operands of which layers are quantized", "nemotron3"),
    "data": ("data", str, "path", "a text file, a folder of text, a .npy or .bin of token ids; "
             "default: Python's standard library", "books/"),
    "bin_dtype": ("data", ("uint8", "uint16", "uint32"), "dtype", "of the ids in a .bin, little-endian", "uint32"),
    "tokenizer": ("data", str, "name", "bytes, or the path of a tokenizer.json", "tokenizer.json"),
    "batch": ("data", int, "sequences", "in a micro-batch", "16"),
    "length": ("data", int, "tokens", "in a sequence", "1024"),
    "accumulate": ("data", int, "micro-batches", "a step sums the gradients of, in each process", "4"),
    "validation": ("data", float, "share", "of the tokens held out, by document; 0 for none", "0.05"),
    "validation_tokens": ("data", int, "tokens", "looked at in each validation, at most", "1000000"),
    "validation_every": ("data", int, "steps", "between validations; 0 for one at the end", "100"),
    "steps": ("optimization", int, "steps", "to train; default by preset", "1000"),
    "minutes": ("optimization", float, "minutes", "to train in place of --steps: the pace is measured, then the "
                "number of steps is fixed", "10"),
    "lr": ("optimization", float, "rate", "the peak learning rate", "1e-3"),
    "warmup": ("optimization", float, "steps", "of linear warm-up; below 1: as a share of all steps", "100"),
    "decay": ("optimization", float, "steps", "of decay at the end; below 1: as a share of all steps", "0.2"),
    "decay_shape": ("optimization", ("minus-sqrt", "linear"), "shape", "of the decay", "linear"),
    "weight_decay": ("optimization", float, "rate", "of AdamW, for the weights of GEMMs and convolutions only", "0.01"),
    "clip": ("optimization", float, "norm", "the gradient is clipped to; inf for none", "0.5"),
    "seed": ("run", int, "number", "of weights, data order and noise", "1"),
    "threads": ("run", int, "threads", "of the CPU; 0: as many as torch takes", "2"),
    "out": ("run", str, "folder", "for checkpoints, metrics.jsonl and plots; default: runs/<preset>-<recipe>", "runs/a"),
    "save_every": ("run", int, "steps", "between checkpoints", "500"),
    "keep": ("run", int, "checkpoints", "kept, the newest", "3"),
    "health_every": ("run", int, "steps", "between probes of quantization; 0 for none", "10"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    groups = {name: parser.add_argument_group(name) for name in ("model", "data", "optimization", "run")}
    for name, (group, kind, unit, what, example) in FLAGS.items():
        flag = "--" + name.rstrip("_").replace("_", "-")  # `from` is a word of Python
        known = "" if defaults[name] is None or "default" in what else f"; default {defaults[name]}"
        options = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        allowed = f" ({', '.join(kind)})" if isinstance(kind, tuple) else ""
        groups[group].add_argument(
            flag,
            dest=name,
            metavar=unit.upper(),
            default=None,
            help=f"{what}{allowed}{known}; e.g. {flag} {example}",
            **options,
        )
    run = groups["run"]
    run.add_argument(
        "--checkpoint-activations",
        action="store_true",
        default=None,
        help="run each layer's forward again in backward rather than keep its activations; default off",
    )
    run.add_argument(
        "--shard",
        action=argparse.BooleanOptionalAction,
        help="with torchrun, split weights, gradients and optimizer state over the processes, and gather a layer when it runs "
        "(FSDP2); default: the whole model in each",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest whole checkpoint in --out; on the CPU bit for bit as if never stopped, on as many "
        "processes; on others with the same product of processes and --accumulate",
    )
    run.add_argument(
        "--ablate",
        action="store_true",
        help="from one seed train bf16, nvfp4, nvfp4 without each technique and with four-over-six, for "
        "--minutes or --steps each, and print what each costs; e.g. --ablate --steps 300",
    )
    run.add_argument(
        "--print-config", action="store_true", help="print settings and model config as JSON, train nothing"
    )
    run.add_argument(
        "--sample", metavar="TOKENS", type=int, default=200, help="of text at the end; 0 for none; default 200"
    )
    run.add_argument("--prompt", metavar="TEXT", default="def ", help="of the text sampled at the end; default 'def '")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Flags over the resumed run's settings, or over the preset's defaults."""
    given = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("steps") and given.get("minutes"):
        raise ValueError("minutes: got --steps too; allowed: one of them")
    if "out" not in given:
        named = given.get("config") or given.get("from_")
        label = Path(named).resolve().stem if named else given.get("preset", Settings.preset)
        given["out"] = f"runs/{label}-{'ablation' if arguments.ablate else given.get('recipe', Settings.recipe)}"
    if arguments.resume:
        settings = Settings.load(Path(given["out"]))
        for name in FIXED:
            if given.get(name, getattr(settings, name)) != getattr(settings, name):
                raise ValueError(
                    f"{name.rstrip('_')}: got {given[name]}; allowed: {getattr(settings, name)}, what the run began with"
                )
        if given.keys() & {"steps", "minutes"}:
            settings = settings.replace(steps=None, minutes=None)
        return settings.replace(**given)
    return preset_settings(**given)


def preset_settings(**given) -> Settings:
    """The preset's training defaults with `given` over them; a config of one's own has no defaults but those of Settings.

    A checkpoint brings its tokenizer: tokenizer.json, or what a run was trained with.
    """
    from nvfp4_kernels.model.presets import TRAINING

    given = {name: value for name, value in given.items() if value is not None}
    defaults = {} if "config" in given else dict(TRAINING.get(given.get("preset", Settings.preset), {}))
    if folder := given.get("from_"):
        if "preset" in given:
            raise ValueError(
                f"preset: got {given['preset']}; allowed: none with --from, whose checkpoint has a geometry"
            )
        ids = str(given.get("data", "")).endswith((".npy", ".bin"))
        own = {} if "tokenizer" in given or ids else {"tokenizer": tokenizer_of(Path(folder))}
        defaults = FINE_TUNING | own
    if "minutes" in given:
        defaults.pop("steps", None)
    settings = Settings(**(defaults | given))
    return settings if settings.steps or settings.minutes else settings.replace(steps=1000)


def tokenizer_of(folder: Path) -> str:
    if (folder / "tokenizer.json").exists():
        return str(folder / "tokenizer.json")
    if (folder / "run.json").exists():
        return Settings.load(folder).tokenizer
    raise ValueError(
        f"tokenizer: {folder} holds no tokenizer.json; do: copy it there, or give --tokenizer (bytes, or a path)"
    )


def check_data(path: str | None) -> None:
    """Raises ValueError where there is nothing to read."""
    if path is not None:
        from nvfp4_kernels.train.corpus import find_files

        find_files(Path(path))


def look(arguments: argparse.Namespace) -> Settings:
    """The settings; raises ValueError for what is wrong with the command line, before torch is imported."""
    from nvfp4_kernels.cli.models import check_config, check_folder, check_model, check_number

    check_number("sample", arguments.sample, 0)
    if arguments.sample:
        check_text("prompt", arguments.prompt, " (or --sample 0)")
    if arguments.from_ is not None:
        check_model("from", Path(arguments.from_), tokenizer=False)
    check_config(arguments.config)
    settings = settings_of(arguments)
    tokenizer = settings.tokenizer
    if tokenizer != "bytes" and not Path(tokenizer).is_file():
        raise ValueError(f"tokenizer: got {tokenizer}, which is no file; allowed: bytes, or a tokenizer.json")
    check_data(settings.data)
    check_folder(out := Path(settings.out))
    if not (arguments.resume or arguments.ablate or arguments.print_config) and any(out.glob("checkpoints/step_*")):
        raise ValueError(f"out: {out} already holds a run; do: add --resume, or name another folder with --out")
    return settings


def run(arguments: argparse.Namespace) -> int:
    settings = look(arguments)
    share_the_cores()
    keep_freed_memory()
    if arguments.print_config:
        from nvfp4_kernels.train.setup import build_config

        config = {"settings": dataclasses.asdict(settings), "model": build_config(settings).to_dict()}
        print(json.dumps(config, indent=2))
        return 0
    from nvfp4_kernels.train.ranks import joined

    with joined() as ranks:
        if arguments.ablate:
            from nvfp4_kernels.train.compare import ablate

            if ranks.size > 1:
                raise ValueError(f"ablate: got {ranks.size} processes; allowed: one")
            print(ablate(settings))
            return 0
        from nvfp4_kernels.train.run import train

        result = train(settings, arguments.resume, ranks=ranks)
    if result.stopped:
        return 130
    if ranks.rank:
        return 0
    from nvfp4_kernels.cli.generate import sample_text

    summary = f"{result.steps} steps, {result.tokens_per_second:,.0f} tokens/s, {result.skipped} skipped"
    loss = "" if result.validation_loss is None else f"validation loss {result.validation_loss:.4f} {result.unit}, "
    print(f"{loss}{summary}; in {result.out}: loss.png, health.png, metrics.jsonl, checkpoints/")
    if arguments.sample > 0:
        from nvfp4_kernels.train.setup import load_run

        model = load_run(result.out)[0] if settings.shard else result.model
        print(sample_text(model, result.tokenizer, arguments.prompt, arguments.sample))
    return 0
