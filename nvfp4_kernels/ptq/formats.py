"""Which module gets which format: rules over module names, and the published recipes.

A target is a weight that can be quantized: that of a linear layer, or one of the two stacks of a layer's experts, whose
experts all have one format, for that is how they are run. Patterns are those of fnmatch and the first that matches wins.
Sources: hf_quant_config.json of the published Nemotron 3 checkpoints; the recipes that ModelOpt ships for them.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ptq import published

# nvfp4 and w4a16 store the same weight; nvfp4 has an input scale beside it, for hardware that multiplies FP4 by FP4.
FORMATS = ("nvfp4", "w4a16", "fp8", "bf16")
BITS = {"nvfp4": 4.5, "w4a16": 4.5, "fp8": 8.0, "bf16": 16.0}  # a weight, with its share of the block's scale
NEEDS_INPUT_SCALE = ("nvfp4", "fp8")
Rules = tuple[tuple[str, str], ...]  # (pattern, format)


@dataclass(frozen=True)
class Target:
    """name: of the linear layer, or of the stack ("...experts.up_proj"); shape: [out, in]; experts: how many have one."""

    name: str
    shape: tuple[int, int]
    experts: int | None = None

    @property
    def linears(self) -> int:
        return 1 if self.experts is None else self.experts

    @property
    def weights(self) -> int:
        return self.linears * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Recipe:
    """rules: a model's config -> its Rules. search, four_over_six: as in ptq.scales."""

    name: str
    rules: Callable[[HybridConfig], Rules]
    search: str = "max"
    four_over_six: str | None = None


