"""The machine finds what lacks an order: hazards in shared memory, waits that are missing, whoever goes first."""

import re

import numpy as np
import pytest

from tests.machine.kernels import kernel, launch
from tests.machine.memory import Fault

ORDERS = (None, "backward", 1, 2, 3)
WAYS = pytest.mark.parametrize("order", ORDERS)
NOISE = np.random.default_rng(11)

# Thread, warp and lane in %r0, %r10, %r11; %r5 the address of the thread's own word, %r6 that of the thread's in the next warp
PLACES = """
    mov.u32 %r4, s;
    shl.b32 %r5, %r0, 2;
    add.u32 %r7, %r0, 32;
    and.b32 %r7, %r7, 127;
    shl.b32 %r6, %r7, 2;
    add.u32 %r5, %r5, %r4;
    add.u32 %r6, %r6, %r4;
    shr.u32 %r10, %r0, 5;
    and.b32 %r11, %r0, 31;
    setp.eq.u32 %p1, %r10, 0;
    setp.eq.u32 %p2, %r10, 1;
    setp.eq.u32 %p3, %r11, 0;
"""
SAFE = (
    "st.shared.u32 [%r5], %r0; ld.shared.u32 %r3, [%r5];",
    "st.shared.u32 [%r5], %r0; bar.sync 0; ld.shared.u32 %r3, [%r6];",
    "ld.shared.u32 %r3, [%r6]; bar.sync 0; st.shared.u32 [%r5], %r0; bar.sync 0; ld.shared.u32 %r3, [%r6];",
    "ld.shared.u32 %r3, [%r4]; ld.shared.u32 %r8, [%r5]; ld.shared.u32 %r8, [%r4];",  # all read one place
    "st.shared.u32 [%r4], 7;",  # all write the same there
    "@%p1 st.shared.u32 [%r4], 7; bar.sync 0; @%p2 st.shared.u32 [%r4], 7; @%p1 ld.shared.u32 %r3, [%r4];",
    # neighbours in a word
    "add.u32 %r8, %r4, %r10; st.shared.u8 [%r8], %r10; ld.shared.u8 %r3, [%r8];",
    "shl.b32 %r8, %r10, 1; add.u32 %r8, %r8, %r4; st.shared.u16 [%r8], %h1; ld.shared.u16 %r3, [%r8];",
    "@%p1 st.shared.u64 [%r4], %rd0; @%p2 st.shared.u32 [%r4+8], 1;",
    "atom.shared.add.u32 %r3, [%r4], 1; atom.shared.add.u32 %r3, [%r4], 1;",
    "atom.shared.add.u32 %r3, [%r4], 1; ld.volatile.shared.u32 %r3, [%r4];",
    # a barrier of two warps orders these two
    "@%p1 st.shared.u32 [%r4], 1; setp.lt.u32 %p4, %r10, 2; @%p4 bar.sync 3, 64; @%p2 ld.shared.u32 %r3, [%r4];",
    # and what came before it in a third that both met
    "@%p1 st.shared.u32 [%r4], 1; setp.lt.u32 %p4, %r10, 2; @%p4 bar.sync 3, 64; setp.eq.u32 %p5, %r10, 2;"
    "or.pred %p6, %p5, %p2; @%p6 bar.sync 4, 64; @%p5 ld.shared.u32 %r3, [%r4];",
    # of a warp: lanes that meet
    "@%p3 st.shared.u32 [%r5], 1; bar.warp.sync 0xffffffff; and.b32 %r8, %r5, 0xffffff80; ld.shared.u32 %r3, [%r8];",
    "mov.u64 %rd5, %rd1; cp.async.ca.shared.global [%r5], [%rd5], 4; cp.async.wait_all; bar.sync 0; ld.shared.u32 %r3, [%r6];",
    "shl.b32 %r8, %r11, 4; add.u32 %r8, %r8, %r4; st.shared.u32 [%r5], 1; bar.sync 0;"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r8]; bar.sync 0; st.shared.u32 [%r5], 2;",
)  # fmt: skip
UNSAFE = (
    "st.shared.u32 [%r5], %r0; ld.shared.u32 %r3, [%r6];",
    "ld.shared.u32 %r3, [%r6]; st.shared.u32 [%r5], %r0;",
    "@%p1 st.shared.u32 [%r4], 7; @%p2 st.shared.u32 [%r4], 8;",
    "@%p1 st.shared.u32 [%r4], 7; bar.warp.sync 0xffffffff; @%p2 ld.shared.u32 %r3, [%r4];",
    "@%p1 st.shared.u64 [%r4], %rd0; @%p2 st.shared.u32 [%r4+4], 1;",
    "@%p1 st.shared.u64 [%r4], %rd0; @%p2 ld.shared.u8 %r3, [%r4+5];",
    "st.shared.u32 [%r5], 1; bar.sync 0; ld.shared.u32 %r3, [%r6]; st.shared.u32 [%r5], 2;",
    "ld.shared.u32 %r3, [%r4]; @%p2 st.shared.u32 [%r4], 1;",
    "atom.shared.add.u32 %r3, [%r4], 1; ld.shared.u32 %r3, [%r4];",
    "@%p1 st.shared.u32 [%r4], 1; @%p2 atom.shared.add.u32 %r3, [%r4], 1;",
    # barriers of other pairs, or of no more than those before them
    "@%p1 st.shared.u32 [%r4], 1; setp.gt.u32 %p4, %r10, 1; @%p4 bar.sync 3, 64; @%p2 ld.shared.u32 %r3, [%r4];",
    "setp.lt.u32 %p4, %r10, 2; @%p4 bar.sync 3, 64; @%p1 st.shared.u32 [%r4], 1; @%p2 ld.shared.u32 %r3, [%r4];",
    "@%p1 st.shared.u32 [%r4], 1; setp.lt.u32 %p4, %r10, 2; @%p4 bar.sync 3, 64; setp.eq.u32 %p5, %r10, 2;"
    "@%p5 ld.shared.u32 %r3, [%r4];",
    "mov.u64 %rd5, %rd1; cp.async.ca.shared.global [%r5], [%rd5], 4; cp.async.wait_all; ld.shared.u32 %r3, [%r6];",
    "ld.shared.u32 %r3, [%r6]; mov.u64 %rd5, %rd1; cp.async.ca.shared.global [%r5], [%rd5], 4; bar.sync 0; cp.async.wait_all;",
    "shl.b32 %r8, %r11, 4; add.u32 %r8, %r8, %r4; st.shared.u32 [%r5], 1;"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r8];",
    "shl.b32 %r8, %r11, 4; add.u32 %r8, %r8, %r4;"
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r12, %r13, %r14, %r15}, [%r8]; st.shared.u32 [%r5], 2;",
    # of a warp: lanes that need not go together
    "@%p3 st.shared.u32 [%r5], 1; and.b32 %r8, %r5, 0xffffff80; ld.shared.u32 %r3, [%r8];",
)  # fmt: skip


