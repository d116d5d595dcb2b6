"""Draws results/<device>.json as results/<device>.png: python benchmarks/plot.py results/<device>.json

A panel for each op, series and kind of rate (GB/s, TFLOP/s, items/s): a curve against size for each backend, peers with open
marks, and the limit that was measured in the same run as a dashed line. Below, as bars, the cases of fewer than three sizes.
"""

import json
import math
import sys
from pathlib import Path

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RATES = (
    ("flops_per_second", "TFLOP/s", 1e12),
    ("bytes_per_second", "GB/s", 1e9),
    ("items_per_second", "items/s", 1.0),
    ("seconds", "ms", 1e-3),
)
CURVE, WIDE = 3, 3  # the fewest sizes of a curve; panels side by side


def draw(source: Path) -> Path:
    from matplotlib.figure import Figure

    report = json.loads(source.read_text())
    curves, bars = panels(report["rows"])
    lines = math.ceil(len(curves) / WIDE)
    columns = {}, {}
    for panel, rows in bars.items():
        min(columns, key=height)[panel] = rows
    heights = 2.9 * lines, 0.17 * max(map(height, columns))
    figure = Figure(figsize=(14, 0.6 + sum(heights)), layout="constrained")
    figure.suptitle(
        f"{report['device']}, torch {report['torch']}, {report['date']}, commit {report['commit']}", fontsize=11
    )
    above, below = figure.subfigures(2, 1, height_ratios=[h or 0.01 for h in heights], hspace=0.02)
    if curves:
        axes = above.subplots(lines, WIDE, squeeze=False).flatten()
        for axis, (panel, rows) in zip(axes, sorted(curves.items()), strict=False):
            draw_curves(axis, panel, rows)
        for axis in axes[len(curves) :]:
            axis.remove()
    if bars:
        below.suptitle("x: times its yardstick of the same run; |: the limit", fontsize=9)
    for side, column in zip(below.subfigures(1, 2), columns, strict=True):
        ratios = [height({panel: rows}) for panel, rows in column.items()]
        axes = side.subplots(len(column), 1, squeeze=False, height_ratios=ratios)[:, 0] if column else ()
        for axis, (panel, rows) in zip(axes, column.items(), strict=True):
            draw_bars(axis, panel, rows)
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=100)
    return target


def height(column: dict) -> int:
    """Lines of text that panels of bars are tall."""
    return sum(len(rows) + 4 for rows in column.values())


def panels(rows: list[dict]) -> tuple[dict, dict]:
    """Rows by (op, series, rate) that make curves, and by (op, "", rate) those that do not. Of one case's peers of the same
    name, the fastest."""
    fastest = {}
    for row in sorted(rows, key=lambda row: row["seconds"]):
        fastest.setdefault((row["op"], row["case"], row["backend"], row["dtype"]), row)
    kept = [row for row in rows if row is fastest[row["op"], row["case"], row["backend"], row["dtype"]]]
    grouped = {}
    for row in kept:
        grouped.setdefault((row["op"], row.get("series", ""), next(r for r in RATES if r[0] in row)), []).append(row)
    curves, bars = {}, {}
    for (op, series, rate), group in grouped.items():
        if len({row.get("size") for row in group}) >= CURVE:
            curves[op, series, rate] = sorted(group, key=lambda row: row["size"])
        else:
            bars.setdefault((op, "", rate), []).extend(group)
    return curves, bars


def limit_of(row: dict) -> float:
    """What the row's rate (a second) could be at most; NaN where no limit was measured."""
    rate = next(r for r, _, _ in RATES if r in row)
    return row[rate] / row.get("share_of_limit", math.nan)


def draw_curves(axis, panel: tuple, rows: list[dict]) -> None:
    op, series, (rate, unit, scale) = panel
    by_line = {}
    for row in rows:
        by_line.setdefault((row["yardstick"], row["backend"], row["dtype"]), []).append(row)
    for (peer, backend, dtype), colour in zip(sorted(by_line), COLOURS * len(by_line), strict=False):
        own = by_line[peer, backend, dtype]
        face = "white" if peer else colour
        axis.plot(
            [row["size"] for row in own], [row[rate] / scale for row in own], "o-", label=f"{backend} {dtype}",
            color=colour, markerfacecolor=face, markersize=4.5, linewidth=1.5,
        )  # fmt: skip
    limits = {row["size"]: limit_of(row) / scale for row in rows if "share_of_limit" in row}
    if limits:
        axis.plot(limits.keys(), limits.values(), "k--", linewidth=1.2, label="limit")
    axis.set_xscale("log", base=2)
    sizes = sorted({row["size"] for row in rows})
    axis.set_xticks(sizes, [short(size) for size in sizes], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_ylim(bottom=0)
    axis.margins(y=0.25)
    axis.tick_params(labelsize=8)
    axis.set_xlabel(rows[0]["axis"], fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.set_title(f"{op}: {series}", fontsize=9, loc="left")
    axis.legend(fontsize=7, framealpha=0.8, edgecolor="none", loc="best", handlelength=2.5)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def draw_bars(axis, panel: tuple, rows: list[dict]) -> None:
    op, _, (rate, unit, scale) = panel
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    labels = [" ".join(str(row[key]) for key in ("case", "backend", "dtype") if row[key]) for row in rows]
    values = [row[rate] / scale for row in rows]
    colours = [COLOURS[backends.index(row["backend"]) % len(COLOURS)] for row in rows]
    texts = [
        (f" {value:,.0f}" if value >= 1000 else f" {value:.3g}")
        + (f" · {row['times_yardstick']:.2f}x" if "times_yardstick" in row else "")
        for value, row in zip(values, rows, strict=True)
    ]
    axis.bar_label(
        axis.barh(labels, values, color=colours),
        texts,
        fontsize=7,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
    axis.plot([limit_of(row) / scale for row in rows], range(len(rows)), "|", color="black", markersize=9)
    axis.invert_yaxis()
    axis.margins(x=0.22, y=0.02)
    axis.locator_params(axis="x", nbins=5)
    axis.tick_params(labelsize=7)
    axis.set_title(f"{op}, {unit}", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def short(size: float) -> str:
    """65536 as 64K."""
    for factor, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")):
        if size >= factor:
            return f"{size / factor:.3g}{letter}"
    return f"{size:g}"


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
