"""Which random bits cvt.rs.satfinite.e2m1x4.f32 adds to which value, and with what weight: asked of the chip itself.

The PTX ISA (9, cvt) leaves the order open, and the public probes of it cover one chip. A value whose fraction of a step is
1 - 2^(w - 8) rounds up exactly when the eight bits it reads make 2^w or more, so that one set bit at a time tells its weight.
"""

import torch

from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import jit, launch, missing, tl

VALUES, BITS, WEIGHTS = 4, 32, 8


@jit
def rounded_kernel(x_ptr, bits_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """x: fp32 [4, count], bits: int32 [count], out: int16 [count]: the four codes that the instruction gives."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    a = tl.load(x_ptr + i, mask=inside, other=0.0)
    b = tl.load(x_ptr + count + i, mask=inside, other=0.0)
    c = tl.load(x_ptr + 2 * count + i, mask=inside, other=0.0)
    d = tl.load(x_ptr + 3 * count + i, mask=inside, other=0.0)
    bits = tl.load(bits_ptr + i, mask=inside, other=0)
    codes = tl.inline_asm_elementwise(
        "cvt.rs.satfinite.e2m1x4.f32 $0, {$1, $2, $3, $4}, $5;",
        "=h,f,f,f,f,r",
        [a, b, c, d, bits],
        dtype=tl.int16,
        is_pure=True,
        pack=1,
    )
    tl.store(out_ptr + i, codes, mask=inside)


def questions(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """x [4, count] and bits [count] for every (value, bit, weight), in this order."""
    value, bit, weight = torch.meshgrid(torch.arange(VALUES), torch.arange(BITS), torch.arange(WEIGHTS), indexing="ij")
    share = 1 - 2.0 ** (weight.flatten() - WEIGHTS)  # of the step from 0.5 to 1: the code goes from 1 to 2
    x = torch.where(torch.arange(VALUES)[:, None] == value.flatten(), 0.5 + 0.5 * share, 0.0)
    return x.to(device), (1 << bit.flatten()).to(torch.int32).to(device)


def answers(codes: torch.Tensor) -> list[dict]:
    """For each operand of the instruction: the nibble that its code lands in, and {bit of the random word: its weight}.

    codes: int16 [count], for `questions`. A weight of w stands for 2^w of 256ths; bits without influence are left out.
    """
    codes = codes.cpu().long().view(VALUES, BITS, WEIGHTS)
    found = []
    for of_value in codes:
        nibble = next((n for n in range(4) if ((of_value >> 4 * n) & 15).any()), None)
        if nibble is None:
            found.append({"nibble": None, "weights": {}})
            continue
        went_up = ((of_value >> 4 * nibble) & 15) == 2
        reached = went_up.sum(1)  # weights 0 .. w are reached by a bit of weight w
        found.append({"nibble": nibble, "weights": {b: int(n) - 1 for b, n in enumerate(reached.tolist()) if n}})
    return found


def probe(device: torch.device | str) -> list[dict] | str:
    """`answers` of this chip, or why it cannot be asked."""
    device = torch.device(device)
    if not _device.rounds_stochastically(device):
        return "this chip has no stochastic conversion to FP4: the software rule is used"
    if missing:
        return missing
    x, bits = questions(device)
    out = torch.empty(bits.numel(), dtype=torch.int16, device=device)
    launch(rounded_kernel, (-(-bits.numel() // 128),), x, bits, out, bits.numel(), BLOCK=128)
    return answers(out)
