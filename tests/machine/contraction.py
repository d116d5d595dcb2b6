"""What ptxas may make of a product and a sum of which neither says how it rounds: one fma (PTX ISA, "mul" and "add": "mul/add
sequences with no rounding modifiers may be optimized to use fused-multiply-add"). Not every ptxas does it everywhere; here it
is done wherever it may be, so that what has to be the same bits either way can be seen to be.
"""

import copy

import numpy as np

from tests.machine.arithmetic import nary, with_modifiers
from tests.machine.machine import instruction
from tests.machine.parse import Instruction, Kernel, Register, Vector
from tests.machine.rounding import fused, to_f32

PRODUCTS = ("mul.f32", "mul.ftz.f32")


def contracted(kernel: Kernel) -> Kernel:
    """The kernel with an fma for each sum of a product that stands before it in the same run of instructions."""
    products: dict[str, Instruction] = {}  # register -> the product that is in it, while its factors are as they were
    joins, made = set(kernel.labels.values()), copy.copy(kernel)
    made.instructions = []
    for at, i in enumerate(kernel.instructions):
        if at in joins:
            products = {}
        made.instructions.append(fused_sum(i, products))
        written = {register.name for register in registers(i.operands[:1])}
        products = {
            name: product
            for name, product in products.items()
            if name not in written and not written & {factor.name for factor in registers(product.operands[1:])}
        }
        factors = {factor.name for factor in registers(i.operands[1:])}
        if i.name in PRODUCTS and i.guard is None and not written & factors:
            products[i.operands[0].name] = i
    return made


def registers(operands):
    for operand in operands:
        if isinstance(operand, Register):
            yield operand
        elif isinstance(operand, Vector):
            yield from registers(operand.parts)


def fused_sum(i: Instruction, products: dict[str, Instruction]) -> Instruction:
    name, *modifiers = i.parts
    if name not in ("add", "sub") or modifiers not in (["f32"], ["ftz", "f32"]):
        return i
    for place, operand in enumerate(i.operands[1:]):
        product = products.get(operand.name) if isinstance(operand, Register) else None
        if product is not None and product.parts[1:] == modifiers:
            how = "plus" if name == "add" else ("minus", "from")[place]
            operands = [i.operands[0], *product.operands[1:], i.operands[2 - place]]
            return Instruction(".".join(["contracted", how, *modifiers]), operands, i.guard, i.line)
    return i


@instruction("contracted")
def contracted_sum(machine, i):
    """a b + c, a b - c ("minus") or c - a b ("from"), rounded once."""
    minus_product, minus_sum = "from" in i.parts, "minus" in i.parts

    def compute(a, b, c):
        return to_f32(fused(-a if minus_product else a, b, -np.asarray(c) if minus_sum else c))

    return nary(machine, i, with_modifiers(i, compute), ["f32"] * 3)