def run(text, order, **options):
    out, other = np.zeros(128, np.uint32), np.arange(1, 129, dtype=np.uint32)
    launch(kernel(PLACES + text, 2, shared=512), out, other, threads=128, order=order, **options)


@pytest.mark.parametrize("text", SAFE)
def test_no_hazard(text):
    for order in ORDERS:
        run(text, order)


@pytest.mark.parametrize("text", UNSAFE)
def test_hazard(text):
    for order in ORDERS:
        with pytest.raises(Fault, match="hazard: thread|different values"):
            run(text, order)
        if "u64 [%r4]" not in text:
            run(text, order, races=False)


def test_writes_that_change_nothing():
    text = "@%p1 st.shared.u32 [%r4], 7; bar.sync 0; @%p2 st.shared.u32 [%r4], 7;{} @%p1 ld.shared.u32 %r3, [%r4];"
    for order in ORDERS:
        run(text.format(""), order)
        run(text.format("bar.sync 0;"), order, races="strict")
        with pytest.raises(Fault, match="hazard: thread"):
            run(text.format(""), order, races="strict")


def test_loop_of_blocks_that_differ():
    """Blocks whose loops differ in length, so that their barriers do not come at the same time."""
    text = (
        PLACES
        + """
        mov.u32 %r9, 0;
        mov.u32 %r3, 0;
        AGAIN: st.shared.u32 [%r5], %r9;
        bar.sync 0;
        ld.shared.u32 %r8, [%r6];
        add.u32 %r3, %r3, %r8;
        bar.sync 0;
        add.u32 %r9, %r9, 1;
        setp.le.u32 %p4, %r9, %r1;
        @%p4 bra AGAIN;
        mad.wide.u32 %rd9, %r2, 4, %rd0;
        st.global.b32 [%rd9], %r3;"""
    )
    for order in ORDERS:
        out = np.zeros(128 * 5, np.uint32)
        launch(kernel(text, shared=512), out, threads=128, blocks=5, order=order)
        assert out.tolist() == [block * (block + 1) // 2 for block in range(5) for _ in range(128)]
        for last in (False, True):
            at = text.rindex("bar.sync 0;") if last else text.index("bar.sync 0;")
            with pytest.raises(Fault, match="hazard"):
                launch(kernel(text[:at] + text[at + 11 :], shared=512), out, threads=128, blocks=5, order=order)


# Whole kernels, and what becomes of them when one of their waits is missing


def scan():
    """Sums of all that come before and itself, in a block of 128: seven steps, each but the last with two barriers."""
    steps = "".join(
        f"""
        mov.u32 %r9, 0;
        setp.ge.u32 %p4, %r0, {1 << n};
        @%p4 ld.shared.u32 %r9, [%r5+-{4 << n}];
        bar.sync 0;
        add.u32 %r3, %r3, %r9;
        st.shared.u32 [%r5], %r3;
        bar.sync 0;"""
        for n in range(7)
    )
    steps = (
        steps[: steps.rindex("bar.sync 0;", 0, steps.rindex("add.u32"))] + "add.u32 %r3, %r3, %r9;"
    )  # the last needs none
    return f"""{PLACES}
        mad.wide.u32 %rd9, %r2, 4, %rd1;
        ld.global.u32 %r3, [%rd9];
        st.shared.u32 [%r5], %r3;
        bar.sync 0;{steps}
        mad.wide.u32 %rd9, %r2, 4, %rd0;
        st.global.b32 [%rd9], %r3;"""


def tiles(count=6):
    """Copies of two tiles on the way while a third is read, each thread the words of another warp's."""
    copy = """
        setp.lt.u32 %p4, {tile}, %r20;
        mul.lo.u32 %r21, {tile}, 128;
        add.u32 %r21, %r21, %r0;
        mad.wide.u32 %rd5, %r21, 4, %rd1;
        rem.u32 %r22, {tile}, 3;
        mad.lo.u32 %r22, %r22, 512, %r5;
        @%p4 cp.async.ca.shared.global [%r22], [%rd5], 4;
        cp.async.commit_group;"""
    return f"""{PLACES}
        mov.u32 %r20, {count};
        mov.u32 %r3, 0;
        mov.u32 %r24, 0;
        mov.u32 %r25, 1;
        {copy.format(tile="%r24")}
        {copy.format(tile="%r25")}
        mov.u32 %r23, 0;
        AGAIN: cp.async.wait_group 1;
        bar.sync 0;
        rem.u32 %r24, %r23, 3;
        mad.lo.u32 %r24, %r24, 512, %r6;
        ld.shared.u32 %r8, [%r24];
        mad.lo.u32 %r3, %r3, 3, %r8;
        bar.sync 0;
        add.u32 %r24, %r23, 2;
        {copy.format(tile="%r24")}
        add.u32 %r23, %r23, 1;
        setp.lt.u32 %p5, %r23, %r20;
        @%p5 bra AGAIN;
        cp.async.wait_group 0;
        mad.wide.u32 %rd9, %r2, 4, %rd0;
        st.global.b32 [%rd9], %r3;"""


# A descriptor of what lies at an address, in 8 x 8 matrices of 128 bytes, 128 to the next of k and 256 to the next rows
DESCRIPTOR = """
    shr.u32 %r30, {at}, 4;
    cvt.u64.u32 {to}, %r30;
    or.b64 {to}, {to}, 0x0000001000080000;"""
PRODUCT = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r12, %r13, %r14, %r15}}, %rd11, %rd12, {}, 1, 1, 0, 0;"
)


