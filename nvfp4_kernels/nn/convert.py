"""convert: the linear layers of any torch model become ours."""

import warnings
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.recipe import LinearRecipe, Recipe, get_recipe


def convert(
    model: nn.Module,
    recipe: "str | Recipe | LinearRecipe | None" = "nvfp4",
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
) -> nn.Module:
    """Give every nn.Linear of `model` the recipe's treatment, in place: the same modules, parameters and hooks, only that each
    is a Linear of ours from then on.

    recipe: a name, a Recipe (rules by module name, high precision for its last layers) or one LinearRecipe for all. None
        makes them torch.nn.Linear again: a state_dict, and so a checkpoint, without the `noise` of stochastic rounding.
    include, exclude: fnmatch patterns over qualified module names ("layers.*.mlp.*"), or one such; exclude wins. None
        includes all; an empty list includes none.
    The depth of a module is its place in the first nn.ModuleList above it. Subclasses of nn.Linear, and what keeps matrices
    elsewhere (the stacked experts of transformers' mixtures), stay as they are.

    Returns `model`. Warns where a recipe that quantizes was asked for, for all layers, and over half of the weights in
    matrices, embeddings aside, stay in high precision. Raises TypeError for what is no module, ValueError for a pattern that
    matches no linear layer (nearly always a typing error) and for a module whose `forward` was replaced, by a tool's hook.
    """
    require(isinstance(model, nn.Module), "model", type(model).__name__, "a torch.nn.Module", TypeError)
    chosen = get_recipe(recipe)
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Linear)}
    everything = include is None and not exclude
    include, exclude = None if include is None else _patterns(include), _patterns(exclude)
    for pattern in (*(include or ()), *exclude):
        if not any(fnmatchcase(name, pattern) for name in linears):
            shown = ", ".join(list(linears)[:5]) + (", ..." if len(linears) > 5 else "")
            raise ValueError(
                f"include, exclude: got {pattern!r}, which matches no linear layer; allowed: patterns over {shown}"
            )
    for name, module in linears.items():
        wanted = include is None or any(fnmatchcase(name, pattern) for pattern in include)
        if not wanted or any(fnmatchcase(name, pattern) for pattern in exclude):
            continue
        if recipe is None:
            if type(module) is Linear:
                module.to_linear()
            continue
        linear_recipe = chosen.for_module(name, depth(model, name))
        if isinstance(module, Linear):
            module.recipe = linear_recipe
            continue
        replaced = "forward" in vars(module)  # by accelerate's hooks, say
        require(
            not replaced, name or "model", "a forward of its own", "that of nn.Linear: convert before others hook in"
        )
        Linear.from_linear(module, linear_recipe)
    if everything and chosen.default.quantized:
        _tell_of_the_rest(model, chosen.name)
    return model


def _patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _tell_of_the_rest(model: nn.Module, recipe: str) -> None:
    """A warning where most of the weights of matrices, embeddings aside, are not quantized."""
    kinds, seen = Counter(), {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    quantized = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if is_lazy(parameter) or parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, Linear) and module.recipe.quantized:
                quantized += parameter.numel()
            else:
                kinds[type(module).__name__] += parameter.numel()
    total = quantized + kinds.total()
    if quantized < total / 2:
        shown = ", ".join(f"{kind} {count / total:.0%}" for kind, count in kinds.most_common(4))
        warnings.warn(
            f"nk.convert: recipe {recipe} quantizes {quantized / total:.0%} of the weights in matrices, embeddings aside; "
            f"in high precision: {shown}",
            stacklevel=3,
        )


def depth(model: nn.Module, name: str) -> float | None:
    """(index + 0.5) / length of the module's place in the first nn.ModuleList on its path; None outside of one."""
    module: nn.Module = model
    for part in name.split(".") if name else ():
        if isinstance(module, nn.ModuleList):
            return (int(part) + 0.5) / len(module)
        module = getattr(module, part)
    return None
