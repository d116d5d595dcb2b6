"""A run from settings to result: builds model, data and optimizer, trains, saves, resumes, stops cleanly, draws."""

import contextlib
import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.recipe import Recipe, get_recipe
from nvfp4_kernels.train.corpus import Corpus
from nvfp4_kernels.train.loop import StepReport, Trainer
from nvfp4_kernels.train.optimizer import build_optimizer
from nvfp4_kernels.train.plots import plot_health, plot_loss
from nvfp4_kernels.train.progress import Metrics, Progress
from nvfp4_kernels.train.ranks import ALONE, Ranks
from nvfp4_kernels.train.schedule import Budget, Schedule, as_steps
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import build_config, build_model, load_data, split
from nvfp4_kernels.train.tokenizer import load_tokenizer


@dataclass
class Result:
    """How a run ended. unit: of the losses, nats a byte where the text is known, else nats a token.

    model: if it was sharded, this rank's shards.
    """

    out: Path
    model: HybridModel
    tokenizer: object
    validation_loss: float | None
    unit: str
    steps: int
    skipped: int
    tokens_per_second: float
    stopped: bool


class Interrupts:
    """The first Ctrl-C (or SIGTERM) asks to stop after the step, the second stops at once.

    together: seconds in which further ones count as the first: torchrun hands on to its processes what they get themselves.
    """

    def __init__(self, together: float = 0.0):
        self.asked, self.together = False, together

    def __enter__(self) -> "Interrupts":
        self.before = {}
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for name in (signal.SIGINT, signal.SIGTERM):
                self.before[name] = signal.signal(name, self.ask)
        return self

    def ask(self, number, frame) -> None:
        if not self.asked:
            self.asked, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > self.together:
            raise KeyboardInterrupt

    def __exit__(self, *error) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)


def train(settings: Settings, resume: bool = False, quiet: bool = False, ranks: Ranks = ALONE) -> Result:
    """Trains as `settings` say, in the folder `settings.out`; with `resume`, from its newest whole snapshot.

    ranks: the processes that do so together (`ranks.joined`), each of them calling this; they stop after the same step.
    Raises ValueError with one line that says what to do.
    """
    together = 0.0 if ranks.size == 1 else 5.0
    with Run(settings, resume, quiet=quiet, ranks=ranks) as run, Interrupts(together) as interrupts:
        budget = Budget((settings.minutes or 5.0) * 60, settings.decay)
        while not run.done and not ranks.most(interrupts.asked):
            run.advance(run.trainer.seconds / budget.seconds)
            if run.steps is None:
                run.fix_steps(budget.steps(run.trainer.step, run.trainer.seconds))
        return run.finish()


