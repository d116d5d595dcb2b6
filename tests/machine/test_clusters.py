"""The machine's clusters: another block's memory, the barrier, and what is undefined."""

import numpy as np
import pytest

from tests.machine.kernels import kernel, launch
from tests.machine.memory import Fault

BARRIER = "barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n"
SEND = """
    mov.u32 %r3, %cluster_ctarank;
    xor.b32 %r4, %r3, 1;
    mov.u32 %r5, s;
    mad.lo.u32 %r5, %r0, 4, %r5;
    mapa.shared::cluster.u32 %r6, %r5, %r4;
    mad.lo.u32 %r7, %r3, 100, %r0;
"""
STORE = "st.shared::cluster.u32 [%r6], %r7;\n"
READ = "ld.shared.u32 %r8, [%r5];\nmad.wide.u32 %rd3, %r2, 4, %rd0;\nst.global.u32 [%rd3], %r8;\n"


def exchanged(body, **options):
    out = np.zeros(4 * 32, np.uint32)
    text = kernel(SEND + body, 1, 128).replace(")\n{", ")\n.reqnctapercluster 2\n{", 1)
    launch(text, out, threads=32, blocks=4, **options)
    return out.reshape(2, 2, 32)


def test_blocks_exchange():
    got = exchanged(BARRIER + STORE + BARRIER + READ)
    assert (got == np.array([[100], [0]]) + np.arange(32)).all()
    remote = "ld.shared::cluster.u32 %r8, [%r6];\nmad.wide.u32 %rd3, %r2, 4, %rd0;\nst.global.u32 [%rd3], %r8;\n"
    got = exchanged("st.shared.u32 [%r5], %r7;\n" + BARRIER + remote + BARRIER)
    assert (got == np.array([[100], [0]]) + np.arange(32)).all()


@pytest.mark.parametrize("body, told", [
    (STORE + BARRIER, "may not have begun"),
    (BARRIER + "setp.eq.u32 %p1, %r3, 1;\n@%p1 bra LAST;\nbra LONG;\nLAST:\nret;\nLONG:\n" + STORE, "has ended"),
    ("barrier.cluster.arrive;\n" + BARRIER, "no wait since"),
    ("barrier.cluster.wait;\n", "without an arrival"),
    (BARRIER + "setp.eq.u32 %p1, %r0, 1;\n@!%p1 barrier.cluster.arrive;\n@!%p1 barrier.cluster.wait;\nbar.sync 0;", "deadlock"),
    ("mov.u32 %r9, 2;\nmapa.shared::cluster.u32 %r6, %r5, %r9;\n" + BARRIER + STORE, "a block of rank 2"),
])  # fmt: skip
def test_faults(body, told):
    with pytest.raises(Fault, match=told):
        exchanged(body)


def test_blocks_that_run_ahead():
    """Without the second barrier some order of the blocks shows what is read too early; with it none does."""
    wanted = np.array([[100], [0]]) + np.arange(32)
    assert all((exchanged(BARRIER + STORE + BARRIER + READ, order=n) == wanted).all() for n in range(5))
    wait = "mov.u32 %r9, 0;\nAGAIN:\nadd.u32 %r9, %r9, 1;\nsetp.lt.u32 %p1, %r9, 20;\n@%p1 bra AGAIN;\n"
    early = [exchanged(BARRIER + wait + STORE + wait + READ + BARRIER, order=n) for n in range(5)]
    assert any((got == 0xFFFFFFFF).any() for got in early)
