"""Draws results/<device>.json as results/<device>.png: python benchmarks/plot.py results/<device>.json

A panel for each op and kind of rate (GB/s, GFLOP/s or items/s): every backend in every case, in the order of sizes, with a
mark at the limit that was measured in the same run, and how many times the yardstick's.
"""

import json
import math
import sys
from pathlib import Path

# Okabe and Ito's palette: told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
RATES = (
    ("flops_per_second", "GFLOP/s", 1e9),
    ("bytes_per_second", "GB/s", 1e9),
    ("items_per_second", "items/s", 1.0),
    ("seconds", "ms", 1e-3),
)


def draw(source: Path) -> Path:
    from matplotlib.figure import Figure

    report = json.loads(source.read_text())
    of_panel = {}
    for row in report["rows"]:
        of_panel.setdefault((row["op"], next(r for r in RATES if r[0] in row)), []).append(row)
    counts = [len(rows) for rows in of_panel.values()]
    figure = Figure(figsize=(9, 1 + 0.28 * sum(counts) + 0.8 * len(counts)), layout="constrained")
    heights = {"height_ratios": [n + 2 for n in counts]}
    panels = figure.subplots(len(counts), 1, squeeze=False, gridspec_kw=heights)[:, 0]
    names = list(dict.fromkeys(row["backend"] for row in report["rows"]))
    for axis, ((op, (rate, unit, scale)), rows) in zip(panels, of_panel.items(), strict=True):
        labels = [" ".join(str(row[key]) for key in ("case", "backend", "dtype") if row[key]) for row in rows]
        values = [row[rate] / scale for row in rows]
        bars = axis.barh(labels, values, color=[COLOURS[names.index(row["backend"]) % len(COLOURS)] for row in rows])
        texts = [
            f" {v:.3g}" + (f" · {row['times_yardstick']:.2f}x" if "times_yardstick" in row else "")
            for v, row in zip(values, rows, strict=True)
        ]
        axis.bar_label(bars, texts, fontsize=8)
        limits = [v / row.get("share_of_limit", math.nan) for v, row in zip(values, rows, strict=True)]
        axis.plot(limits, range(len(rows)), "|", color="black", markersize=9)
        axis.invert_yaxis()
        axis.margins(x=0.2, y=0.02)
        axis.tick_params(labelsize=8)
        axis.set_title(f"{op}, {unit} (x: times its yardstick in the same run; |: the limit)", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['device']}, {report['threads']} threads, torch {report['torch']}", fontsize=10)
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=130)
    return target


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
