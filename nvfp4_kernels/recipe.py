"""Recipes: which operand of which linear layer is quantized, and how. Values, no behaviour.

A linear layer has three GEMMs and so six operands; LinearRecipe gives each a QuantSpec or None (high precision). A Recipe
gives each module of a model its LinearRecipe: by name, and by depth for the last layers, which stay in high precision.
Sources: "Pretraining LLMs with NVFP4", section 4; Nemotron 3 Super report, section 2, table 3.
"""

from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec


@dataclass(frozen=True)
class LinearRecipe:
    """The six operands of y = x W^T, dx = dy W, dW = dy^T x. None: high precision.

    fprop_x, fprop_w: blocks along the input features. dgrad_dy, dgrad_w: along the output features.
    wgrad_dy, wgrad_x: along the tokens; their Hadamard signs must be equal.
    Raises ValueError when the two operands of one GEMM went through different transforms.
    """

    fprop_x: QuantSpec | None = None
    fprop_w: QuantSpec | None = None
    dgrad_dy: QuantSpec | None = None
    dgrad_w: QuantSpec | None = None
    wgrad_dy: QuantSpec | None = None
    wgrad_x: QuantSpec | None = None

    def __post_init__(self):
        for a, b in (("fprop_x", "fprop_w"), ("dgrad_dy", "dgrad_w"), ("wgrad_dy", "wgrad_x")):
            signs = [spec and spec.hadamard for spec in (getattr(self, a), getattr(self, b))]
            if signs[0] != signs[1]:
                raise ValueError(f"{a}, {b}: got Hadamard signs {signs[0]} and {signs[1]}; allowed: the same on both")
        # asked at each call of each layer, and so no property
        object.__setattr__(self, "quantized", any(getattr(self, f.name) is not None for f in fields(self)))

    @property
    def format(self) -> str:
        """What the operands are made of: "high", "nvfp4", "mxfp8", or several joined by "+"."""
        specs = [getattr(self, f.name) for f in fields(self)]
        return "+".join(sorted({spec.format if spec else "high" for spec in specs}))

    def switch(
        self,
        *,
        two_dimensional: bool | None = None,
        hadamard: int | bool | None = None,
        stochastic: bool | None = None,
        four_over_six: str | bool | None = None,
    ) -> "LinearRecipe":
        """The same recipe with single techniques switched; None leaves one as it is, MXFP8 operands stay untouched.

        two_dimensional: 16x16 weight tiles, or 1x16. hadamard: False, True or a sign mask for the operands of wgrad.
        stochastic: rounding of the gradients. four_over_six: False, "mae" or "mse", for every operand.
        """

        def change(name: str, spec: QuantSpec | None) -> QuantSpec | None:
            if spec is None or spec.format != "nvfp4":
                return spec
            if two_dimensional is not None and name.endswith("_w"):
                spec = replace(spec, block="16x16" if two_dimensional else "1x16")
            if hadamard is not None and name.startswith("wgrad"):
                mask = DEFAULT_SIGNS if hadamard is True else None if hadamard is False else hadamard
                spec = replace(spec, hadamard=mask)
            if stochastic is not None and name.endswith("_dy"):
                spec = replace(spec, rounding="stochastic" if stochastic else "nearest")
            if four_over_six is not None:
                spec = replace(spec, four_over_six=four_over_six or None)
            return spec

        return LinearRecipe(**{f.name: change(f.name, getattr(self, f.name)) for f in fields(self)})


HIGH = LinearRecipe()
NVFP4 = LinearRecipe(
    fprop_x=QuantSpec("1x16"),
    fprop_w=QuantSpec("16x16"),
    dgrad_dy=QuantSpec("1x16", "stochastic"),
    dgrad_w=QuantSpec("16x16"),
    wgrad_dy=QuantSpec("1x16", "stochastic", DEFAULT_SIGNS),
    wgrad_x=QuantSpec("1x16", "nearest", DEFAULT_SIGNS),
)
MXFP8 = LinearRecipe(*[QuantSpec("1x32")] * 6)


@dataclass(frozen=True)
class Recipe:
    """A LinearRecipe for each linear layer of a model.

    default: for modules that no rule names. rules: (pattern, LinearRecipe, why), first match wins; patterns are those of
    fnmatch over qualified names. tail: the share of the layers, at the end, that stays in high precision.
    """

    name: str
    default: LinearRecipe
    rules: tuple[tuple[str, LinearRecipe, str], ...] = ()
    tail: float = 0.0

    def explain(self, module: str, depth: float | None = None) -> tuple[LinearRecipe, str]:
        """The recipe of `module` and the reason for it. depth: (layer index + 0.5) / layers, None outside the layers."""
        for pattern, recipe, why in self.rules:
            if fnmatchcase(module, pattern) and not recipe.quantized:
                return recipe, why
        if depth is not None and depth > 1 - self.tail:
            return HIGH, f"last {self.tail:.0%} of the layers"
        for pattern, recipe, why in self.rules:
            if fnmatchcase(module, pattern):
                return recipe, why
        return self.default, f"default of recipe {self.name}"

    def for_module(self, module: str, depth: float | None = None) -> LinearRecipe:
        return self.explain(module, depth)[0]

    def switch(self, **switches) -> "Recipe":
        """The recipe with single techniques switched everywhere; arguments of LinearRecipe.switch."""
        rules = tuple((pattern, recipe.switch(**switches), why) for pattern, recipe, why in self.rules)
        label = ", ".join(f"{k}={v}" for k, v in switches.items())
        return replace(self, name=f"{self.name}({label})", default=self.default.switch(**switches), rules=rules)


_ALWAYS_HIGH = (
    ("*lm_head*", HIGH, "output head"),
    ("*embed*", HIGH, "embedding"),
    ("*router*", HIGH, "router"),
    ("*.gate", HIGH, "router"),
    ("mtp.*", HIGH, "multi-token prediction"),
    ("*.mtp.*", HIGH, "multi-token prediction"),
    ("*lora_*", HIGH, "adapter"),
)
bf16 = Recipe("bf16", HIGH)
nvfp4 = Recipe("nvfp4", NVFP4, _ALWAYS_HIGH, tail=0.15)
nemotron3 = Recipe(
    "nemotron3",
    NVFP4,
    (
        *_ALWAYS_HIGH,
        *((f"*.{name}_proj", HIGH, "attention projection") for name in "qkvo"),
        *((f"*.{name}_latent_proj", HIGH, "latent projection") for name in ("fc1", "fc2")),
        ("*.mixer.out_proj", MXFP8, "Mamba output: NVFP4 flushes too many values to zero"),
    ),
    tail=0.15,
)
RECIPES = {recipe.name: recipe for recipe in (bf16, nvfp4, nemotron3)}


def get_recipe(recipe: "str | Recipe | LinearRecipe | None") -> Recipe:
    """A Recipe from its name, from a LinearRecipe for every module, or itself; None is bf16. Raises ValueError, TypeError."""
    if recipe is None:  # isinstance, not match: torch 2.10 traces no class patterns
        return bf16
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, LinearRecipe):
        return Recipe("custom", recipe)
    if isinstance(recipe, str):
        if recipe in RECIPES:
            return RECIPES[recipe]
        raise ValueError(f"recipe: got {recipe!r}; allowed: {', '.join(RECIPES)}")
    raise TypeError(f"recipe: got {type(recipe).__name__}; allowed: a name, Recipe or LinearRecipe")
