"""Threads of the machine: where they go, where they wait, what they may access, what two of them do to one place."""

import numpy as np
import pytest
import torch

from tests.machine.kernels import elementwise, kernel, launch
from tests.machine.memory import Fault

LANE = np.arange(128, dtype=np.uint32)
STORE = "mad.wide.u32 %rd9, %r2, 4, %rd0;\nst.global.b32 [%rd9], %r3;"
WAYS = pytest.mark.parametrize("order", (None, "backward", 1, 2, 3))


def by_thread(body, threads=64, blocks=1, **options):
    """What each thread leaves in %r3."""
    out = np.zeros(threads * blocks, np.uint32)
    shared = options.pop("shared", 0)
    launch(kernel(f"{body}\n{STORE}", shared=shared), out, threads=threads, blocks=blocks, **options)
    return out.tolist()


# Ways


@WAYS
def test_loops_of_different_lengths(order):
    """The steps that Collatz's numbers take to 1."""
    text = """
        mov.u32 %r3, 0;
        add.u32 %r4, %r2, 1;
        LOOP: setp.eq.u32 %p1, %r4, 1;
        @%p1 bra DONE;
        add.u32 %r3, %r3, 1;
        and.b32 %r5, %r4, 1;
        setp.eq.u32 %p2, %r5, 0;
        @%p2 bra EVEN;
        mad.lo.u32 %r4, %r4, 3, 1;
        bra.uni LOOP;
        EVEN: shr.u32 %r4, %r4, 1;
        bra.uni LOOP;
        DONE:"""

    def steps(n):
        return 0 if n == 1 else 1 + steps(3 * n + 1 if n % 2 else n // 2)

    assert by_thread(text, 64, 2, order=order) == [steps(n + 1) for n in range(128)]


@WAYS
def test_guards_and_ends(order):
    """Some threads end early, by ret and by exit, under guards of both kinds; the others still meet and vote."""
    text = """
        setp.lt.u32 %p1, %r0, 5;
        setp.gt.u32 %p2, %r0, 59;
        mov.u32 %r3, 7;
        @%p2 mov.u32 %r3, 8;
        @!%p2 add.u32 %r3, %r3, 10;
        @%p1 ret;
        @%p2 exit;
        bar.sync 0;
        vote.sync.ballot.b32 %r4, !%p1, 0xffffffff;
        popc.b32 %r4, %r4;
        add.u32 %r3, %r3, %r4;"""
    # those that ended have stored nothing; of the first warp 27 vote, of the second 28
    want = [0 if n < 5 or n > 59 else 17 + (27 if n < 32 else 28) for n in range(64)]
    assert by_thread(text, order=order) == want


@WAYS
def test_barrier_reached_on_different_ways(order):
    """One barrier, two instructions: threads of a warp meet there, and each reads what the other side wrote before."""
    text = """
        mov.u32 %r5, s;
        xor.b32 %r6, %r0, 63;
        shl.b32 %r7, %r0, 2;
        add.u32 %r7, %r7, %r5;
        shl.b32 %r8, %r6, 2;
        add.u32 %r8, %r8, %r5;
        st.shared.u32 [%r7], %r0;
        and.b32 %r4, %r0, 1;
        setp.eq.u32 %p1, %r4, 0;
        @%p1 bra EVEN;
        barrier.sync 0;
        ld.shared.u32 %r3, [%r8];
        bra.uni DONE;
        EVEN: barrier.sync 0;
        ld.shared.u32 %r3, [%r8];
        DONE:"""
    assert by_thread(text, 64, 2, shared=256, order=order) == [63 - n % 64 for n in range(128)]


@WAYS
def test_barriers_of_some_threads(order):
    """Two barriers with counts: a first warp produces for the second by one of them, the third and fourth meet at the other."""
    text = """
        mov.u32 %r5, s;
        shl.b32 %r7, %r0, 2;
        add.u32 %r7, %r7, %r5;
        mov.u32 %r3, 0;
        shr.u32 %r6, %r0, 6;
        setp.ne.u32 %p1, %r6, 0;
        @%p1 bra UPPER;
        setp.lt.u32 %p2, %r0, 32;
        @%p2 st.shared.u32 [%r7], %r0;
        bar.sync 1, 64;
        @!%p2 ld.shared.u32 %r3, [%r7+-128];
        bra.uni DONE;
        UPPER: st.shared.u32 [%r7], %r0;
        bar.sync 2, 64;
        xor.b32 %r8, %r0, 32;
        shl.b32 %r8, %r8, 2;
        add.u32 %r8, %r8, %r5;
        ld.shared.u32 %r3, [%r8];
        DONE:"""
    want = [0] * 32 + list(range(32)) + [n ^ 32 for n in range(64, 128)]
    assert by_thread(text, 128, 2, shared=512, order=order) == want * 2


def test_deadlocks():
    for text in (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 1; bra.uni B; A: bar.sync 0; B:",
        "bar.sync 1, 96;",
        "setp.eq.u32 %p1, %r0, 3; @%p1 bra A; bar.warp.sync 0xffffffff; bra.uni B; A: bar.warp.sync 8; bar.warp.sync 12; B:",
        "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1, 64;",
    ):
        for order in (None, "backward", 1):
            with pytest.raises(Fault, match="deadlock"):
                by_thread(text, order=order)


def test_member_mask_without_its_own_lane():
    with pytest.raises(Fault, match="member mask"):
        by_thread("setp.lt.u32 %p1, %r0, 16; @%p1 bra A; bar.warp.sync 0xffff; A:")


def test_threads_that_others_wait_for_have_a_turn():
    """A flag that the last warp sets and the first spins on: who stands lowest must not go for ever."""
    text = """
        mov.u32 %r5, s;
        mov.u32 %r3, 5;
        setp.eq.u32 %p3, %r0, 0;
        @%p3 st.shared.u32 [%r5], 0;
        bar.sync 0;
        setp.gt.u32 %p1, %r0, 31;
        @%p1 bra SET;
        SPIN: ld.volatile.shared.u32 %r4, [%r5];
        setp.eq.u32 %p2, %r4, 0;
        @%p2 bra SPIN;
        bra.uni DONE;
        SET: setp.eq.u32 %p3, %r0, 32;
        @%p3 atom.shared.exch.b32 %r4, [%r5], 1;
        DONE:"""
    for order in (None, "backward", 1):
        assert by_thread(text, shared=16, order=order) == [5] * 64


# Names


def test_names_of_scopes():
    """Two blocks as inline assembly leaves them: the same labels, and registers of the same names but other widths."""
    once = """
        {{ .reg .pred p; .reg .b{bits} t, v<3>;
        mov.b{bits} t, {start};
        mov.b{bits} v0, {start};
        AGAIN: add.u{bits} t, t, v0;
        setp.lt.u{bits} p, t, {limit};
        @p bra AGAIN;
        {{ .reg .b32 t; mov.b32 t, 1000; add.u32 %r3, %r3, t; }}
        cvt.u32.u{bits} {out}, t; }}"""
    text = "mov.u32 %r3, 0;" + once.format(bits=64, start=0x100000000, limit=0x500000001, out="%r5")
    text += once.format(bits=32, start=3, limit=10, out="%r4") + "mad.lo.u32 %r3, %r4, 3, %r3;"
    text = text.replace("%r5, t;", "%r5, t; shr.u64 t, t, 32; cvt.u32.u64 %r6, t;") + "add.u32 %r3, %r3, %r6;"
    assert by_thread(text, 32) == [2000 + 3 * 12 + 6] * 32


# Memory


def test_widths_and_signs():
    a = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x1234, 0x8000, 0xFFFF8080], np.uint32)
    where = "mad.wide.u32 %rd8, %r2, 4, %rd1;"
    for kind, dtype in (("u8", np.uint8), ("s8", np.int8), ("u16", np.uint16), ("s16", np.int16), ("b8", np.uint8)):
        want = a.view(dtype)[:: 4 // np.dtype(dtype).itemsize].astype(np.int64) & 0xFFFFFFFF
        assert elementwise(f"{where} ld.global.{kind} d, [%rd8];", np.uint32, a).tolist() == want.tolist()
    text = f"{where} st.global.b8 [%rd8+1], a; ld.global.u32 d, [%rd8];"
    assert elementwise(text, np.uint32, a.copy()).tolist() == [(x & ~0xFF00) | (x & 255) << 8 for x in a.tolist()]
    text = f"{where} ld.global.s16 d, [%rd8];"
    assert elementwise(text, np.uint64, a).tolist() == (a.view(np.int16)[::2].astype(np.int64).view(np.uint64)).tolist()


def test_vectors_and_generic_addresses():
    a = np.arange(32 * 4, dtype=np.uint32)
    out = np.zeros_like(a)
    body = """
        mad.wide.u32 %rd5, %r0, 16, %rd1;
        ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd5];
        mov.u32 %r5, s;
        cvt.u64.u32 %rd6, %r5;
        cvta.shared.u64 %rd6, %rd6;
        mad.wide.u32 %rd6, %r0, 16, %rd6;
        st.v2.b64 [%rd6], {%rd7, %rd8};
        st.v2.b32 [%rd6+8], {%r10, %r11};
        st.b32 [%rd6], %r12;
        st.b32 [%rd6+4], %r13;
        ld.v2.b64 {%rd7, %rd8}, [%rd6];
        cvta.to.shared.u64 %rd6, %rd6;
        cvt.u32.u64 %r5, %rd6;
        ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r5];
        mad.wide.u32 %rd5, %r0, 16, %rd0;
        st.global.v4.b32 [%rd5], {%r10, %r11, %r12, %r13};"""
    launch(kernel(body, 2, shared=512), out, a)
    assert (out.reshape(-1, 4) == a.reshape(-1, 4)[:, [2, 3, 0, 1]]).all()


def test_constants_and_variables():
    head = ".const .align 4 .b32 table[4] = {7, 0x10, 9, 4};\n.global .align 1 .b8 bytes[3] = {1, 2, 255};\n"
    body = "mov.u64 %rd5, table; mad.wide.u32 %rd5, %r1, 4, %rd5; ld.const.u32 %r3, [%rd5+4];"
    body += "ld.global.u8 %r4, [bytes+2]; add.u32 %r3, %r3, %r4;"
    out = np.zeros(64, np.uint32)
    text = kernel(f"{body}\n{STORE}").replace(".visible", head + ".visible")
    launch(text, out, blocks=2)
    assert out.tolist() == [16 + 255] * 32 + [9 + 255] * 32


@pytest.mark.parametrize(
    ("text", "complaint"),
    (
        ("ld.global.u32 %r3, [%rd0+252];", None),
        ("ld.global.u32 %r3, [%rd0+256];", "beyond 256 bytes"),
        ("ld.global.u32 %r3, [%rd0+-4];", "below|beyond"),
        ("ld.global.u32 %r3, [%rd0+2];", "no multiple of 4"),
        ("ld.global.v2.u32 {%r3, %r4}, [%rd0+4];", "no multiple of 8"),
        ("ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%rd0+248];", "no multiple of 16"),
        ("st.global.u64 [%rd0+252], %rd0;", "no multiple of 8"),
        ("st.global.v2.u32 [%rd0+256], {%r3, %r3};", "beyond 256 bytes"),
        ("setp.eq.u32 %p1, %r0, 77; @%p1 st.global.u32 [%rd0+256], %r3;", None),
        ("mov.u32 %r4, s; ld.shared.u32 %r3, [%r4+124];", None),
        ("mov.u32 %r4, s; ld.shared.u32 %r3, [%r4+128];", "shared address 0x80"),
        ("mov.u32 %r4, s; st.shared.u16 [%r4+1], %h1;", "shared address"),
        ("mov.u32 %r4, s; sub.u32 %r4, %r4, 4; ld.shared.u32 %r3, [%r4];", "rank|shared address"),
        ("mov.u64 %rd5, table; st.global.u32 [%rd5], %r3;", "a store to the constants"),
        ("mov.u64 %rd5, 0; ld.global.u32 %r3, [%rd5];", "below everything"),
        ("trap;", "trap"),
        ("st.global.u32 [%rd0], %r0;", "different values"),
        ("mov.u32 %r4, s; st.shared.u32 [%r4], %r0;", "different values"),
        ("st.global.u32 [%rd0], %r1;", None),
    ),
)
def test_faults(text, complaint):
    body = f"mov.u32 %r3, 0;\n{text}\n{STORE}"
    module = kernel(body, shared=128).replace(".visible", ".const .align 4 .b32 table[4];\n.visible")
    out = np.zeros(64, np.uint32)
    if complaint is None:
        launch(module, out, threads=64)
    else:
        with pytest.raises(Fault, match=complaint):
            launch(module, out, threads=64)


def test_parameters_are_read_only():
    out = np.zeros(32, np.uint32)
    text = "mov.b64 %rd5, p0; cvta.param.u64 %rd5, %rd5; st.u64 [%rd5], %rd0;"
    with pytest.raises(Fault, match="a store to the parameters"):
        launch(kernel(text), out)


# One place for many


@WAYS
@pytest.mark.parametrize("space", ("global", "shared"))
def test_atomics(space, order):
    place = "mov.u32 %r5, s;" if space == "shared" else ""
    at = "[%r5{}]" if space == "shared" else "[%rd1{}]"
    clear = f"st.{space}.b32 {at.format('')}, 5;" if space == "shared" else ""
    for text, total, olds in (
        ("add.u32 %r3, {}, 3;", 5 + 3 * 128, [5 + 3 * n for n in range(128)]),
        ("inc.u32 %r3, {}, 6;", (5 + 128) % 7, [(5 + n) % 7 for n in range(128)]),
        ("dec.u32 %r3, {}, 6;", (5 - 128) % 7, [(5 - n) % 7 for n in range(128)]),
        ("cas.b32 %r3, {}, 5, 9;", 9, [5] + [9] * 127),
        ("or.b32 %r3, {}, 8;", 13, [5] + [13] * 127),
        ("and.b32 %r3, {}, 4;", 4, [5] + [4] * 127),
    ):
        cell, out = np.array([5], np.uint32), np.zeros(128, np.uint32)
        body = f"{place} setp.eq.u32 %p1, %r0, 0; {'@%p1 ' + clear if clear else ''} bar.sync 0;"
        body += f"atom.{space}.{text.format(at.format(''))} bar.sync 0;"
        body += f"ld.{space}.u32 %r4, {at.format('')}; @%p1 st.global.u32 [%rd1], %r4;{STORE}"
        launch(kernel(body, 2, shared=16), out, cell, threads=128, order=order)
        assert int(cell[0]) == total and sorted(out.tolist()) == sorted(olds)


@WAYS
def test_extremes_and_exchanges(order):
    for text, total in (
        ("red.global.max.s32 [%rd1], %r4;", 63), ("red.global.min.s32 [%rd1], %r4;", -64),
        ("red.global.xor.b32 [%rd1], %r4;", 5),
        ("red.global.min.u32 [%rd1], %r4;", 0), ("red.global.add.s32 [%rd1], %r4;", 5 - 64),
    ):  # fmt: skip
        cell, out = np.array([5], np.int32), np.zeros(128, np.uint32)
        launch(kernel(f"sub.s32 %r4, %r0, 64; mov.u32 %r3, 0; {text}\n{STORE}", 2), out, cell, threads=128, order=order)
        assert int(cell[0]) == total
    cell, out = np.array([999], np.uint32), np.zeros(128, np.uint32)
    launch(kernel(f"atom.global.exch.b32 %r3, [%rd1], %r0;\n{STORE}", 2), out, cell, threads=128, order=order)
    assert sorted([*out.tolist(), int(cell[0])]) == [*range(128), 999]
    cell = np.array([0.5], np.float32)
    launch(
        kernel(f"mov.u32 %r3, 0; red.global.add.f32 [%rd1], 0f3F000000;\n{STORE}", 2),
        out,
        cell,
        threads=128,
        order=order,
    )
    assert cell[0] == 64.5


# Asynchronous copies

COPY = """
    mov.u32 %r5, s;
    shl.b32 %r6, %r0, 4;
    add.u32 %r5, %r5, %r6;
    mad.wide.u32 %rd5, %r0, 16, %rd1;
    mov.u32 %r7, 77;
    st.shared.v4.u32 [%r5], {{%r7, %r7, %r7, %r7}};
    st.shared.v4.u32 [%r5+512], {{%r7, %r7, %r7, %r7}};
    {}
    ld.shared.u32 %r3, [%r5+{}];"""


@pytest.mark.parametrize(
    ("text", "seen"),
    (
        # what is waited for is there, and only that; a lane of 4n, 4n + 1, ... has n
        ("cp.async.cg.shared.global [%r5], [%rd5], 16; cp.async.wait_all;", (0, 1, 2, 3)),
        ("cp.async.ca.shared.global [%r5], [%rd5], 8; cp.async.wait_all;", (0, 1, 77, 77)),
        ("cp.async.ca.shared.global [%r5], [%rd5], 16, 8; cp.async.wait_all;", (0, 1, -1, -1)),
        ("cp.async.cg.shared.global [%r5], [%rd5], 16, 0; cp.async.wait_all;", (-1, -1, -1, -1)),
        ("setp.eq.u32 %p1, %r0, %r0; cp.async.cg.shared.global [%r5], [%rd5], 16, %p1; cp.async.wait_all;", (-1, -1, -1, -1)),
        ("cp.async.cg.shared.global [%r5], [%rd5], 16; cp.async.commit_group; cp.async.wait_group 0;", (0, 1, 2, 3)),
        (
            "cp.async.cg.shared.global [%r5], [%rd5], 16; cp.async.commit_group;"
            "cp.async.cg.shared.global [%r5+512], [%rd5], 16; cp.async.commit_group; cp.async.wait_group 1;",
            (0, 1, 2, 3),
        ),
    ),
)  # fmt: skip
def test_cp_async(text, seen):
    a = np.arange(128, dtype=np.uint32)
    for word, value in enumerate(seen):
        out = np.zeros(32, np.uint32)
        launch(kernel(COPY.format(text, 4 * word) + STORE, 2, shared=1024), out, a)
        assert out.tolist() == [value if value == 77 else 0 if value < 0 else 4 * n + value for n in range(32)]


@pytest.mark.parametrize(
    "text",
    (
        "cp.async.cg.shared.global [%r5], [%rd5], 16;",
        "cp.async.cg.shared.global [%r5], [%rd5], 16; cp.async.wait_group 0;",  # of no group
        "cp.async.cg.shared.global [%r5], [%rd5], 16; cp.async.commit_group; cp.async.wait_group 1;",
        "cp.async.cg.shared.global [%r5+512], [%rd5], 16; cp.async.commit_group;"
        "cp.async.cg.shared.global [%r5], [%rd5], 16; cp.async.commit_group; cp.async.wait_group 1;",
    ),
)
def test_cp_async_that_nobody_waited_for(text):
    a, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    launch(kernel(COPY.format(text, 0) + STORE, 2, shared=1024), out, a)
    assert not np.isin(out, a[4::4]).any()


def test_special_registers():
    text = "mov.u32 %r4, {}; mov.u32 %r3, %r4;"
    for name, want in (
        ("%laneid", [n % 32 for n in range(64)]), ("%warpid", [n // 32 for n in range(64)]), ("%ntid.x", [64] * 64),
        ("%ctaid.x", [0] * 64), ("%nctaid.x", [1] * 64), ("%tid.y", [0] * 64), ("%ntid.z", [1] * 64),
    ):  # fmt: skip
        assert by_thread(text.format(name)) == want


def test_tensors_of_a_launch_alone():
    """What no argument reaches is out of bounds, though the process has it."""
    other = torch.zeros(4)
    out = np.zeros(32, np.uint32)
    with pytest.raises(Fault, match="beyond|below"):
        launch(kernel(f"mov.u64 %rd5, {other.data_ptr()}; ld.global.u32 %r3, [%rd5];\n{STORE}"), out)
