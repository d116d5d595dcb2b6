"""Warps of the machine: shuffles, votes, matrices in lanes and their products, by the layouts that the PTX ISA draws."""

import numpy as np
import pytest
import torch

from tests.machine.kernels import elementwise, kernel, launch

LANE = np.arange(128, dtype=np.uint32)
NOISE = np.random.default_rng(5)


@pytest.mark.parametrize("width", (32, 16, 8, 2, 1))
@pytest.mark.parametrize("mode", ("up", "down", "bfly", "idx"))
def test_shuffles(mode, width):
    """As CUDA words them: segments of `width` lanes, and a lane that would read beyond its segment reads itself."""
    values = NOISE.integers(0, 1 << 32, 128, np.uint32)
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    for amount in (0, 1, 3, 16, 31, 33):
        text = f"shfl.sync.{mode}.b32 %r9|%p1, a, {amount}, {clamp}, 0xffffffff; selp.b32 %r8, 1, 0, %p1;"
        both = elementwise(f"{text} mov.b64 d, {{%r9, %r8}};", np.uint64, values)
        got, inside = both & 0xFFFFFFFF, both >> 32
        for lane in range(128):
            n = amount & 31
            start = lane // width * width
            at = {
                "up": lane - n,
                "down": lane + n,
                "bfly": lane // 32 * 32 + (lane % 32 ^ n),
                "idx": start + n % width,
            }[mode]
            # the exclusive or may lead to an earlier segment, which the clamp does not forbid
            held = at >= start if mode == "up" else at < start + width
            assert (got[lane], inside[lane]) == (values[at if held else lane], held), (lane, amount)


def test_shuffle_within_members():
    """Halves of a warp that shuffle for themselves, by different instructions."""
    out = np.zeros(32, np.uint32)
    body = """
        setp.lt.u32 %p1, %r0, 16;
        @%p1 bra LOW;
        shfl.sync.idx.b32 %r3, %r0, 20, 31, 0xffff0000;
        bra.uni DONE;
        LOW: shfl.sync.down.b32 %r3, %r0, 1, 31, 0x0000ffff;
        @%p1 bra DONE;
        DONE: mad.wide.u32 %rd1, %r0, 4, %rd0;
        st.global.b32 [%rd1], %r3;"""
    for order in (None, "backward", 1):
        launch(kernel(body), out, order=order)
        assert out[:15].tolist() == list(range(1, 16)) and (out[16:] == 20).all()
        assert out[15] != 16  # of a lane that is no member: undefined, and here a pattern that nobody has


