"""The machine's tensor memory and the barriers before it: products of operands laid out as the ISA writes it, and misuse."""

import re

import numpy as np
import pytest

from tests.machine.kernels import kernel, launch
from tests.machine.memory import Fault
from tests.machine.rounding import small_values

N = 16
FORMS = {"bf16": 2, "f16": 2, "tf32": 4, "e2m1": 1}  # bytes that are decoded at a time
A, B, SCALES, BARRIERS = 0, 16384, 18432, 20480  # in shared memory
KINDS = {  # kind of the instruction, its descriptor but for M
    "bf16": ("kind::f16", 1 << 4 | 1 << 7 | 1 << 10), "f16": ("kind::f16", 1 << 4),
    "tf32": ("kind::tf32", 1 << 4 | 2 << 7 | 2 << 10),
    "e2m1": ("kind::mxf4nvf4.block_scale.scale_vec::4X", 1 << 7 | 1 << 10),
}  # fmt: skip


def operand(rng, form, rows):
    """[rows, k] and its 32 bytes a row."""
    if form == "e2m1":
        codes = rng.integers(0, 16, (rows, 64))
        return small_values(codes, "e2m1"), (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)
    values = rng.integers(-8, 9, (rows, 32 // FORMS[form])).astype(np.float32)
    if form == "f16":
        return values, values.astype(np.float16).view(np.uint8)
    words = values.view(np.uint32)
    return values, (words if form == "tf32" else (words >> 16).astype(np.uint16)).view(np.uint8)


def laid_out(rows, swizzle, turned, size):
    """Where the bytes of [rows, 32] lie, and the descriptor's fields above the start ("Canonical Layouts")."""
    row, byte = np.arange(rows)[:, None], np.arange(32)[None]
    if turned:  # 64 rows of two bytes side by side, under a swizzle of 128 bytes; eight k below one another
        k = byte // size
        at = row // 64 * 2048 + k // 8 * 1024 + k % 8 * 128 + row % 64 * size + byte % size
        leading, stride = 2048, 1024
    elif swizzle:  # from byte 32 of each row's span on
        at, leading, stride = row // 8 * (8 * swizzle) + row % 8 * swizzle + byte, 16, 8 * swizzle
    else:
        at, leading, stride = row // 8 * 256 + byte // 16 * 128 + row % 8 * 16 + byte % 16, 128, 256
    if span := 128 if turned else swizzle:
        at = at ^ (at // 128 % (span // 16)) * 16
    code = {0: 0, 128: 2, 64: 4, 32: 6}[span]
    return at, leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | code << 61


WAIT = """
W{n}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [s+{at}], 0;
    @!%p1 bra W{n};"""
COMMIT = f"tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [s+{BARRIERS + 8}];"

FREE = "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r20, 64;"


TOLD, MET = "tcgen05.fence::before_thread_sync;", "tcgen05.fence::after_thread_sync;"
DONE = WAIT.format(n=2, at=BARRIERS + 8)


def product(
    form="bf16", m=128, swizzle=0, turned=False, registers=False, *, descriptor=0, kind_bits=0, stores="", commit=COMMIT,
    wait=DONE, waits_for_load="tcgen05.wait::ld.sync.aligned;", free=FREE, columns=0,
    bytes_expected=None, end="", before=TOLD, after=MET,
):  # fmt: skip
    """One product, added to a matrix of ones; with `registers` A comes through tensor memory. What came, what should."""
    rng = np.random.default_rng(0)
    (a, a_bytes), (b, b_bytes) = operand(rng, form, m), operand(rng, form, N)
    memory = np.full(BARRIERS, 0xFF, np.uint8)
    (a_at, a_word), (b_at, b_word) = laid_out(m, swizzle, turned, FORMS[form]), laid_out(N, swizzle, False, FORMS[form])
    memory[A + a_at], memory[B + b_at] = a_bytes, b_bytes
    wanted = a @ b.T
    copies = where = ""
    if form == "e2m1":
        codes = rng.integers(0, 0x7F, (m + N, 4)).astype(np.uint8)
        scales = small_values(codes, "e4m3").repeat(16, 1)
        wanted = (a * scales[:m]) @ (b * scales[m:]).T
        for first, part in ((SCALES, codes[:m]), (SCALES + 512, codes[m:])):
            row = np.arange(len(part))[:, None]
            memory[first + row % 32 * 16 + row // 32 * 4 + np.arange(4)[None]] = part
        word = 128 >> 4 << 32 | 1 << 46
        copies = "".join(
            f"add.u64 %rd12, %rd9, {word | SCALES + 512 * side >> 4};\n"
            f"tcgen05.cp.cta_group::1.32x128b.warpx4 [%r20+{32 + 4 * side}], %rd12;\n"
            for side in (0, 1)
        )
        where = " [%r20+32], [%r20+36],"
    kind, bits = KINDS[form]
    bits |= N // 8 << 17 | m // 16 << 24 | turned << 15 | kind_bits
    count = BARRIERS if bytes_expected is None else bytes_expected
    a_operand = "[%r20+16]" if registers else "%rd10"
    rows = "shl.b32 %r21, %r5, 21;\nadd.u32 %r21, %r21, %r20;\n"  # lane 32 of the warp's number
    shape, split = ("16x32bx2.x8", ", 8") if m == 64 else ("32x32b.x16", "")
    sums = "{" + ",".join(f"%f{i}" for i in range(8 if m == 64 else 16)) + "}"
    ones = "".join(f"mov.f32 %f{i}, 0f3F800000;\n" for i in range(16))
    put = f"{ones}tcgen05.st.sync.aligned.{shape}.b32 [%r21]{split}, {sums};\n"
    if registers:  # 32 bytes of the row that a lane has
        loads = "".join(f"ld.global.b32 %a{i}, [%rd5+{4 * i}];\n" for i in range(8))
        parts = "{" + ",".join(f"%a{i}" for i in range(8)) + "}"
        put += f"mul.wide.u32 %rd5, %r0, 32;\nadd.u64 %rd5, %rd5, %rd2;\n{loads}"
        put += f"tcgen05.st.sync.aligned.32x32b.x8.b32 [%r21+16], {parts};\n"
    body = f"""
    shr.u32 %r5, %r0, 5;
    setp.ne.u32 %p2, %r0, 0;
    setp.ne.u32 %p3, %r5, 0;
    mov.u32 %r4, s;
    shr.u32 %r6, %r4, 4;
    cvt.u64.u32 %rd9, %r6;
    add.u64 %rd10, %rd9, {(a_word | A >> 4) ^ descriptor};
    add.u64 %rd11, %rd9, {b_word | B >> 4};
    @%p2 bra READY;
    mbarrier.init.shared::cta.b64 [s+{BARRIERS}], 1;
    mbarrier.init.shared::cta.b64 [s+{BARRIERS + 8}], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [s+{BARRIERS}], {count};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [s], [%rd1], {BARRIERS}, [s+{BARRIERS}];
READY:
    @%p3 bra ALLOCATED;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [s+{BARRIERS + 16}], 64;
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
ALLOCATED:
    bar.sync 0;
    {after}
    ld.shared.u32 %r20, [s+{BARRIERS + 16}];
    {rows}{put}tcgen05.wait::st.sync.aligned;
    {WAIT.format(n=1, at=BARRIERS)}
    {stores}
    {before}
    bar.sync 0;
    {after}
    @%p2 bra ISSUED;
    setp.eq.u32 %p4, %r0, %r0;
    {copies}
    mov.u32 %r7, {bits};
    tcgen05.mma.cta_group::1.{kind} [%r20+{columns}], {a_operand}, %rd11, %r7,{where} %p4;
    {commit}
ISSUED:
    {wait}
    {after}
    tcgen05.ld.sync.aligned.{shape}.b32 {sums}, [%r21]{split};
    {waits_for_load}
    mul.wide.u32 %rd6, %r0, 64;
    add.u64 %rd6, %rd6, %rd0;
    """ + "".join(f"st.global.f32 [%rd6+{4 * i}], %f{i};\n" for i in range(16))
    body += f"{end}{before}\nbar.sync 0;\n{after}\n@%p3 bra END;\n{free}\nEND:"
    out = np.zeros((128, 16), np.float32)
    declared = ".reg .f32 %f<16>; .reg .b32 %a<8>;\n"
    text = kernel(body, 3, BARRIERS + 32, arch="100a", declarations=declared)
    given = np.zeros((128, 32), np.uint8)
    given[:m] = a_bytes
    launch(text, out, memory, given, threads=128)
    lane, register = np.arange(128)[:, None], np.arange(16)[None]
    if m == 64:  # rows of 16 lanes, the lower half of the columns in the lower half of the warp
        register = np.arange(8)[None]
        out = out[:, :8]
        return out, 1 + wanted[lane // 32 * 16 + lane % 16, lane % 32 // 16 * 8 + register]
    return out, 1 + wanted[lane, register]


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("form, m", [("bf16", 128), ("f16", 64), ("tf32", 128), ("tf32", 64), ("e2m1", 128)])
def test_products(form, m, swizzle):
    got, wanted = product(form, m, swizzle)
    assert (got == wanted.astype(np.float32)).all() and wanted.any()


def test_rows_along_memory():
    got, wanted = product("bf16", 128, turned=True)
    assert (got == wanted).all()


@pytest.mark.parametrize("form", ["bf16", "tf32"])
def test_operand_in_tensor_memory(form):
    got, wanted = product(form, registers=True)
    assert (got == wanted).all()


def test_negated_operand():
    got, wanted = product(kind_bits=1 << 13)
    assert (got - 1 == 1 - wanted).all()


def test_too_early():
    """Sums that nobody has waited for are those from before; registers that a load has not been waited for say NaN."""
    got, _ = product(wait="", end=DONE + "\n")
    assert (got == 1).all()
    got, _ = product(waits_for_load="", end="tcgen05.wait::ld.sync.aligned;\n")
    assert np.isnan(got).all()


STORE = "st.shared.b32 [s+{at}], %r0;\n"


@pytest.mark.parametrize(
    "told, options",
    [
        ("deadlock", dict(commit="")),
        ("deadlock", dict(bytes_expected=BARRIERS + 16)),
        ("nobody has freed", dict(free="")),
        ("were not allocated so", dict(free=FREE.replace("64", "32"))),
        ("not allocated", dict(columns=60)),
        ("shared memory descriptor", dict(descriptor=1 << 46)),
        ("swizzle 1", dict(descriptor=1 << 61)),
        ("instruction descriptor", dict(kind_bits=2 << 7)),
        ("sums that are not FP32", dict(kind_bits=1 << 5)),
        ("instruction descriptor", dict(kind_bits=1 << 2)),
        ("E4M3", dict(form="e2m1", kind_bits=1 << 23)),
        ("no fence.proxy.async", dict(stores=f"@!%p2 {STORE.format(at=B)}")),
        ("on its way when its block has ended", dict(wait="", commit="")),
        ("no tcgen05.fence::after", dict(after="")),
        ("no tcgen05.fence::before", dict(before="")),
        ("nobody has waited for", dict(waits_for_load="")),
        ("changed while it was loaded", dict(
            waits_for_load="tcgen05.st.sync.aligned.32x32b.x1.b32 [%r21], {%r0};\ntcgen05.wait::st.sync.aligned;\n"
            "tcgen05.wait::ld.sync.aligned;")),
        ("lanes 32 to 63 from warp 0", dict(
            waits_for_load="add.u32 %r22, %r20, 2097152;\ntcgen05.ld.sync.aligned.32x32b.x1.b32 {%f0}, [%r22];")),
        ("given back", dict(end="tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [s+20512], 32;\n".replace(
            "20512", str(BARRIERS + 20)))),
        ("a barrier where there is one", dict(end=f"@!%p2 mbarrier.init.shared::cta.b64 [s+{BARRIERS}], 1;\n")),
        ("no barrier at", dict(end=f"{TOLD}\n@!%p2 mbarrier.arrive.shared::cta.b64 _, [s+{BARRIERS + 24}];\n")),
        ("2 arrive where 1 are pending", dict(end=f"{TOLD}\n@!%p2 mbarrier.arrive.shared::cta.b64 _, [s+{BARRIERS}], 2;\n")),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_faults(told, options):
    with pytest.raises(Fault, match=re.escape(told)):
        product(**options)


def test_a_fence_shows_what_was_stored():
    """What test_faults refuses without the fence."""
    stores = "@!%p2 st.shared.b32 [s+{}], {};\nfence.proxy.async.shared::cta;\n"
    got, wanted = product(stores=stores.format(B, 0))  # B's first row loses its first two values
    assert (got[:, 1:] == wanted[:, 1:]).all() and (got[:, 0] != wanted[:, 0]).any()


def test_scales_must_be_there_four_times():
    """Scales of a row that lie in three of four times 32 lanes are of no use."""
    spoil = f"{MET}\nmov.u32 %r30, 0x38383838;\nsetp.ne.u32 %p5, %r5, 1;\n@%p5 bra S;\n"
    spoil += "tcgen05.st.sync.aligned.32x32b.x1.b32 [%r21+32], {%r30};\ntcgen05.wait::st.sync.aligned;\nS:\n"
    again = f"{TOLD}\nbar.sync 0;\n{MET}\n@%p2 bra T;\ntcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16 "
    again += "[%r20], %rd10, %rd11, %r7, [%r20+32], [%r20+36], %p4;\n"
    again += COMMIT + "\nT:\n" + WAIT.format(n=3, at=BARRIERS + 8).replace(", 0;", ", 1;")
    got, wanted = product("e2m1", wait=DONE + "\n" + spoil + again)
    rows = np.isnan(got).all(1)
    assert rows[:32].all() and not np.isnan(got[32:]).any()
