"""A run from settings to result: builds model, data and optimizer, trains, saves, resumes, stops cleanly, draws."""

import contextlib
import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.recipe import Recipe, get_recipe
from nvfp4_kernels.train.corpus import Corpus
from nvfp4_kernels.train.data import Batch
from nvfp4_kernels.train.loop import StepReport, Trainer
from nvfp4_kernels.train.optimizer import build_optimizer
from nvfp4_kernels.train.plots import plot_health, plot_loss
from nvfp4_kernels.train.progress import Metrics, Progress
from nvfp4_kernels.train.schedule import Schedule, as_steps
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import build_config, build_model, load_data, split, steps_that_fit
from nvfp4_kernels.train.tokenizer import load_tokenizer


@dataclass
class Result:
    """How a run ended. losses: nats a byte where the text is known, else nats a token."""

    out: Path
    model: HybridModel
    tokenizer: object
    validation_loss: float | None
    steps: int
    skipped: int
    tokens_per_second: float
    stopped: bool


class Interrupts:
    """The first Ctrl-C (or SIGTERM) asks to stop after the step, the second stops at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "Interrupts":
        self.before = {}
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for name in (signal.SIGINT, signal.SIGTERM):
                self.before[name] = signal.signal(name, self.ask)
        return self

    def ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)


def train(
    settings: Settings,
    resume: bool = False,
    recipe: Recipe | None = None,
    quiet: bool = False,
    corpus: Corpus | None = None,
) -> Result:
    """Trains as `settings` say, in the folder `settings.out`; with `resume`, from its newest whole snapshot.

    recipe: instead of the one `settings` name (for ablations). corpus: instead of reading it again.
    Raises ValueError with one line that says what to do.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    out = Path(settings.out)
    config = build_config(settings)
    found, damaged = snapshot.newest(out / "checkpoints")
    check_folder(out, resume, found, damaged)
    read, tokenizer = (
        load_data(settings, config)
        if corpus is None
        else (corpus, load_tokenizer(settings.tokenizer, config.vocab_size, config.eos_token_id))
    )
    packer, validation = split(settings, read)
    model = build_model(config, settings, recipe)
    trainer = Trainer(
        model,
        packer,
        build_optimizer(model, settings.lr, settings.weight_decay),
        Schedule(settings.lr, 1),
        settings.accumulate,
        settings.clip,
        settings.health_every,
    )
    steps = plan_steps(settings, trainer, validation, found)
    warmup, decay = as_steps(settings.warmup, steps), as_steps(settings.decay, steps)
    trainer.schedule = Schedule(settings.lr, steps, warmup, decay, settings.decay_shape)
    if found:
        trainer.load(found.state["trainer"], found.tensors)
    prepare_folder(out, settings, config)
    metrics = Metrics(out / "metrics.jsonl", found.state["metrics_bytes"] if found else 0)
    progress = Progress(f"{(recipe or get_recipe(settings.recipe)).name}", steps, trainer.step, quiet)
    for line in damaged:
        progress.say(f"warning: {line}")
    if found:
        progress.say(
            f"resumed at step {found.step} of {steps}: weights, optimizer, data position, noise and torch's RNG"
        )

    def save() -> None:
        state = {"trainer": trainer.state(), "metrics_bytes": metrics.position(), "steps": steps}
        snapshot.save(
            out / "checkpoints",
            trainer.step,
            trainer.tensors(),
            state,
            {"config.json": (out / "config.json").read_text()},
            settings.keep,
        )

    saved = trainer.step if found else None
    loss = None
    try:
        with Interrupts() as interrupts:
            while trainer.step < steps and not interrupts.asked:
                report = trainer.run_step()
                log(report, metrics, progress, read.tokens_per_byte, trainer)
                trainer.check_patience()
                last = trainer.step == steps
                if validation and (last or settings.validation_every and trainer.step % settings.validation_every == 0):
                    loss = trainer.validate(validation) * read.tokens_per_byte
                    metrics.write(step=trainer.step, validation_loss=loss)
                    progress.say(f"step {trainer.step}: validation {loss:.4f} nats a byte")
                if last or trainer.step % settings.save_every == 0:
                    save()
                    saved = trainer.step
            if interrupts.asked and saved != trainer.step:
                save()
            stopped = interrupts.asked and trainer.step < steps
    finally:
        progress.close()
        metrics.close()
    plot_loss({progress.label: out / "metrics.jsonl"}, out / "loss.png")
    plot_health(out / "metrics.jsonl", out / "health.png")
    if stopped:
        progress.say(f"stopped at step {trainer.step} of {steps}, saved; do: nvfp4 train --out {out} --resume")
    return Result(
        out, model, tokenizer, loss, trainer.step, trainer.skipped, trainer.tokens / max(trainer.seconds, 1e-9), stopped
    )


def plan_steps(settings: Settings, trainer: Trainer, validation: list[Batch], found: snapshot.Snapshot | None) -> int:
    """The number of steps is fixed before the first one, also by --minutes: the schedule must not depend on the clock."""
    if settings.steps:
        return settings.steps
    if found:
        return found.state["steps"]
    return steps_that_fit(trainer, validation, settings.minutes or 5.0)


def check_folder(out: Path, resume: bool, found: snapshot.Snapshot | None, damaged: list[str]) -> None:
    """A run that was killed before its first snapshot may begin anew, with or without --resume."""
    if resume and not found and damaged:
        raise ValueError(damaged[0])
    if resume and not (out / "run.json").exists():
        raise ValueError(f"out: {out} holds no run to resume; do: start without --resume")
    if not resume and (found or damaged):
        raise ValueError(f"out: {out} already holds a run; do: add --resume, or name another folder with --out")


def prepare_folder(out: Path, settings: Settings, config: HybridConfig) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        snapshot.remove_unfinished(out)
    except OSError as error:
        raise ValueError(
            f"out: {out} cannot be written ({error.strerror}); do: name another folder with --out"
        ) from error
    snapshot.write_text(out / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    snapshot.write_text(out / "run.json", settings.to_json())


def log(report: StepReport, metrics: Metrics, progress: Progress, tokens_per_byte: float, trainer: Trainer) -> None:
    values = {
        "step": report.step, "loss": report.losses["lm"] * tokens_per_byte, "losses": report.losses,
        "gradient_norm": report.gradient_norm, "lr": report.lr, "tokens": trainer.tokens,
        "seconds": round(report.seconds, 4), "tokens_per_second": round(report.tokens / report.seconds, 1),
    }  # fmt: skip
    if report.expert_load:
        values["expert_load"] = report.expert_load
    if report.health:
        values["health"] = report.health.summary()
    if report.bad:
        values.update(
            skipped=True,
            origin=str(report.skipped),
            gradient_norm=None,
            losses={k: v if math.isfinite(v) else None for k, v in report.losses.items()},
        )
        values["loss"] = values["loss"] if math.isfinite(values["loss"]) else None
        where = f"first in {report.skipped}" if report.skipped else "and not again when it was repeated"
        progress.say(
            f"step {report.step} skipped: its gradient is not finite, {where} ({trainer.skipped} skipped so far)"
        )
    metrics.write(**values)
    progress.step(report, trainer.device)


def clear(out: Path) -> None:
    """Removes an earlier run in `out`: for commands that own their folder, such as the demo."""
    if (out / "run.json").exists():
        shutil.rmtree(out)
    elif out.exists() and os.listdir(out):
        raise ValueError(f"out: {out} holds files that are no run; do: name another folder with --out")