def test_votes():
    ballot = "setp.ne.u32 %p1, a, 0; vote.sync.ballot.b32 d, %p1, b;"
    a = NOISE.integers(0, 2, 128).astype(np.uint32)
    whole = np.full(128, 0xFFFFFFFF, np.uint32)
    halves = np.where(LANE % 32 < 16, 0xFFFF, 0xFFFF0000).astype(np.uint32)
    for members in (whole, halves):
        bits = [sum(int(a[lane // 32 * 32 + n]) << n for n in range(32)) & int(members[lane]) for lane in range(128)]
        assert elementwise(ballot, np.uint32, a, members).tolist() == bits
        for name, held in (
            ("any", [b != 0 for b in bits]),
            ("all", [b == m for b, m in zip(bits, members, strict=True)]),
        ):
            text = f"setp.ne.u32 %p1, a, 0; vote.sync.{name}.pred %p2, %p1, b; selp.b32 d, 1, 0, %p2;"
            assert elementwise(text, np.uint32, a, members).tolist() == held
        text = "setp.ne.u32 %p1, a, 0; vote.sync.all.pred %p2, !%p1, b; selp.b32 d, 1, 0, %p2;"
        last = (LANE // 16 == 7).astype(np.uint32)
        none = np.where(members == 0xFFFFFFFF, LANE < 96, LANE // 16 < 7)
        assert elementwise(text, np.uint32, last, members).tolist() == none.tolist()
        elected = elementwise("elect.sync d|%p1, b; @!%p1 mov.b32 d, 99;", np.uint32, a, members)
        first = np.where(members == 0xFFFFFFFF, 0, np.where(LANE % 32 < 16, 0, 16))
        assert elected.tolist() == np.where(LANE % 32 == first, first, 99).tolist()


def test_activemask():
    text = "mov.b32 d, 0; and.b32 %r9, a, 1; setp.eq.u32 %p1, %r9, 0; @%p1 bra EVEN; activemask.b32 d; EVEN:"
    assert elementwise(text, np.uint32, LANE).tolist() == [0xAAAAAAAA * (n & 1) for n in range(128)]


def test_reductions():
    a = NOISE.integers(0, 1 << 32, 128, np.uint32).reshape(4, 32)
    for text, numbers, join in (
        ("add.u32", a, lambda x: sum(map(int, x))), ("min.s32", a.view(np.int32), min), ("max.u32", a, max),
        ("and.b32", a | 0xFF00, lambda x: np.bitwise_and.reduce(x)), ("xor.b32", a, lambda x: np.bitwise_xor.reduce(x)),
    ):  # fmt: skip
        given = np.ascontiguousarray(numbers).view(np.uint32).ravel()
        got = elementwise(f"redux.sync.{text} d, a, 0xffffffff;", np.uint32, given)
        assert got.tolist() == [int(join(row)) & 0xFFFFFFFF for row in numbers for _ in range(32)]


# Matrices of 8 x 8 halves


@pytest.mark.parametrize("turned", (False, True))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix_and_stmatrix(count, turned):
    """Matrix k, row r from the address of lane 8 k + r, in an order of the rows that is none; back to other places."""
    rows = NOISE.permutation(32)
    content = NOISE.integers(0, 1 << 16, (32, 8)).astype(np.uint16)
    words, back, order = np.zeros((32, count), np.uint32), np.zeros((32, 8), np.uint16), rows.astype(np.uint32)
    names = ", ".join(f"%r{20 + k}" for k in range(count))
    trans = ".trans" * turned
    store = "".join(f"st.global.b32 [%rd5+{4 * k}], %r{20 + k};\n" for k in range(count))
    body = f"""
        mov.u32 %r5, s;
        shl.b32 %r6, %r0, 4;
        add.u32 %r7, %r5, %r6;
        mad.wide.u32 %rd5, %r0, 16, %rd0;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd5];
        st.shared.v4.b32 [%r7], {{%r10, %r11, %r12, %r13}};
        mad.wide.u32 %rd5, %r0, 4, %rd2;
        ld.global.u32 %r8, [%rd5];
        bar.warp.sync 0xffffffff;
        shl.b32 %r8, %r8, 4;
        add.u32 %r8, %r5, %r8;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r8];
        mad.wide.u32 %rd5, %r0, {4 * count}, %rd1;
        {store}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r7+512], {{{names}}};
        bar.warp.sync 0xffffffff;
        ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r7+512];
        mad.wide.u32 %rd5, %r0, 16, %rd3;
        st.global.v4.b32 [%rd5], {{%r10, %r11, %r12, %r13}};"""
    launch(kernel(body, 4, shared=1024), content, words, order, back)
    for k in range(count):
        matrix = content[rows[8 * k : 8 * k + 8]]
        assert (back[8 * k : 8 * k + 8] == matrix).all()
        matrix = matrix.T if turned else matrix
        for lane in range(32):
            low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert words[lane, k] == int(low) | int(high) << 16


def a_place(per, g, t, i):
    """Element i of A in lane 4g + t: rows g and g + 8 by turns, columns of the upper half from the third register on."""
    return g + 8 * (i // per % 2), per * t + i % per + 4 * per * (i // per // 2)


MMA = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, torch.bfloat16), "m16n8k8.row.col.f32.bf16.bf16.f32": (8, torch.bfloat16),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, torch.float16), "m16n8k8.row.col.f32.tf32.tf32.f32": (8, torch.float32),
    "m16n8k4.row.col.f32.tf32.tf32.f32": (4, torch.float32), "m16n8k32.row.col.f32.e4m3.e5m2.f32": (32, torch.float8_e4m3fn),
}  # fmt: skip

# Of m16n8k16 with halves and of m16n8k32 with bytes, element by element: (row - g, column - per * t)
A_HALVES = [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)]
A_BYTES = [(r, c + far) for far in (0, 16) for r in (0, 8) for c in range(4)]


def test_places_of_a():
    for per, table in ((2, A_HALVES), (4, A_BYTES)):
        for i, (row, column) in enumerate(table):
            for g, t in ((0, 0), (3, 1), (7, 3)):
                assert a_place(per, g, t, i) == (g + row, per * t + column)


def small_numbers(shape, dtype):
    return torch.from_numpy(NOISE.integers(-4, 5, shape).astype(np.float32)).to(dtype)


def packed(values):
    """[lanes, elements] as words, the first element lowest."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(32, -1).view(np.uint32)


def bits_of(x):
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.uint8}[x.element_size()]).numpy()


@pytest.mark.parametrize("name", MMA)
def test_mma(name):
    k, dtype = MMA[name]
    per = 4 // torch.empty((), dtype=dtype).element_size()
    other = torch.float8_e5m2 if per == 4 else dtype
    a, b, c = small_numbers((16, k), dtype), small_numbers((k, 8), other), small_numbers((16, 8), torch.float32)
    lanes = [(lane // 4, lane % 4) for lane in range(32)]
    of_a, of_b = 16 * k // 32, 8 * k // 32
    left = packed([[bits_of(a)[a_place(per, g, t, i)] for i in range(of_a)] for g, t in lanes])
    b_rows = lambda t, i: per * t + i % per + 4 * per * (i // per)  # noqa: E731
    right = packed([[bits_of(b)[b_rows(t, i), g] for i in range(of_b)] for g, t in lanes])
    sums = np.array([[c[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)] for g, t in lanes], np.float32)
    got = products(name, left, right, sums)
    d = a.double() @ b.double() + c.double()
    want = np.array([[d[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)] for g, t in lanes], np.float32)
    assert (got == want).all()


def products(name, left, right, sums, scales=(), arch="90a", selectors=()):
    """One mma.sync of registers by lane."""
    out = np.zeros((32, 4), np.float32)
    groups, loads, n = [], "", 20
    for array, pointer in zip((left, right, sums, *scales), (1, 2, 3, 4, 5), strict=False):
        count = array.reshape(32, -1).shape[1]
        loads += f"mad.wide.u32 %rd9, %r0, {4 * count}, %rd{pointer};\n"
        loads += "".join(f"ld.global.b32 %r{n + i}, [%rd9+{4 * i}];\n" for i in range(count))
        groups.append("{" + ", ".join(f"%r{n + i}" for i in range(count)) + "}" if pointer < 4 else f"%r{n}")
        n += count
    more = "".join(f", {scale}, {select}" for scale, select in zip(groups[3:], selectors, strict=True))
    body = f"""{loads}
        mma.sync.aligned.{name} {{%r10, %r11, %r12, %r13}}, {groups[0]}, {groups[1]}, {groups[2]}{more};
        mad.wide.u32 %rd9, %r0, 16, %rd0;
        st.global.v4.b32 [%rd9], {{%r10, %r11, %r12, %r13}};"""
    launch(kernel(body, 4 + len(scales), arch=arch), out, left, right, sums, *scales)
    return out


@pytest.mark.parametrize("pair", (0, 1))
def test_mma_of_fp4_with_scales(pair):
    """NVFP4, 16 elements a scale: those of rows g and g + 8 in lanes 2 pair and 2 pair + 1 of the quad, of column g in one."""
    table = np.float64([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    a, b = NOISE.integers(0, 16, (16, 64)), NOISE.integers(0, 16, (64, 8))
    a_scale, b_scale = NOISE.integers(0x30, 0x50, (16, 4)), NOISE.integers(0x30, 0x50, (4, 8))
    value = lambda codes: torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn).double().numpy()  # noqa: E731
    scaled_a = table[a] * np.repeat(value(a_scale), 16, 1)
    scaled_b = table[b] * np.repeat(value(b_scale), 16, 0)
    lanes = [(lane // 4, lane % 4) for lane in range(32)]

    def nibbles(rows):
        rows = np.array(rows)
        return packed((rows[:, 0::2] | rows[:, 1::2] << 4).astype(np.uint8))

    left = nibbles([[a[a_place(8, g, t, i)] for i in range(32)] for g, t in lanes])
    right = nibbles([[b[8 * t + i % 8 + 32 * (i // 8), g] for i in range(16)] for g, t in lanes])
    sums = np.zeros((32, 4), np.float32)
    junk = lambda: NOISE.integers(0, 256, (32, 4)).astype(np.uint8)  # noqa: E731  in lanes that give no scale
    of_a, of_b = junk(), junk()
    for g in range(8):
        of_a[4 * g + 2 * pair], of_a[4 * g + 2 * pair + 1] = a_scale[g], a_scale[g + 8]
        of_b[4 * g + 2 * pair + 1] = b_scale[:, g]
    name = "m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"
    selectors = (f"{{0, {pair}}}", f"{{0, {2 * pair + 1}}}")
    got = products(name, left, right, sums, (packed(of_a), packed(of_b)), "120a", selectors)
    d = (scaled_a @ scaled_b).astype(np.float32)
    assert (got == [[d[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)] for g, t in lanes]).all()
