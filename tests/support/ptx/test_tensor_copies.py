"""Tensor copies and barriers in shared memory: litmus tests of a few lines of PTX."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.litmus import kinds, run
from ptx.text import PtxError, read_entry
from ptx.world import Deadlock, World

ROWS = 10
"""Of the array; the map's box has 16, so that the last six are filled with zeros."""
SEND = """mov.u32 %r1, %tid.x;
mul.wide.u32 %rd5, %r1, 4;
add.s64 %rd6, %rd0, %rd5;
st.global.b32 [%rd6], %r1;
add.s32 %r2, %r1, 1000;
st.global.b32 [%rd6+1152], %r2;
bar.sync 0;
setp.ne.u32 %p1, %r1, 0;
@%p1 bra END;
mov.b64 %rd7, 1;
st.release.sys.global.b64 [%rd1], %rd7;
END:
"""
MAP = """mov.u32 %r1, %tid.x;
setp.eq.u32 %p1, %r1, 0;
mov.b64 %rd10, 0;
@%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [ %rd10 + 0 ], %rd0;
@%p1 tensormap.replace.tile.rank.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x1;
@%p1 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x0, 32;
@%p1 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x1, 16;
@%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x0, 32;
@%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x1, 10;
@%p1 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [ %rd10 + 0 ], 0x0, 128;
@%p1 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x0, 1;
@%p1 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x1, 1;
@%p1 tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x7;
@%p1 tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [ %rd10 + 0 ], 0x3;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd3], [%rd10], 0x80;
ACQUIRE
mov.b32 %r3, 512;
@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
bar.sync 0;
"""
TAKE = """setp.ne.u32 %p2, %r1, 0;
@%p2 bra TAKEN;
POLL:
ld.acquire.sys.global.b64 %rd7, [%rd1];
setp.eq.u64 %p3, %rd7, 0;
@%p3 bra POLL;
TAKEN:
bar.warp.sync -1;
FENCE
mov.b32 %r4, 1024;
mov.b32 %r5, 0;
elect.sync %r6|%p4, -1;
@%p4 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], EXPECTED;
@%p4 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r4], [%rd3, {%r5, %r5}], [%r3];
WAIT
"""
WAIT = """{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], 0;
@!complete bra.uni waitLoop;
}"""
SHOW = """mov.b32 %r7, 0;
shl.b32 %r8, %r1, 2;
mul.wide.u32 %rd8, %r1, 4;
add.s64 %rd9, %rd2, %rd8;
NEXT:
add.s32 %r9, %r8, %r4;
ld.shared.b32 %r10, [%r9];
st.global.b32 [%rd9], %r10;
add.s32 %r4, %r4, 128;
add.s64 %rd9, %rd9, 128;
add.s32 %r7, %r7, 1;
setp.lt.s32 %p5, %r7, 16;
@%p5 bra NEXT;
"""


def received(
    fence: str = "fence.proxy.async;", acquire: str = "fence.proxy.tensormap::generic.acquire.gpu [ %rd3 + 0 ], 0x80;",
    wait: str = WAIT, expected: int = 2048, take: str = TAKE,
) -> tuple[set[str], list[np.ndarray]]:  # fmt: skip
    """One GPU stores rows and raises a flag, another copies them into shared memory: races, and what it got."""
    races: set[str] = set()
    results = []
    for seed in range(6):
        out = np.zeros((16, 32), np.uint32)
        scratch = np.zeros(64, np.uint32)
        scratch = scratch[(-scratch.ctypes.data % 128) // 4 :][:32]
        arrays = [np.full((ROWS, 32), 7, np.uint32), np.zeros(1, np.uint64), out, scratch]
        body = (MAP + take + SHOW).replace("ACQUIRE", acquire).replace("FENCE", fence).replace("WAIT", wait)
        world = run([SEND, body.replace("EXPECTED", str(expected))], arrays, seed)
        races |= kinds(world)
        results.append(out)
    return races, results


def test_what_was_acquired_and_fenced_lands_swizzled_and_zeros_beyond_the_array() -> None:
    races, results = received()
    want = np.full((ROWS, 32), 7, np.uint32)
    want[0], want[9] = np.arange(32), np.arange(1000, 1032)
    for out in results:
        rows = np.stack([row.reshape(8, 4)[np.arange(8) ^ (r % 8)].ravel() for r, row in enumerate(out)])
        assert np.array_equal(rows[:ROWS], want) and not out[ROWS:].any()
    assert races == set()


@pytest.mark.parametrize("fence", ["", "fence.proxy.async.shared::cta;", "fence.acq_rel.sys;"])
def test_an_acquire_alone_does_not_order_a_copy(fence: str) -> None:
    races, _ = received(fence)
    assert races == {"read of what was not published"}


def test_a_fence_before_the_acquire_does_not_either() -> None:
    early = TAKE.replace("FENCE\n", "").replace("POLL:", "fence.proxy.async;\nPOLL:")
    assert received(take=early)[0] == {"read of what was not published"}
    assert received("fence.proxy.async.global;")[0] == set()


def test_what_has_not_landed_is_rubbish() -> None:
    """Without the wait the kernel reads too early, or ends before the copy has landed."""
    with pytest.raises(PtxError, match="before a tensor copy had landed"):
        received(wait="")
    with pytest.raises(Deadlock, match="try_wait"):
        received(expected=4096)


def test_a_map_is_acquired_before_it_is_used() -> None:
    with pytest.raises(PtxError, match="has not acquired"):
        received(acquire="")


def test_barriers_count_and_turn() -> None:
    """Two arrivals a phase; what came before an arrival is seen after the wait, and not without it."""
    body = """mov.u32 %r1, %tid.x;
setp.eq.u32 %p1, %r1, 0;
mov.b32 %r3, 512;
@%p1 mbarrier.init.shared::cta.b64 [%r3], 2;
bar.sync 0;
setp.ge.u32 %p2, %r1, 32;
@%p2 bra TAKE;
mov.b32 %r2, 42;
@%p1 st.shared.b32 [%r3+64], %r2;
bar.warp.sync -1;
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];
@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];
bra END;
TAKE:
WAIT
ld.shared.b32 %r4, [%r3+64];
setp.eq.u32 %p3, %r1, 32;
@%p3 st.global.b32 [%rd0], %r4;
END:
"""

    def seen(wait: str, more: str = "") -> tuple[set[str], int]:
        out = np.zeros(1, np.uint32)
        text = body.replace("WAIT", wait).replace("bra END;", f"{more}\nbra END;")
        world: World = run([text], [out, out], 3, threads=64)
        return kinds(world), int(out[0])

    assert seen(WAIT) == (set(), 42)
    assert seen("")[0]  # the read comes before the store, or is late
    with pytest.raises(PtxError, match="used before it is made"):
        seen(WAIT.replace("[%r3]", "[%r1]"))
    third = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r3];"
    assert seen(WAIT, third) == (set(), 42)  # of the next phase


def test_names_between_braces_are_their_own() -> None:
    text = (
        ".visible .entry k(\n)\n.reqntid 32\n{\n.reg .b32 %r<2>;\n"
        + "{\n.reg .b32 x;\nmov.b32 x, 1;\nskip:\nbra skip;\n}\n" * 2
        + "ret;\n}\n"
    )
    entry = read_entry(text)
    assert [s.args[0] for s in entry.statements if s.op == "mov.b32"] == ["%zr0", "%zr1"]
    assert sorted(entry.labels) == ["skip__1", "skip__2"] and entry.counts["zr"] == 2
    assert [s.args[0] for s in entry.statements if s.op == "bra"] == ["skip__1", "skip__2"]
