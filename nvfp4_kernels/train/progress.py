"""What a run tells while it runs: metrics.jsonl always; a bar on a terminal, plain lines into a pipe."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from nvfp4_kernels.train.loop import StepReport

try:
    import resource
except ImportError:  # Windows
    resource = None


class Metrics:
    """metrics.jsonl: one JSON object a line, each with its step."""

    def __init__(self, path: Path, keep_bytes: int = 0):
        """keep_bytes: how much of an existing file stays, at a resume: what was written up to the resumed step."""
        self.file = open(path, "ab")
        if os.path.getsize(path) > keep_bytes:
            self.file.truncate(keep_bytes)
        self.file.seek(0, os.SEEK_END)

    def write(self, **values) -> None:
        self.file.write(json.dumps(values).encode() + b"\n")
        self.file.flush()

    def position(self) -> int:
        """Bytes so far, safe on disk."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def memory_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU where there is one, else of this process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


def health_text(summary: dict) -> str:
    if "worst_db" not in summary:
        return "q: none"
    layer = summary["worst_layer"].removeprefix("backbone.")
    return (
        f"q: min {summary['worst_db']:.1f} dB {layer} {summary['worst_operand']} "
        f"clip {summary['clipped']:.2%} zero {summary['flushed']:.1%}"
    )


class Progress:
    """A tqdm bar on a terminal; otherwise a line every ten seconds and one at the end and at every event."""

    EVERY = 10.0

    def __init__(self, label: str, done: int, quiet: bool = False, line: int = 0):
        self.label, self.quiet, self.bar = label, quiet, None
        self.health, self.load, self.rate, self.said, self.begun = {}, None, None, 0.0, time.monotonic()
        self.from_share = None
        if sys.stderr.isatty() and not quiet:
            from tqdm import tqdm

            layout = "{percentage:3.0f}% |{bar:12}| {desc}"
            self.bar = tqdm(
                initial=done, total=done + 1, desc=label, dynamic_ncols=True, position=line, bar_format=layout
            )

    def step(self, report: StepReport, device: torch.device, share: float) -> None:
        """share: how much of the run is done, 0 to 1; the number of steps follows from it, also where a clock ends it."""
        rate = report.tokens / report.seconds
        self.rate = rate if self.rate is None else 0.9 * self.rate + 0.1 * rate
        self.health = report.health.summary() if report.health else self.health
        self.load = report.expert_load.get("max_violation", self.load)
        if self.from_share is None:
            self.from_share, self.begun = share, time.monotonic()  # the first step of a process is slower than the rest
        pace = (time.monotonic() - self.begun) / max(share - self.from_share, 1e-9)
        steps = max(report.step, round(report.step / share))
        parts = [
            f"{self.label} step {report.step}/{steps}",
            f"loss {report.losses['lm']:.4f}",
            f"eta {clock(pace * (1 - min(share, 1.0)))}",
            f"{self.rate:,.0f} tok/s",
            f"gnorm {report.gradient_norm:.2f}",
            f"lr {report.lr:.1e}",
            f"mem {memory_bytes(device) / 1e9:.1f} GB",
            health_text(self.health),
        ]
        if self.load is not None:
            parts.append(f"load +{self.load:.2f}")
        if self.bar is not None:
            self.bar.total = steps
            self.bar.set_description_str(" · ".join(parts), refresh=False)
            self.bar.update()
        elif not self.quiet and (time.monotonic() - self.said >= self.EVERY or share >= 1):
            self.say(" | ".join(parts))

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.said = time.monotonic()
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
