"""Several recipes from one seed on the same batches, one after the other, and a table of what each costs."""

from dataclasses import dataclass
from pathlib import Path

from nvfp4_kernels.recipe import Recipe, bf16, nvfp4
from nvfp4_kernels.train.corpus import Corpus, entropies
from nvfp4_kernels.train.loop import Trainer
from nvfp4_kernels.train.optimizer import build_optimizer
from nvfp4_kernels.train.plots import plot_loss
from nvfp4_kernels.train.run import Result, clear, train
from nvfp4_kernels.train.schedule import Schedule
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import build_config, build_model, load_data, split, steps_that_fit

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
    steps: int

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
        return "\n".join([*lines, f"nats a byte; entropies of {self.corpus.source}: {counts}"])

    @property
    def first(self) -> Result:
        return next(iter(self.results.values()))

    def gap(self, label: str) -> float:
        """Relative excess of a recipe's validation loss over the first one's."""
        return self.results[label].validation_loss / self.first.validation_loss - 1


def compare(settings: Settings, recipes: dict[str, Recipe], quiet: bool = False) -> Comparison:
    """Trains each of `recipes` in a folder of its own below settings.out; an earlier comparison there is replaced.

    settings.minutes, where given, is the mean for a recipe: all train the same number of steps, as many as fit."""
    if settings.validation == 0:
        raise ValueError("validation: got 0; allowed: a share above 0, the recipes are compared by it")
    config = build_config(settings)
    corpus, _ = load_data(settings, config)
    if settings.steps is None:
        settings = settings.replace(steps=common_steps(settings, recipes, corpus), minutes=None)
    out, results = Path(settings.out), {}
    for label, recipe in recipes.items():
        folder = out / label.replace(" ", "-").replace("/", "-over-")
        clear(folder)
        results[label] = train(settings.replace(out=str(folder)), recipe=recipe, quiet=quiet, corpus=corpus)
        if results[label].stopped:
            break
    levels = entropies(corpus)
    plot_loss({label: result.out / "metrics.jsonl" for label, result in results.items()}, out / "loss.png", levels)
    return Comparison(results, levels, corpus, settings.steps)


def common_steps(settings: Settings, recipes: dict[str, Recipe], corpus: Corpus) -> int:
    """Steps after which all recipes together have taken settings.minutes each on average."""
    rates = []
    for recipe in recipes.values():
        packer, validation = split(settings, corpus)
        model = build_model(build_config(settings), settings, recipe)
        trainer = Trainer(
            model, packer, build_optimizer(model, settings.lr), Schedule(settings.lr, 1), settings.accumulate
        )
        rates.append(steps_that_fit(trainer, validation, settings.minutes))
    return max(1, round(len(rates) / sum(1 / rate for rate in rates)))


def ablate(settings: Settings) -> str:
    """The table of ABLATIONS."""
    return compare(settings, ABLATIONS).table()