def targets(model: nn.Module) -> list[Target]:
    """The weights that a format can be given to, in the order of the model. A head tied to the embeddings is none."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and not (name == "lm_head" and model.config.tie_word_embeddings):
            found.append(Target(name, tuple(module.weight.shape)))
        elif isinstance(module, Experts):
            for part in ("up_proj", "down_proj"):
                stack = getattr(module, part)
                found.append(Target(f"{name}.{part}", tuple(stack.shape[1:]), stack.shape[0]))
    return found


def assign(found: Iterable[Target], rules: Rules, default: str = "bf16") -> dict[str, str]:
    """The format of each target by the first rule whose pattern matches it; `default` where none does.

    A stack of experts is matched by its own name and by its experts' ("*.experts.*.up_proj").
    Raises ValueError for an unknown format, a pattern that matches nothing, experts of which one stack alone is quantized,
    and NVFP4 for a weight whose rows are no whole blocks of 16.
    """
    found = list(found)
    for pattern, wanted in rules:
        require(
            wanted in FORMATS,
            "pattern",
            f"format {wanted!r} for {pattern}",
            f"{', '.join(FORMATS)}{near(wanted, FORMATS)}",
        )
        if not any(_matches(target, pattern) for target in found):
            names = [target.name for target in found]
            require(
                False,
                "pattern",
                f"{pattern!r}, which matches no layer",
                f"patterns over {', '.join(names[:3])}, ...{near(pattern, names)}",
            )
    chosen = {}
    for target in found:
        chosen[target.name] = next((form for pattern, form in rules if _matches(target, pattern)), default)
    check(found, chosen)
    return chosen


def check(found: Iterable[Target], chosen: Mapping[str, str]) -> None:
    """Raises ValueError where the layers cannot have the formats `chosen` for them."""
    for target in found:
        form = chosen[target.name]
        if form in ("nvfp4", "w4a16"):
            require(
                target.shape[1] % 16 == 0, target.name, f"{form} with {target.shape[1]} columns",
                f"fp8 or bf16; NVFP4 wants columns by 16 (do: --pattern '{target.name}=fp8' first)",
            )  # fmt: skip
        if target.experts and target.name.endswith(".up_proj"):
            other = chosen[target.name.removesuffix("up_proj") + "down_proj"]
            require(
                (form == "bf16") == (other == "bf16"), target.name, f"{form}, and {other} for down_proj",
                "both quantized, or neither: a layer's experts are run as one",
            )  # fmt: skip


def near(wrong: str, known: Iterable[str]) -> str:
    """ "; nearest: x", or nothing."""
    found = difflib.get_close_matches(wrong, list(known), 1, 0.4)
    return f"; nearest: {found[0]}" if found else ""


def average_bits(found: Iterable[Target], chosen: Mapping[str, str]) -> float:
    """Bits a weight over all targets."""
    found = list(found)
    return sum(t.weights * BITS[chosen[t.name]] for t in found) / sum(t.weights for t in found)


def linears(found: Iterable[Target], chosen: Mapping[str, str]) -> dict[str, int]:
    """How many linear layers each format has, every expert counting for itself as in a published checkpoint."""
    counts: dict[str, int] = {}
    for target in found:
        counts[chosen[target.name]] = counts.get(chosen[target.name], 0) + target.linears
    return counts


def _matches(target: Target, pattern: str) -> bool:
    if fnmatchcase(target.name, pattern):
        return True
    if target.experts is None:
        return False
    stack, _, part = target.name.rpartition(".")
    return all(fnmatchcase(f"{stack}.{e}.{part}", pattern) for e in range(target.experts))


def _layer(index: int, *names: str) -> list[str]:
    return [f"backbone.layers.{index}.mixer.{name}" for name in names]


def _every(config: HybridConfig, letter: str) -> list[int]:
    return [i for i, found in enumerate(config.hybrid_override_pattern) if found == letter]


def _mamba(config: HybridConfig, form: str, before_attention: str) -> list[tuple[str, str]]:
    """before_attention: the format of the Mamba layers right before attention, the first to read their errors."""
    pattern, rules = config.hybrid_override_pattern, []
    for i in _every(config, "M"):
        mine = before_attention if pattern[i + 1 : i + 2] == "*" else form
        rules += [(name, mine) for name in _layer(i, "in_proj", "out_proj")]
    return rules


def _mlps(config: HybridConfig, routed: str, dense: str) -> list[tuple[str, str]]:
    rules = []
    for i in _every(config, "E"):
        rules += [(name, routed) for name in _layer(i, "experts.up_proj", "experts.down_proj")]
        if config.n_shared_experts:
            rules += [(name, dense) for name in _layer(i, "shared_experts.up_proj", "shared_experts.down_proj")]
    for i in _every(config, "-"):
        rules += [(name, dense) for name in _layer(i, "up_proj", "down_proj")]
    return rules


def _nano(config: HybridConfig, form: str) -> Rules:
    return (*_mamba(config, form, "bf16"), *_mlps(config, form, form))


def _super(config: HybridConfig) -> Rules:
    """The published list for the published pattern. Any other: routed experts NVFP4, shared experts, dense MLPs and Mamba
    FP8, which is what the search left of Super's and what Ultra was given throughout."""
    if config.hybrid_override_pattern != published.SUPER_PATTERN:
        return (*_mamba(config, "fp8", "fp8"), *_mlps(config, "nvfp4", "fp8"))
    rules = [(name, "nvfp4") for i in _every(config, "E") for name in _layer(i, "experts.up_proj", "experts.down_proj")]
    rules += [
        (name, "nvfp4") for i in published.SUPER_NVFP4_SHARED_DOWN for name in _layer(i, "shared_experts.down_proj")
    ]
    for part, layers in published.SUPER_FP8.items():
        rules += [(name, "fp8") for i in layers for name in _layer(i, part)]
    return tuple(rules)


def _lightning(config: HybridConfig) -> Rules:
    head = () if config.tie_word_embeddings else (("lm_head", "w4a16"),)
    return (*_mamba(config, "fp8", "fp8"), *_mlps(config, "w4a16", "w4a16"), *head)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("super-nvfp4", _super, "mse"),
        Recipe("nano-nvfp4", lambda config: _nano(config, "nvfp4")),
        Recipe("lightning-w4a16", _lightning, "max", "mse"),
        Recipe("nano-fp8", lambda config: _nano(config, "fp8")),
    )
}


def get_recipe(name: str) -> Recipe:
    """Raises ValueError with the nearest name for an unknown one."""
    require(name in RECIPES, "recipe", repr(name), f"{', '.join(RECIPES)}{near(name, RECIPES)}")
    return RECIPES[name]
