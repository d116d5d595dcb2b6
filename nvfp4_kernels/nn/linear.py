"""Linear: torch.nn.Linear whose three GEMMs follow a recipe."""

import torch
from torch import Tensor, nn

from nvfp4_kernels.autograd.linear import linear, quantize_weight
from nvfp4_kernels.autograd.plain import dense
from nvfp4_kernels.nn.forms import Deriving, FormsCache
from nvfp4_kernels.ops.matmul.op import few_rows
from nvfp4_kernels.recipe import LinearRecipe, Recipe, get_recipe


class Linear(Deriving, nn.Linear):
    """y = x W^T + b by `recipe`, x [..., in] to y [..., out]; W stays an fp32 master weight (or what `dtype` says).

    in_features, out_features, device, dtype: as of torch.nn.Linear. bias: unlike there, none by default.
    recipe: as nk.linear's; None for high precision. `.recipe` is a LinearRecipe; another may be assigned at any time.
    noise: buffer, int64 [2] (seed, offset) of the stochastic rounding; part of the state_dict, advanced by each backward.

    The quantized weight is kept until the weight changes, so that all micro-batches of a step share it. Steps of any
    torch.optim.Optimizer and changes in place are seen; whoever writes through `weight.data` by hand calls `refresh()`.
    Raises as nk.linear does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        recipe: "Recipe | LinearRecipe | str | None" = None,
        device=None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self._follow(recipe)

    def _follow(self, recipe: "Recipe | LinearRecipe | str | None") -> None:
        self.recipe = recipe if isinstance(recipe, LinearRecipe) else get_recipe(recipe).default
        self.register_buffer("noise", new_noise(self.weight.device))
        self._forms = FormsCache(quantize_weight)

    @classmethod
    def from_linear(cls, source: nn.Linear, recipe: "Recipe | LinearRecipe | str | None" = None) -> "Linear":
        """`source` itself, become a Linear: its parameters, hooks and places in the model stay as they are."""
        source.__class__ = cls
        source._follow(recipe)
        return source

    def to_linear(self) -> nn.Linear:
        """This very module, a torch.nn.Linear again: no recipe, no noise."""
        del self.recipe, self.noise, self._forms
        self.__class__ = nn.Linear
        return self

    def refresh(self) -> None:
        """Forget the quantized weight."""
        self._forms.clear()

    def forward(self, x: Tensor) -> Tensor:
        if not self.recipe.quantized and x.dtype == self.weight.dtype:
            y = few_rows(x, self.weight, self.bias)  # a decoded token
            if y is not None:
                return y
            bias = None if self.bias is None else self.bias.to(x.dtype)  # of a bf16 checkpoint it is fp32
            return dense(x, self.weight, bias)
        forms = self._forms.get(self.weight, self.recipe, self.noise)
        return linear(x, self.weight, self.bias, self.recipe, noise=self.noise, weight_forms=forms)

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if prefix + "weight" in state_dict and prefix + "noise" not in state_dict:  # a checkpoint of torch.nn.Linear
            device = state_dict[prefix + "weight"].device
            state_dict[prefix + "noise"] = new_noise(device) if self.noise.is_meta else self.noise
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, recipe={self.recipe.format}"


def new_noise(device=None) -> Tensor:
    """A (seed, offset) drawn from torch's generator: torch.manual_seed makes a model's noise reproducible."""
    noise = torch.zeros(2, dtype=torch.int64)  # on the meta device too: stacking there imports torch's compiler
    noise[:1].random_(0, 1 << 62)
    return noise.to(device)