def product():
    """D = A B + A B of 64 x 16 and 16 x 8, which lie in the order of the 8 x 8 matrices, copied by all threads."""
    return f"""{PLACES}
        mad.wide.u32 %rd5, %r0, 16, %rd1;
        ld.global.v4.u32 {{%r16, %r17, %r18, %r19}}, [%rd5];
        shl.b32 %r20, %r0, 4;
        add.u32 %r20, %r20, %r4;
        st.shared.v4.u32 [%r20], {{%r16, %r17, %r18, %r19}};
        setp.lt.u32 %p4, %r0, 16;
        @%p4 ld.global.v4.u32 {{%r16, %r17, %r18, %r19}}, [%rd5+2048];
        @%p4 st.shared.v4.u32 [%r20+2048], {{%r16, %r17, %r18, %r19}};
        fence.proxy.async;
        bar.sync 0;
        {DESCRIPTOR.format(at="%r4", to="%rd11")}
        add.u32 %r21, %r4, 2048;
        {DESCRIPTOR.format(at="%r21", to="%rd12")}
        mov.b32 %r12, 0;
        mov.b32 %r13, 0;
        mov.b32 %r14, 0;
        mov.b32 %r15, 0;
        wgmma.fence.sync.aligned;
        {PRODUCT.format(0)}
        {PRODUCT.format(1)}
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.wide.u32 %rd9, %r0, 16, %rd0;
        st.global.v4.b32 [%rd9], {{%r12, %r13, %r14, %r15}};
        bar.sync 0;
        st.shared.v4.u32 [%r20], {{%r12, %r13, %r14, %r15}};"""


