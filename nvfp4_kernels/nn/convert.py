"""convert: swap the linear layers of any torch model for ours."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.recipe import LinearRecipe, Recipe, get_recipe


def convert(
    model: nn.Module,
    recipe: "str | Recipe | LinearRecipe" = "nvfp4",
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> nn.Module:
    """Give every nn.Linear of `model` the recipe's treatment, in place; parameters are shared, not copied.

    recipe: a name, a Recipe (rules by module name, high precision for its last layers) or one LinearRecipe for all.
    include, exclude: fnmatch patterns over qualified module names ("layers.*.mlp.*"); exclude wins. None includes all;
        an empty list includes none.
    The depth of a module is its place in the first nn.ModuleList above it.

    Returns `model` (or a Linear, when the model itself is an nn.Linear). A pattern that matches no linear layer raises
    ValueError: it is nearly always a typing error.
    """
    recipe = get_recipe(recipe)
    linears = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, Linear)}
    include, exclude = None if include is None else tuple(include), tuple(exclude)
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
        linear_recipe = recipe.for_module(name, depth(model, name))
        if isinstance(module, Linear):
            module.recipe = linear_recipe
        elif name == "":
            return Linear.from_linear(module, linear_recipe)
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear.from_linear(module, linear_recipe))
    return model


def depth(model: nn.Module, name: str) -> float | None:
    """(index + 0.5) / length of the module's place in the first nn.ModuleList on its path; None outside of one."""
    module: nn.Module = model
    for part in name.split(".") if name else ():
        if isinstance(module, nn.ModuleList):
            return (int(part) + 0.5) / len(module)
        module = getattr(module, part)
    return None
