"""Linear: torch.nn.Linear whose three GEMMs follow a recipe."""

import torch
from torch import Tensor, nn

from nvfp4_kernels.autograd.linear import Forms, linear, quantize_weight
from nvfp4_kernels.recipe import HIGH, LinearRecipe


class Linear(nn.Linear):
    """y = x W^T + b by `recipe`; W stays an fp32 master weight (or what `dtype` says).

    recipe: LinearRecipe, None for high precision. It may be replaced at any time by assigning to `.recipe`.
    noise: buffer, int64 [2] (seed, offset) of the stochastic rounding; part of the state_dict, advanced by each backward.

    The quantized weight is kept until the weight changes, so that all micro-batches of a step share it. Changes are seen
    by the version that autograd keeps for each tensor; whoever writes through `weight.data` calls `refresh()`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        recipe: LinearRecipe | None = None,
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe or HIGH
        self.register_buffer("noise", new_noise(device))
        self._forms = FormsCache()

    @classmethod
    def from_linear(cls, source: nn.Linear, recipe: LinearRecipe | None = None) -> "Linear":
        """A Linear that shares the parameters of `source`."""
        made = cls(source.in_features, source.out_features, False, recipe, "meta", source.weight.dtype)
        made.weight, made.bias, made.noise = source.weight, source.bias, new_noise(source.weight.device)
        return made.train(source.training)

    def refresh(self) -> None:
        """Forget the quantized weight."""
        self._forms.clear()

    def forward(self, x: Tensor) -> Tensor:
        forms = self._forms.get(self.weight, self.recipe, self.noise)
        return linear(x, self.weight, self.bias, self.recipe, noise=self.noise, weight_forms=forms)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.format}"


class FormsCache:
    """The quantized forms of one weight, made anew when the weight or the recipe changed."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._key, self._forms = None, None

    def get(self, weight: Tensor, recipe: LinearRecipe, noise: Tensor | None) -> Forms | None:
        """The forms of `weight`; None where the recipe quantizes nothing, and while compiling, where the graph makes them."""
        if not recipe.quantized or torch.compiler.is_compiling():
            return None
        key = (weight._version, weight.data_ptr(), recipe)
        if key != self._key:
            self._key, self._forms = key, quantize_weight(weight, recipe, noise)
        return self._forms

    def __deepcopy__(self, memo) -> "FormsCache":
        return FormsCache()

    def __reduce__(self):
        return FormsCache, ()


def new_noise(device=None) -> Tensor:
    """A (seed, offset) drawn from torch's generator: torch.manual_seed makes a model's noise reproducible."""
    return torch.stack([torch.randint(0, 1 << 62, (), dtype=torch.int64), torch.zeros((), dtype=torch.int64)]).to(
        device
    )
