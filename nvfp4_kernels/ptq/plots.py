"""The error of each layer as a picture, beside the formats that the layers were given."""

from pathlib import Path

from nvfp4_kernels.ptq.quantize import Report

# Told apart by every kind of colour vision (Okabe and Ito), and by their marks in print.
STYLES = {"nvfp4": ("#D55E00", "o"), "w4a16": ("#E69F00", "s"), "fp8": ("#0072B2", "^"), "bf16": ("#999999", ".")}


def plot_errors(report: Report, target: Path) -> Path:
    """Relative error of each weight over its layer, a mark for each format; below it, where costs were measured, those."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    count = 1 + max((_layer(loss.target.name) for loss in report.losses), default=-1)
    panels = 2 if report.costs else 1
    figure = Figure(figsize=(8, 3 + 2 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    shown = [
        (x.target.name, x.format, 100 * x.relative_error) for x in report.losses if not x.target.name.startswith("mtp.")
    ]
    _points(axes[0], shown, count)
    axes[0].set(ylabel="relative error of the weight, %")
    if report.costs:
        _points(axes[1], [(c.group.name, c.format, c.divergence) for c in report.costs if c.format != "bf16"], count)
        axes[1].set(ylabel="divergence, nats a token", yscale="log")
    axes[-1].set(xlabel="layer (the last place: head)")
    figure.savefig(target, dpi=140)
    return target


def _points(axis, points: list[tuple[str, str, float]], count: int) -> None:
    """points: (name, format, height). What lies outside the layers stands after the last of them."""
    for form, (colour, mark) in STYLES.items():
        mine = [(count if _layer(name) < 0 else _layer(name), height) for name, own, height in points if own == form]
        if mine:
            axis.plot(*zip(*mine, strict=True), mark, color=colour, label=form, markersize=5, alpha=0.8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()


def _layer(name: str) -> int:
    """The place in the backbone's stack; -1 for what lies outside of it."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["backbone", "layers"] else -1
