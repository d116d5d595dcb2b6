"""The quantized forms of a weight, kept from one optimizer step to the next so that all micro-batches of a step share them."""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nvfp4_kernels.ops._library import transformed
from nvfp4_kernels.recipe import LinearRecipe

# Changes of weights in this process whose own version does not tell: the steps of torch 2.13's fused optimizers leave it as it
# was, and so does fully_shard, which gathers a weight into the place of the last time.
_changes = 0


def _count_change(*_) -> None:
    global _changes
    _changes += 1


register_optimizer_step_post_hook(_count_change)


def _state(*tensors: Tensor | None) -> tuple:
    """What changes when one of them does; a new one each time where nothing tells, as of tensors made in inference mode."""
    present = [t for t in tensors if t is not None]
    if any(t.is_inference() for t in present):
        return (object(),)
    return (_changes, *((t.data_ptr(), t.shape, t.dtype, t._version) for t in present))


class Deriving(nn.Module):
    """A module that keeps what it makes of its parameters; its `refresh()` forgets it, also when one of them is set anew.

    fully_shard sets them whenever it has gathered or freed them.
    """

    def __setattr__(self, name: str, value) -> None:
        if name in self.__dict__.get("_parameters", ()):
            _count_change()
            self.refresh()
        super().__setattr__(name, value)


class FormsCache:
    """What `make(weight, recipe, noise)` gave, made anew after an optimizer's step, a change in place or another recipe.

    Whoever writes through `weight.data` outside of a torch.optim.Optimizer calls `clear()`: nothing in torch tells of it.
    Copies and pickles of a cache are empty.
    """

    def __init__(self, make: Callable):
        self._make = make
        self.clear()

    def clear(self) -> None:
        self._key, self._forms, self._held = None, None, None

    def get(self, weight: Tensor, recipe: LinearRecipe, noise: Tensor | None):
        """The forms; None where the recipe quantizes nothing, while compiling, where the graph makes them, and where nk.linear
        refuses."""
        if not recipe.quantized or torch.compiler.is_compiling() or transformed():
            return None
        key = (_state(weight), recipe)
        if key != self._key or weight is not self._held:
            with torch.inference_mode(False):  # a training step may be the next to read them
                forms = self._make(weight, recipe, noise)
            # held, so that no other weight gets its address; the key last, for other threads
            self._forms, self._held, self._key = forms, weight, key
        return self._forms

    def __deepcopy__(self, memo) -> "FormsCache":
        return FormsCache(self._make)

    def __reduce__(self):
        return FormsCache, (self._make,)


def _nothing() -> None:
    return None


class Derived:
    """What `make(*tensors)` gave, made anew as FormsCache does; of tensors that nobody differentiates in.

    It does not hold them.
    """

    def __init__(self, make: Callable):
        self._make = make
        self.clear()

    def clear(self) -> None:
        self._key, self._made, self._known = None, None, ()

    def get(self, *tensors: Tensor | None):
        """What was made; made anew each time while compiling."""
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return self._make(*tensors)
        key = _state(*tensors)
        if key != self._key or any(known() is not t for known, t in zip(self._known, tensors, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                made = self._make(*tensors)
            known = [_nothing if t is None else weakref.ref(t) for t in tensors]
            self._made, self._known, self._key = made, known, key  # the key last, for other threads
        return self._made

    def __deepcopy__(self, memo) -> "Derived":
        return Derived(self._make)

    def __reduce__(self):
        return Derived, (self._make,)