def without(text, pattern):
    """The text without each of the places where a pattern is, one after the other."""
    for found in re.finditer(pattern, text):
        yield text[: found.start()] + text[found.end() :]


def results(text, given, words, shared, order=None, **options):
    out = np.zeros(words, np.uint32)
    launch(kernel(text, 2, shared=shared), out, given, threads=128, order=order, **options)
    return out


def missed(text, pattern, want, *rest):
    """How many of the places of a pattern may be left out, and nothing tells."""
    unnoticed, places = 0, 0
    for mutant in without(text, pattern):
        places += 1
        for order in (None, "backward"):
            try:
                unnoticed += bool((results(mutant, *rest, order=order) == want).all())
            except Fault as fault:
                assert re.search("hazard|different values|wgmma|shown", str(fault)), fault
    assert places
    return unnoticed


@WAYS
def test_scan(order):
    given = NOISE.integers(1, 100, 128).astype(np.uint32)
    assert (results(scan(), given, 128, 512, order) == np.cumsum(given)).all()


def test_scan_without_a_barrier():
    given = NOISE.integers(1, 100, 128).astype(np.uint32)
    assert missed(scan(), r"bar\.sync 0;", np.cumsum(given), given, 128, 512) == 0


def sum_of_tiles(given):
    total = np.zeros(128, np.uint32)
    for tile in given.reshape(-1, 128):
        total = total * np.uint32(3) + np.roll(tile, -32)
    return total


@WAYS
def test_tiles(order):
    given = NOISE.integers(1, 1 << 20, 6 * 128).astype(np.uint32)
    assert (results(tiles(), given, 128, 1536, order) == sum_of_tiles(given)).all()


def test_tiles_without_a_wait():
    given = NOISE.integers(1, 1 << 20, 6 * 128).astype(np.uint32)
    want, rest = sum_of_tiles(given), (given, 128, 1536)
    assert missed(tiles(), r"cp\.async\.wait_group 1;", want, *rest) == 0
    assert missed(tiles(), r"(?<=AGAIN: cp.async.wait_group 1;)\s*bar\.sync 0;", want, *rest) == 0
    with pytest.raises(AssertionError):  # one tile more on its way than may be
        assert (results(tiles().replace("wait_group 1", "wait_group 2"), *rest) == want).all()
    # of three buffers the one that is filled was read two barriers ago: the second of them is one too many
    assert missed(tiles(), r"bar\.sync 0;(?=\s*add.u32 %r24, %r23, 2;)", want, *rest) == 2
    # of two buffers it is not
    two = tiles().replace(", 3;\n        mad.lo.u32 %r22", ", 2;\n        mad.lo.u32 %r22")
    two = two.replace("rem.u32 %r24, %r23, 3;", "rem.u32 %r24, %r23, 2;")
    assert (results(two, *rest) == want).all()
    assert missed(two, r"bar\.sync 0;(?=\s*add.u32 %r24, %r23, 2;)", want, *rest) == 0


def bf16(x):
    return (np.float32(x).view(np.uint32) >> 16).astype(np.uint16)


def operands():
    a, b = NOISE.integers(-4, 5, (64, 16)), NOISE.integers(-4, 5, (8, 16))
    given = [bf16(x.reshape(-1, 8, 2, 8).transpose(0, 2, 1, 3)).ravel() for x in (a, b)]
    d = 2 * (a @ b.T)
    lanes = [(n // 32, n % 32 // 4, n % 4) for n in range(128)]
    want = [d[16 * w + g + 8 * (i // 2), 2 * t + i % 2] for w, g, t in lanes for i in range(4)]
    return np.concatenate(given).view(np.uint32), np.float32(want).view(np.uint32)


@WAYS
def test_product(order):
    given, want = operands()
    assert (results(product(), given, 512, 4096, order).view(np.float32) == want.view(np.float32)).all()


def test_product_without_a_wait():
    given, want = operands()
    for pattern in (r"wgmma\.wait_group\.sync\.aligned 0;", r"wgmma\.commit_group\.sync\.aligned;", r"bar\.sync 0;"):
        assert missed(product(), pattern, want, given, 512, 4096) == 0
