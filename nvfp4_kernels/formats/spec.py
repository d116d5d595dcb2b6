"""QuantSpec: how one operand is quantized, as a value. Illegal combinations cannot be built."""

from dataclasses import dataclass

BLOCKS = ("1x16", "16x16", "1x32")
ROUNDINGS = ("nearest", "stochastic")
DEFAULT_SIGNS = 0xD7E8  # + + + - + - - - - - - + - + - -, the vector every public NVFP4 recipe uses


@dataclass(frozen=True)
class QuantSpec:
    """One operand's format.

    block: "1x16" or "16x16" (NVFP4: E2M1 codes, one E4M3 scale for each 16 values along the contracted axis, computed
        over 1x16 values or over a 16x16 tile), or "1x32" (MXFP8: E4M3 codes, one power of two for 32 values).
    rounding: "nearest" or "stochastic" (NVFP4 only). The mean of stochastic rounding is the value but for two things: its 8
        random bits leave 1/512 of a step toward zero, and block scales, rounded to nearest in E4M3, leave the largest value
        of about half of the blocks beyond 6 scales, by up to 1/16, where it is clipped ("Pretraining LLMs with NVFP4",
        appendix B; TransformerEngine's scales are the same). The mean weight gradient of normal dy is so 1% off in norm,
        and 0.4% short.
    hadamard: None, or the 16 signs of the random Hadamard transform applied to each run of 16 along the contracted
        axis first; bit i set means sign i is negative. Only with "1x16": a 16x16 tile serves both orientations.
    four_over_six: None, or the error ("mae" or "mse") by which each block chooses whether its largest value becomes
        6 or 4. NVFP4 only.

    Raises ValueError when the combination has no meaning.
    """

    block: str = "1x16"
    rounding: str = "nearest"
    hadamard: int | None = None
    four_over_six: str | None = None

    def __post_init__(self):
        if self.block not in BLOCKS:
            raise ValueError(f"block: got {self.block!r}; allowed: {', '.join(BLOCKS)}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding: got {self.rounding!r}; allowed: {', '.join(ROUNDINGS)}")
        if self.four_over_six not in (None, "mae", "mse"):
            raise ValueError(f"four_over_six: got {self.four_over_six!r}; allowed: None, 'mae', 'mse'")
        if self.hadamard is not None and not (type(self.hadamard) is int and 0 <= self.hadamard < 1 << 16):
            raise ValueError(f"hadamard: got {self.hadamard!r}; allowed: None or a 16-bit sign mask")
        if self.hadamard is not None and self.block != "1x16":
            raise ValueError(f"hadamard: got signs with block {self.block}; allowed: block 1x16")
        if self.block == "1x32" and (self.rounding != "nearest" or self.four_over_six):
            raise ValueError(
                "block: got 1x32 (MXFP8) with stochastic rounding or four_over_six; allowed: nearest alone"
            )

    @property
    def format(self) -> str:
        """ "nvfp4" or "mxfp8"."""
        return "mxfp8" if self.block == "1x32" else "nvfp4"

    @property
    def run(self) -> int:
        """How many values along the contracted axis share a scale: 16 or 32."""
        return 32 if self.block == "1x32" else 16

    @property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    def __str__(self) -> str:
        parts = [self.block, self.rounding]
        if self.hadamard is not None:
            parts.append(f"hadamard={self.hadamard:04x}")
        if self.four_over_six is not None:
            parts.append(f"four_over_six={self.four_over_six}")
        return ":".join(parts)

    @classmethod
    def parse(cls, text: str) -> "QuantSpec":
        """The inverse of str(spec). Raises ValueError for any other text."""
        block, rounding, *options = text.split(":") if text.count(":") else (text, "nearest")
        fields: dict[str, int | str] = {}
        for option in options:
            name, _, value = option.partition("=")
            if name == "hadamard":
                fields[name] = int(value, 16)
            elif name == "four_over_six":
                fields[name] = value
            else:
                raise ValueError(f"spec: got option {option!r}; allowed: hadamard=<hex>, four_over_six=<mae|mse>")
        return cls(block, rounding, **fields)
