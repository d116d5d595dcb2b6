"""One table of names, both ways: what a checkpoint calls a tensor, and where in our model that tensor lies.

                       published (backbone.*)              transformers 5 (model.*)     ours
    the backbone       backbone.                           model.                       backbone.
    an expert          experts.{e}.up_proj.weight          experts.up_proj, [e]         experts.up_proj, [e]
    its scale          experts.{e}.up_proj.weight_scale    -                            experts.up_proj.weight_scale, [e]

All else has one name everywhere, but for the embeddings: transformers 5 saved them as backbone.embedding until its pull request
48075. compressed-tensors has words of its own for the parts of a quantized matrix, and the scales of a KV cache beside the
projections (mixer.k_scale), not below them (mixer.k_proj.k_scale).
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

BACKBONE = {"published": "backbone.", "modelopt": "backbone.", "transformers": "model."}
OURS = BACKBONE["published"]
_SINGULAR = f"{OURS}embedding."
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.((?:up|down)_proj)\.(\w+)")
_STACK = re.compile(r".+\.experts\.(?:up|down)_proj")
_CACHE = re.compile(r"(.+\.mixer)\.([kv])_scale")
# compressed-tensors' word -> (ours, whether it is the reciprocal: its global scales are divisors)
PACKED = {
    "weight_packed": ("weight", False),
    "weight_global_scale": ("weight_scale_2", True),
    "input_global_scale": ("input_scale", True),
}


class Place(NamedTuple):
    """A tensor of our model: `part` of `module`; of a stack of experts the one with this number, or None for all of them."""

    module: str
    part: str
    expert: int | None = None


def place(name: str) -> tuple[Place, bool]:
    """Where the tensor that a checkpoint calls `name` lies, and whether it holds the reciprocal of what lies there."""
    for prefix in BACKBONE.values():
        if name.startswith(prefix):
            name = OURS + name.removeprefix(prefix)
            break
    if name.startswith(_SINGULAR):
        name = f"{OURS}embeddings.{name.removeprefix(_SINGULAR)}"
    if found := _EXPERT.fullmatch(name):
        module, expert, matrix, part = found.groups()
        module, expert = f"{module}.{matrix}", int(expert)
    elif _STACK.fullmatch(name):
        module, part, expert = name, "weight", None
    elif found := _CACHE.fullmatch(name):
        module, part, expert = f"{found[1]}.{found[2]}_proj", f"{found[2]}_scale", None
    else:
        (module, _, part), expert = name.rpartition("."), None
    part, reciprocal = PACKED.get(part, (part, False))
    return Place(module, part, expert), reciprocal


def parameter_name(module: str, part: str, quantized: bool) -> str:
    """The name in our state_dict; `quantized`: whether the module is one of nn.quantized."""
    return module if _STACK.fullmatch(module) and not quantized else f"{module}.{part}".lstrip(".")


def is_stack(module: str) -> bool:
    """Whether `module` is the stacked matrices of all experts of a layer."""
    return _STACK.fullmatch(module) is not None


def published_module(module: str, layout: str = "published", expert: int | None = None) -> str:
    """What a checkpoint of that layout calls a module of ours, and of a stack of experts the one with this number."""
    if module.startswith(OURS):
        module = BACKBONE[layout] + module.removeprefix(OURS)
    if expert is not None:
        experts, _, matrix = module.rpartition(".")
        module = f"{experts}.{expert}.{matrix}"
    return module


def tensor_name(where: Place, layout: str) -> str:
    """What a checkpoint of that layout calls the tensor at `where`: the inverse of `place`."""
    module = published_module(where.module, layout, where.expert)
    if where.expert is None and is_stack(where.module):
        return module
    return f"{module}.{where.part}".lstrip(".")


class Nearest:
    """Finds the name that a misspelt one was meant to be, among tens of thousands."""

    def __init__(self, names: Iterable[str]):
        self._by_numbers, self._by_words = defaultdict(list), {}
        for name in names:
            self._by_numbers[_numbers(name)].append(name)
            self._by_words.setdefault(re.sub(r"\d+", "0", name), name)

    def __call__(self, name: str) -> str | None:
        """The nearest name with the same numbers; failing that, one whose words are near."""
        if near := difflib.get_close_matches(name, self._by_numbers[_numbers(name)], 1, 0.7):
            return near[0]
        near = difflib.get_close_matches(re.sub(r"\d+", "0", name), self._by_words, 1, 0.7)
        return self._by_words[near[0]] if near else None


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", name))
