"""Several recipes from one seed on the same batches, taking turns, and a table of what each costs."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from nvfp4_kernels.recipe import Recipe, bf16, nvfp4
from nvfp4_kernels.train.corpus import Corpus, entropies
from nvfp4_kernels.train.plots import plot_loss
from nvfp4_kernels.train.run import Interrupts, Result, Run, clear
from nvfp4_kernels.train.schedule import Budget
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import build_config, load_data
from nvfp4_kernels.train.tokenizer import load_tokenizer

ABLATIONS = {
    "bf16": bf16,
    "nvfp4": nvfp4,
    "nvfp4 without RHT": nvfp4.switch(hadamard=False),
    "nvfp4 without SR": nvfp4.switch(stochastic=False),
    "nvfp4 without 2D": nvfp4.switch(two_dimensional=False),
    "nvfp4 with 4/6": nvfp4.switch(four_over_six="mae"),
}


@dataclass
class Comparison:
    """results: label -> Result, the first being what the others are measured against."""

    results: dict[str, Result]
    entropies: dict[str, float]
    corpus: Corpus

    def table(self) -> str:
        base = next(iter(self.results.values())).validation_loss
        width = max(map(len, self.results))
        lines = [f"{'':{width}}  validation loss   gap to {next(iter(self.results))}   tokens/s   steps   skipped"]
        for label, result in self.results.items():
            if result.validation_loss is None:
                lines.append(f"{label:{width}}  stopped at step {result.steps}")
                continue
            gap = f"{result.validation_loss / base - 1:+.2%}" if base and result is not self.first else "-"
            lines.append(
                f"{label:{width}}  {result.validation_loss:15.4f}   {gap:>11}   {result.tokens_per_second:8,.0f}"
                f"   {result.steps:5d}   {result.skipped:7d}"
            )
        counts = ", ".join(f"{name} {value:.2f}" for name, value in self.entropies.items())
        return "\n".join([*lines, f"{self.corpus.unit}; entropies of {self.corpus.source}: {counts}"])

    @property
    def first(self) -> Result:
        return next(iter(self.results.values()))

    def gap(self, label: str) -> float:
        """Relative excess of a recipe's validation loss over the first one's."""
        return self.results[label].validation_loss / self.first.validation_loss - 1


def compare(settings: Settings, recipes: dict[str, Recipe], quiet: bool = False) -> Comparison:
    """Trains with each of `recipes`, in a folder of its own below settings.out; an earlier comparison there is replaced.

    The runs take turns, step by step, so that all see the same machine: their speeds can be compared, and one clock can
    end them all after the same number of steps. settings.minutes is for each of them, on average."""
    if settings.validation == 0:
        raise ValueError("validation: got 0; allowed: a share above 0, the recipes are compared by it")
    config, out = build_config(settings), Path(settings.out)
    tokenizer = load_tokenizer(settings.tokenizer, config.vocab_size, config.eos_token_id)
    corpus = load_data(settings, config, tokenizer)
    folders = {label: out / label.replace(" ", "-").replace("/", "-over-") for label in recipes}
    for folder in folders.values():
        clear(folder)
    budget = Budget(settings.minutes * 60 * len(recipes), settings.decay) if settings.minutes else None
    with contextlib.ExitStack() as stack:
        runs = {
            label: stack.enter_context(
                Run(settings.replace(out=str(folders[label])), False, recipe, quiet, corpus, line)
            )
            for line, (label, recipe) in enumerate(recipes.items())
        }
        first, interrupts = next(iter(runs.values())), stack.enter_context(Interrupts())
        elapsed = 0.0
        while not first.done and not interrupts.asked:
            for run in runs.values():
                run.advance(elapsed / budget.seconds if budget else 0.0)
            elapsed = sum(run.trainer.seconds for run in runs.values())
            if budget and first.steps is None and (steps := budget.steps(first.trainer.step, elapsed)) is not None:
                for run in runs.values():
                    run.fix_steps(steps)
        results = {label: run.finish() for label, run in runs.items()}
    levels = entropies(corpus)
    plot_loss(
        {label: result.out / "metrics.jsonl" for label, result in results.items()},
        out / "loss.png",
        corpus.unit,
        levels,
    )
    return Comparison(results, levels, corpus)


def ablate(settings: Settings) -> str:
    """The table of ABLATIONS."""
    return compare(settings, ABLATIONS).table()