class Run:
    """A run in its folder, a step at a time.

    recipe: instead of the one `settings` name. corpus: instead of reading it again. line: of the terminal, for its bar.
    ranks: the processes that do the run together; the first of them writes and tells. All read data and snapshots.
    """

    def __init__(
        self,
        settings: Settings,
        resume: bool = False,
        recipe: Recipe | None = None,
        quiet: bool = False,
        corpus: Corpus | None = None,
        line: int = 0,
        ranks: Ranks = ALONE,
    ):
        if settings.shard and ranks.size == 1:
            raise ValueError(
                "shard: got one process; allowed: several (do: torchrun --nproc-per-node 2 -m nvfp4_kernels train ...)"
            )
        self.ranks = ranks
        # Sums are split by thread: a run that is to be resumed bit for bit keeps the number it began with.
        self.settings = settings = settings.replace(threads=settings.threads or torch.get_num_threads())
        torch.set_num_threads(settings.threads)
        self.recipe, self.out = recipe or get_recipe(settings.recipe), Path(settings.out)
        found, damaged = snapshot.newest(self.out / "checkpoints")
        config = HybridConfig.load(found.path) if found else build_config(settings)  # whatever became of --config since
        check_folder(self.out, resume, found, damaged)
        self.tokenizer = load_tokenizer(settings.tokenizer, config.vocab_size, config.eos_token_id)
        self.corpus = corpus or load_data(settings, config, self.tokenizer)
        self.fingerprint = self.corpus.fingerprint
        if found and found.state["corpus"] != self.fingerprint:
            raise ValueError(
                f"data: got {self.fingerprint}; allowed: {found.state['corpus']}, what the run began with "
                "(do: give the same data)"
            )
        if len(seen := set(ranks.all(f"{self.fingerprint}, to start at step {found.step if found else 0}"))) > 1:
            raise ValueError(f"data, out: got {' and '.join(sorted(seen))}; allowed: the same in all processes")
        data, self.validation = split(settings, self.corpus)
        model = build_model(config, settings, self.recipe, found.path if found else None)
        optimizer = build_optimizer(model, settings.lr, settings.weight_decay)
        options = (settings.accumulate, settings.clip, settings.health_every, ranks)
        self.trainer = Trainer(model, data, optimizer, Schedule(settings.lr, None), *options)
        if found:
            self.trainer.load(found.state["trainer"], found.tensors)
        if found and not settings.steps and found.state.get("minutes") == settings.minutes:
            self.fix_steps(found.state["steps"], found.state.get("decay"))
        else:  # other --steps or --minutes than the run had
            self.fix_steps(settings.steps)
        ranks.first(lambda: prepare_folder(self.out, settings, config))
        metrics = self.out / "metrics.jsonl" if ranks.rank == 0 else Path(os.devnull)
        self.metrics = Metrics(metrics, found.state["metrics_bytes"] if found else 0)
        self.progress = Progress(self.recipe.name, self.trainer.step, quiet or ranks.rank > 0, line)
        self.saved, self.loss = self.trainer.step, None
        for text in damaged:
            self.progress.say(f"warning: {text}")
        if found:
            whole = f" of {self.steps}" if self.steps else ""
            what = "weights, optimizer, data position, noise and torch's RNG"
            self.progress.say(f"resumed at step {found.step}{whole}: {what}")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        self.progress.close()
        self.metrics.close()

    @property
    def steps(self) -> int | None:
        return self.trainer.schedule.steps

    @property
    def done(self) -> bool:
        return self.steps is not None and self.trainer.step >= self.steps

    def fix_steps(self, steps: int | None, decay: int | None = None) -> None:
        """The number of steps, once known. While it is not, a warm-up given as a share is one of 2,000 steps.

        decay: in steps. None: as the settings say, and, where a clock ends the run, from now on at the latest.
        """
        s = self.settings
        warmup = as_steps(s.warmup, s.steps or 2000)
        if decay is None:
            decay = 0 if steps is None else max(as_steps(s.decay, steps), 0 if s.steps else steps - self.trainer.step)
        self.trainer.schedule = Schedule(s.lr, steps, warmup, decay, s.decay_shape)

    def advance(self, time_share: float = 0.0) -> None:
        """One step, and what is due after it. time_share: of the time that is gone, where a clock ends the run."""
        trainer, every = self.trainer, self.settings.validation_every
        log(trainer.run_step(), self, time_share)
        trainer.check_patience()
        if self.validation and every and trainer.step % every == 0 and not self.done:
            self.validate()
        if trainer.step % self.settings.save_every == 0 and not self.done:
            self.save()

    def validate(self) -> None:
        self.loss = self.trainer.validate(self.validation) * self.corpus.tokens_per_byte
        self.metrics.write(step=self.trainer.step, validation_loss=self.loss)
        self.progress.say(f"{self.recipe.name} step {self.trainer.step}: validation {self.loss:.4f} {self.corpus.unit}")

    def save(self) -> None:
        tensors = self.trainer.tensors()
        self.ranks.first(lambda: self.write(tensors))
        self.saved = self.trainer.step

    def write(self, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
        state = {
            "trainer": self.trainer.state(), "corpus": self.fingerprint, "metrics_bytes": self.metrics.position(),
            "minutes": self.settings.minutes, "steps": self.steps, "decay": self.trainer.schedule.decay,
        }  # fmt: skip
        texts = {"config.json": (self.out / "config.json").read_text()}
        snapshot.save(self.out / "checkpoints", self.trainer.step, tensors, state, texts, self.settings.keep)

    def finish(self) -> Result:
        """The last validation, snapshot and plots; of a run that was stopped, the snapshot alone."""
        trainer, out = self.trainer, self.out
        if self.done and self.validation:
            self.validate()
        if self.saved != trainer.step:
            self.save()
        if self.ranks.rank == 0:
            plot_loss({self.recipe.name: out / "metrics.jsonl"}, out / "loss.png", self.corpus.unit)
            plot_health(out / "metrics.jsonl", out / "health.png")
        if not self.done:
            self.progress.say(f"stopped at step {trainer.step}, saved; do: nvfp4 train --out {out} --resume")
        pace = trainer.tokens / max(trainer.seconds, 1e-9)
        return Result(
            out, trainer.model, self.tokenizer, self.loss, self.corpus.unit, trainer.step, trainer.skipped, pace,
            not self.done,
        )  # fmt: skip


def check_folder(out: Path, resume: bool, found: snapshot.Snapshot | None, damaged: list[str]) -> None:
    """A run that was killed before its first snapshot may begin anew, with or without --resume."""
    if resume and not found and damaged:
        raise ValueError(damaged[0])
    if resume and not (out / "run.json").exists():
        raise ValueError(f"out: {out} holds no run to resume; do: start without --resume")
    if not resume and (found or damaged):
        raise ValueError(f"out: {out} already holds a run; do: add --resume, or name another folder with --out")


def prepare_folder(out: Path, settings: Settings, config: HybridConfig) -> None:
    """Makes the folder with config.json and run.json in it; leaves no empty folder behind where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        snapshot.remove_unfinished(out)
        snapshot.write_text(out / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
        snapshot.write_text(out / "run.json", settings.to_json())
    except (OSError, snapshot.SnapshotError) as error:
        with contextlib.suppress(OSError):
            out.rmdir()  # refuses where there is anything in it
        if isinstance(error, snapshot.SnapshotError):
            raise
        do = "do: name another folder with --out"
        raise ValueError(f"out: {out} cannot be written ({error.strerror}); {do}") from error


def log(report: StepReport, run: Run, time_share: float) -> None:
    trainer, losses = run.trainer, report.losses
    values = {
        "step": report.step, "loss": losses["lm"] * run.corpus.tokens_per_byte, "losses": losses,
        "gradient_norm": report.gradient_norm, "lr": report.lr, "tokens": trainer.tokens,
        "seconds": round(report.seconds, 4), "tokens_per_second": round(report.tokens / report.seconds, 1),
    }  # fmt: skip
    if report.expert_load:
        values["expert_load"] = report.expert_load
    if report.health:
        values["health"] = report.health.summary()
    if report.bad:
        finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        values |= {"skipped": True, "origin": str(report.skipped), "gradient_norm": None, "losses": finite}
        values["loss"] = values["loss"] if math.isfinite(values["loss"]) else None
        where = f"first in {report.skipped}" if report.skipped else "and not again when it was repeated"
        run.progress.say(
            f"step {report.step} skipped: its gradient is not finite, {where} ({trainer.skipped} skipped so far)"
        )
    run.metrics.write(**values)
    run.progress.step(report, trainer.device, report.step / run.steps if run.steps else max(time_share, 1e-3))


def clear(out: Path) -> None:
    """Removes an earlier run in `out`: for commands that own their folder, such as the demo."""
    if (out / "run.json").exists():
        shutil.rmtree(out)
    elif out.exists() and os.listdir(out):
        raise ValueError(f"out: {out} holds files that are no run; do: name another folder with --out")
