"""The machine's wgmma: where operands lie by the layouts that the ISA writes out, and that what is undefined does not pass."""

import re

import numpy as np
import pytest

from tests.machine.kernels import kernel, launch
from tests.machine.memory import Fault
from tests.machine.wgmma import addresses

N = 16  # columns of the products here, K 16 in bf16


def modes(nested):
    """(extent, stride) of the modes of one side of a CuTe layout, the fastest first."""
    return list(zip(*nested, strict=True))


def place(number, nested):
    at = 0
    for extent, stride in modes(nested):
        at, number = at + number % extent * stride, number // extent
    assert number == 0
    return at


# What "Canonical Layouts" gives as examples: a descriptor's offsets in elements, its mode, and the exact layout of 16 rows.
EXAMPLES = {
    "K-major, none, tf32": (4, 0, 0, 64, 32, ((8, 2), (4, 32)), ((4, 4), (1, 64)), 0),
    "K-major, 32 bytes, tf32": (4, 0, 3, 1, 64, ((8, 2), (8, 64)), ((4, 2), (1, 4)), 1),
    "MN-major, none, bf16": (2, 1, 0, 128, 64, ((8, 1, 2), (1, 8, 64)), ((8, 2), (8, 128)), 0),
    "MN-major, 32 bytes, bf16": (2, 1, 3, 128, 256, ((8, 2, 1), (1, 8, 128)), ((8, 2), (16, 256)), 1),
    "MN-major, 64 bytes, bf16": (2, 1, 2, 256, 512, ((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512)), 2),
    "MN-major, 128 bytes, bf16": (2, 1, 1, 512, 1024, ((8, 8, 2), (1, 8, 512)), ((8, 2), (64, 1024)), 3),
    "K-major, 128 bytes, bf16": (2, 0, 1, 1, 512, ((8, 8), (64, 512)), ((8, 2), (1, 8)), 3),
    "K-major, 64 bytes, e4m3": (1, 0, 2, 1, 512, ((8, 8), (64, 512)), ((16, 2), (1, 16)), 2),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_canonical_layouts(name):
    size, turned, mode, leading, stride, rows, columns, bits = EXAMPLES[name]
    start = 2048
    leading, stride = leading * size >> 4, stride * size >> 4
    descriptor = np.array([start >> 4 | max(leading, 1) << 16 | stride << 32 | mode << 62], np.uint64)
    count, k = np.prod(rows[0]), 32 // size
    found = addresses(descriptor, count, k, size, turned)[0]
    for row in range(count):
        for column in range(k):
            at = start + size * (place(row, rows) + place(column, columns))
            at ^= (at >> 7 & (1 << bits) - 1) << 4  # Swizzle<bits, 4, 3>: of units of 16 bytes those from 128 bytes on
            assert found[row, column] == at


def test_descriptors_that_mean_nothing():
    for bad in (1 << 14, 1 << 30, 1 << 46, 1 << 52, 1 << 49):  # bits between fields, and a base offset
        with pytest.raises(Fault):
            addresses(np.array([bad], np.uint64), 16, 16, 2, 0)


def numbered(prefix, count):
    return "{" + ",".join(f"{prefix}{i}" for i in range(count)) + "}"


SUMS = numbered("%f", N // 2)
MULTIPLY = f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {SUMS}, %rd10, %rd11, %p1, 1, 1, 0, 0;"
BY_REGISTERS = (
    f"wgmma.mma_async.sync.aligned.m64n{N}k16.f32.bf16.bf16 {SUMS}, {numbered('%a', 4)}, %rd11, %p1, 1, 1, 0;"
)
DECLARED = ".reg .f32 %f<16>; .reg .b32 %a<4>;\n"
ROWS = 64 + N
FENCE = "wgmma.fence.sync.aligned;"


def product(multiply=MULTIPLY, fenced="fence.proxy.async.shared::cta;", begin=FENCE,
            after="", wait="wgmma.wait_group.sync.aligned 0;", end="", adds=0, first=0.0):  # fmt: skip
    """Loads A and B, rows of 16 values, without a swizzle; multiplies; stores the thread's sums. The results."""
    # a thread below ROWS copies row t, 32 bytes, to the two columns of 128-byte tiles of 8 rows: leading 128, stride 256
    copy = f"""
    setp.ge.u32 %p0, %r0, {ROWS};
    @%p0 bra COPIED;
    mul.wide.u32 %rd4, %r0, 32;
    add.u64 %rd4, %rd4, %rd1;
    shr.u32 %r3, %r0, 3;
    shl.b32 %r3, %r3, 8;
    and.b32 %r4, %r0, 7;
    mad.lo.u32 %r3, %r4, 16, %r3;
    mov.u32 %r5, s;
    add.u32 %r3, %r3, %r5;
    ld.global.v4.u32 {{%r6,%r7,%r8,%r9}}, [%rd4];
    st.shared.v4.u32 [%r3], {{%r6,%r7,%r8,%r9}};
    ld.global.v4.u32 {{%r6,%r7,%r8,%r9}}, [%rd4+16];
    st.shared.v4.u32 [%r3+128], {{%r6,%r7,%r8,%r9}};
COPIED:
    {fenced}
    bar.sync 0;
    mov.u32 %r5, s;
    shr.u32 %r5, %r5, 4;
    cvt.u64.u32 %rd10, %r5;
    or.b64 %rd10, %rd10, {128 >> 4 << 16 | 256 >> 4 << 32};
    add.u64 %rd11, %rd10, {64 * 32 >> 4};
    mov.u32 %r10, {adds};
    setp.ne.u32 %p1, %r10, 0;
    shr.u32 %r11, %r0, 5;
    and.b32 %r12, %r0, 31;
    shr.u32 %r13, %r12, 2;
    mad.lo.u32 %r13, %r11, 16, %r13;
    and.b32 %r12, %r12, 3;
    mul.lo.u32 %r13, %r13, 32;
    mad.lo.u32 %r13, %r12, 4, %r13;
    cvt.u64.u32 %rd5, %r13;
    add.u64 %rd5, %rd5, %rd1;
    ld.global.b32 %a0, [%rd5];
    ld.global.b32 %a1, [%rd5+256];
    ld.global.b32 %a2, [%rd5+16];
    ld.global.b32 %a3, [%rd5+272];
    """
    begun = "".join(f"mov.f32 %f{i}, 0f{np.float32(first).view(np.uint32):08X};\n" for i in range(N // 2))
    stores = "".join(f"st.global.f32 [%rd6+{4 * i}], %f{i};\n" for i in range(N // 2))
    issue = f"{begun}{begin}\n{multiply}\nwgmma.commit_group.sync.aligned;\n"
    body = f"{copy}{issue}{after}\n{wait}\n{end}\nmul.wide.u32 %rd6, %r0, {2 * N};\nadd.u64 %rd6, %rd6, %rd0;\n{stores}"
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 9, (ROWS, 16)).astype(np.float32)
    words = (values.view(np.uint32) >> 16).astype(np.uint16)
    out = np.zeros((128, N // 2), np.float32)
    launch(kernel(body, 2, ROWS * 32, declarations=DECLARED), out, words, threads=128)
    lane, register = np.arange(128)[:, None], np.arange(N // 2)[None, :]
    rows = lane // 32 * 16 + lane % 32 // 4 + 8 * (register >> 1 & 1)
    columns = register // 4 * 8 + 2 * (lane % 4) + register % 2
    return out, (values[:64] @ values[64:].T)[rows, columns]


@pytest.mark.parametrize("multiply", [MULTIPLY, BY_REGISTERS], ids=["shared", "registers"])
def test_products(multiply):
    got, wanted = product(multiply)
    assert (got == wanted).all()
    got, wanted = product(multiply + multiply, adds=1, first=5.0)
    assert (got == 5 + 2 * wanted).all()
    got, wanted = product(multiply, adds=0, first=np.nan)
    assert (got == wanted).all()
    got, wanted = product(multiply.replace(", 1, 1,", ", -1, 1,"), adds=1, first=1.0)
    assert (got == 1 - wanted).all()


def test_sums_read_before_the_wait_are_nan():
    got, wanted = product(after="mov.f32 %f9, %f0;", end="mov.f32 %f0, %f9;")
    assert np.isnan(got[:, 0]).all() and (got[:, 1:] == wanted[:, 1:]).all()


CHANGED_A = "mov.b32 %a2, 1;"
CHANGED_B = "setp.eq.u32 %p2, %r0, 3;\nst.shared.u16 [s+{at}], %h0;".replace("st.", "@%p2 st.")


@pytest.mark.parametrize(
    "told, options",
    [
        ("B has changed", dict(after=CHANGED_B.format(at=64 * 32 + 130))),
        ("A has changed", dict(after=CHANGED_B.format(at=6 * 256))),
        ("A has changed", dict(multiply=BY_REGISTERS, after=CHANGED_A)),
        ("sums have changed", dict(after="mov.f32 %f3, 0f00000000;")),
        ("nobody has waited", dict(wait="wgmma.wait_group.sync.aligned 1;")),
        ("nobody has waited", dict(wait="")),
        ("no wgmma.fence before", dict(begin="")),
        ("%a1 has been written since", dict(multiply=BY_REGISTERS, begin=FENCE + "\nadd.u32 %a1, %a1, 1;")),
        ("%f7 has been written since", dict(begin=FENCE + "\nmov.f32 %f7, 0f3F800000;")),
        ("no fence.proxy.async since", dict(fenced="")),
        ("differ within a warpgroup", dict(begin=f"{FENCE}\ncvt.u64.u32 %rd5, %r11;\nor.b64 %rd11, %rd11, %rd5;")),
        ("differ within a warpgroup", dict(begin="setp.gt.u32 %p1, %r0, 90;\n" + FENCE)),
        ("deadlock", dict(multiply="setp.gt.u32 %p3, %r0, 31;\n@%p3 " + MULTIPLY)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_faults(told, options):
    with pytest.raises(Fault, match=re.escape(told)):
        product(**options)
    assert product()[0].any()  # and not without


def test_what_changes_after_the_wait_does_not_matter():
    got, wanted = product(end=CHANGED_B.format(at=64 * 32) + CHANGED_A)
    assert (got == wanted).all()


def test_groups_that_stay_on_their_way():
    """Of two groups the first is there once all but one are: its sums are, the other's are spoilt."""
    other = MULTIPLY.replace(SUMS, "{" + ",".join(f"%f{i}" for i in range(8, 16)) + "}")
    then = f"{FENCE}\n{other}\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;"
    last = "wgmma.wait_group.sync.aligned 0;"
    keep = "mov.f32 %f1, {};\n"
    got, wanted = product(after=then + keep.format("%f0"), wait=last)
    assert (got[:, 1] == wanted[:, 0]).all()
    got, _ = product(after=then + keep.format("%f8"), wait=last)
    assert np.isnan(got[:, 1]).all()


def test_warps_of_a_group_that_come_one_by_one():
    """Warps of a group that have parted ways issue a product together."""
    apart = "setp.lt.u32 %p4, %r0, 64;\n@%p4 bra HERE;\nadd.u32 %r20, %r0, 1;\nHERE:\n"
    got, wanted = product(begin=apart + FENCE)
    assert (got == wanted).all()


def test_a_copy_s_target_is_nobody_s_until_the_wait():
    body = """
    mov.u32 %r3, s;
    mad.lo.u32 %r3, %r0, 4, %r3;
    st.shared.u32 [%r3], %r0;
    mad.wide.u32 %rd3, %r0, 4, %rd1;
    cp.async.ca.shared.global [%r3], [%rd3], 4;
    ld.shared.u32 %r4, [%r3];
    cp.async.wait_all;
    ld.shared.u32 %r5, [%r3];
    mad.wide.u32 %rd4, %r0, 8, %rd0;
    st.global.v2.u32 [%rd4], {%r4,%r5};
    """
    out, given = np.zeros((32, 2), np.uint32), np.arange(100, 132, dtype=np.uint32)
    launch(kernel(body, 2, 128), out, given)
    assert (out[:, 0] == 0xFFFFFFFF).all() and (out[:, 1] == given).all()
