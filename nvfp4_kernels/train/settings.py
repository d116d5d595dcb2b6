"""Settings: everything a training run is made of, as one frozen value that is kept beside its checkpoints."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from nvfp4_kernels.train.schedule import SHAPES


@dataclass(frozen=True)
class Settings:
    """Fields are the flags of `nvfp4 train`, whose help says what each means."""

    preset: str = "tiny"
    config: str | None = None
    from_: str | None = None
    quantized: str = "dequantize"
    train_only: str = "*"
    recipe: str = "nvfp4"
    data: str | None = None
    bin_dtype: str = "uint16"
    tokenizer: str = "bytes"
    batch: int = 8
    length: int = 256
    steps: int | None = None
    minutes: float | None = None
    accumulate: int = 1
    lr: float = 2e-3
    warmup: float = 0.05
    decay: float = 0.4
    decay_shape: str = "minus-sqrt"
    weight_decay: float = 0.1
    clip: float = 1.0
    validation: float = 0.02
    validation_every: int = 0
    validation_tokens: int = 65536
    checkpoint_activations: bool = False
    shard: bool = False
    save_every: int = 200
    keep: int = 2
    health_every: int = 50
    seed: int = 0
    threads: int = 0
    out: str = "runs/tiny-nvfp4"

    def __post_init__(self):
        def demand(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed: {allowed}")

        for name in ("batch", "length", "accumulate", "save_every", "keep", "validation_tokens"):
            least = 2 if name == "length" else 1
            demand(getattr(self, name) >= least, name, f"at least {least}")
        demand(self.steps is None or self.steps >= 1, "steps", "at least 1")
        demand(self.minutes is None or self.minutes > 0, "minutes", "more than 0")
        demand(self.steps is None or self.minutes is None, "steps", "steps or minutes, not both")
        for name in ("warmup", "decay", "weight_decay", "validation_every", "health_every", "threads", "seed"):
            demand(getattr(self, name) >= 0, name, "0 or more")
        for name in ("warmup", "decay", "weight_decay", "lr"):
            demand(getattr(self, name) < math.inf, name, "a finite number")
        demand(self.seed < 1 << 63, "seed", "0 to 2^63 - 1")
        demand(self.from_ is None or self.config is None, "config", "config or from, not both")
        demand(self.quantized in ("keep", "dequantize"), "quantized", "keep, dequantize")
        demand(self.decay_shape in SHAPES, "decay_shape", ", ".join(SHAPES))
        demand(self.lr > 0, "lr", "more than 0")
        demand(self.clip > 0, "clip", "more than 0 (inf for none)")
        demand(0 <= self.validation < 0.5, "validation", "a share of the documents from 0 to 0.5")

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.length * self.accumulate

    def replace(self, **changes) -> "Settings":
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def patterns(self) -> list[str]:
        """Those of train_only."""
        return [pattern.strip() for pattern in self.train_only.split(",")]

    @classmethod
    def load(cls, run: Path, argument: str = "out") -> "Settings":
        """The settings a run was started with. Raises ValueError, naming `argument`, where `run` is no run."""
        path = Path(run) / "run.json"
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            missing = f"{argument}: {run} holds no run (no run.json); do: name the --out of an earlier run"
            raise ValueError(missing) from None
        except (ValueError, TypeError) as error:
            do = "start anew with another --out" if argument == "out" else "name the folder of another run"
            raise ValueError(f"{argument}: {path} is damaged ({error}); do: {do}") from None
