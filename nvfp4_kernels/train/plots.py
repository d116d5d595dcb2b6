"""loss.png and health.png of a run, or of several side by side; written to files, never shown."""

from pathlib import Path

from nvfp4_kernels.train.progress import read_metrics

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(rows: int, height: float):
    from matplotlib.figure import Figure  # not pyplot: it would look for a display and keep every figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:, 0]


def smooth(values: list[float], keep: float = 0.9) -> list[float]:
    """An exponential mean without the pull of its start."""
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


def plot_loss(runs: dict[str, Path], target: Path, unit: str, levels: dict[str, float] | None = None) -> Path:
    """Training loss (thin), its running mean and validation losses (dots) of each run.

    runs: label -> metrics.jsonl. levels: horizontal lines to compare with, such as the corpus's entropies.
    """
    figure, (axis,) = new_figure(1, 4.5)
    for colour, (label, path) in zip(COLOURS, runs.items(), strict=False):
        rows = read_metrics(path)
        steps = [r for r in rows if "loss" in r and not r.get("skipped")]
        checks = [r for r in rows if "validation_loss" in r]
        x, y = [r["step"] for r in steps], [r["loss"] for r in steps]
        axis.plot(x, y, color=colour, alpha=0.2, linewidth=0.7)
        axis.plot(x, smooth(y), color=colour, linewidth=1.6, label=label)
        axis.plot([r["step"] for r in checks], [r["validation_loss"] for r in checks], "o", color=colour, markersize=5)
        for r in (r for r in rows if r.get("skipped")):
            axis.axvline(r["step"], color=colour, linestyle=":", linewidth=1)
    for name, level in (levels or {}).items():
        axis.axhline(level, color="grey", linestyle="--", linewidth=0.8)
        axis.annotate(
            f"{name} {level:.2f}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    axis.set(xlabel="step", ylabel=f"loss, {unit} (dots: validation)")
    axis.legend()
    figure.savefig(target, dpi=140)
    return target


def plot_health(path: Path, target: Path) -> Path | None:
    """Signal-to-noise, flushed and clipped shares, gradient norm and expert load over the steps; None for no probe."""
    rows = [r for r in read_metrics(path) if "loss" in r]
    probes = [r for r in rows if r.get("health", {}).get("worst_db") is not None]
    figure, axes = new_figure(4, 9)
    x = [r["step"] for r in probes]
    axes[0].plot(x, [r["health"]["mean_db"] for r in probes], color=COLOURS[0], label="mean", marker=".")
    axes[0].plot(x, [r["health"]["worst_db"] for r in probes], color=COLOURS[1], label="worst layer", marker=".")
    axes[0].set(ylabel="signal to noise, dB")
    axes[1].plot(
        x, [r["health"]["flushed"] * 100 for r in probes], color=COLOURS[0], label="flushed to zero", marker="."
    )
    axes[1].plot(x, [r["health"]["clipped"] * 100 for r in probes], color=COLOURS[1], label="clipped", marker=".")
    axes[1].set(ylabel="% of values")
    axes[2].semilogy(
        [r["step"] for r in rows], [r["gradient_norm"] or None for r in rows], color=COLOURS[2], linewidth=0.8
    )
    axes[2].set(ylabel="gradient norm")
    loads = [
        (r["step"], r["expert_load"]["max_violation"]) for r in rows if "max_violation" in r.get("expert_load", {})
    ]
    axes[3].plot(*zip(*loads, strict=True), color=COLOURS[3], linewidth=0.8) if loads else None
    axes[3].set(ylabel="expert load over the mean", xlabel="step")
    for axis in axes[:2]:
        axis.legend() if probes else None
    figure.savefig(target, dpi=140)
    return target
