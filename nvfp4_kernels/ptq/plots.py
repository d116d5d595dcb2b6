"""The error of each layer as a picture, beside the formats that the layers were given."""

from pathlib import Path

from nvfp4_kernels.ptq.quantize import Report

# Told apart by every kind of colour vision (Okabe and Ito), and by their marks in print.
STYLES = {"nvfp4": ("#D55E00", "o"), "w4a16": ("#E69F00", "s"), "fp8": ("#0072B2", "^"), "bf16": ("#999999", ".")}


def plot_errors(report: Report, target: Path) -> Path:
    """Relative error of each weight over the index of its layer, a mark for each format; what stays in bf16 lies at 0."""
    from matplotlib.figure import Figure  # not pyplot: it would look for a display

    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for form, (colour, mark) in STYLES.items():
        points = [(layer_index(x.target.name), 100 * x.relative_error) for x in report.losses if x.format == form]
        if points:
            axis.plot(*zip(*points, strict=True), mark, color=colour, label=form, markersize=5, alpha=0.8)
    axis.set(xlabel="layer", ylabel="relative error of the weight, %", ylim=(-0.4, None))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.savefig(target, dpi=140)
    return target


def layer_index(name: str) -> int:
    """The layer's place in its stack; -1 for what lies outside, the head."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
