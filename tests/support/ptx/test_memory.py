"""Litmus tests: what the machine lets threads see, and what it calls a race."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.litmus import kernel, kinds, run
from ptx.text import PtxError
from ptx.world import Deadlock, World

SEEDS = range(8)
LATE, OVER, READ = (
    "read of what was not published",
    "write over what was not published",
    "write over what may still be read",
)


def message(
    store: str, fence: str = "", load: str = "ld.acquire.sys.global.b64", after: str = ""
) -> tuple[set[str], set[int]]:
    """Thread 0 of one GPU writes 42 and raises a flag, thread 0 of another waits for it and reads: races and values."""
    races: set[str] = set()
    values: set[int] = set()
    for seed in SEEDS:
        data, flag, out = np.zeros(1, np.uint32), np.zeros(1, np.uint64), np.zeros(1, np.uint32)
        only = "mov.u32 %r1, %tid.x;\nsetp.ne.u32 %p1, %r1, 0;\n@%p1 bra END;\n"
        send = f"{only}mov.b32 %r2, 42;\nst.global.b32 [%rd0], %r2;\n{fence}\nmov.b64 %rd3, 1;\n"
        send += f"{store} [%rd1], %rd3;\nEND:"
        take = f"{only}WAIT: {load} %rd3, [%rd1];\nsetp.eq.u64 %p2, %rd3, 0;\n@%p2 bra WAIT;\n{after}\n"
        take += "ld.global.b32 %r2, [%rd0];\nst.global.b32 [%rd2], %r2;\nEND:"
        world = run([send, take.replace("WAIT: ", "WAIT:\n")], [data, flag, out], seed)
        races |= kinds(world)
        values.add(int(out[0]))
    return races, values


def test_a_release_hands_on_what_came_before() -> None:
    assert message("st.release.sys.global.b64") == (set(), {42})


@pytest.mark.parametrize(
    ("store", "load"),
    [
        ("st.relaxed.sys.global.b64", "ld.acquire.sys.global.b64"),
        ("st.release.sys.global.b64", "ld.relaxed.sys.global.b64"),
        ("st.release.sys.global.b64", "ld.volatile.global.b64"),
        ("st.release.gpu.global.b64", "ld.acquire.sys.global.b64"),
        ("st.release.sys.global.b64", "ld.acquire.gpu.global.b64"),
    ],
)
def test_without_both_sides_the_data_may_be_late(store: str, load: str) -> None:
    races, values = message(store, load=load)
    assert LATE in races and values == {0, 42}


def test_fences_order_relaxed_accesses() -> None:
    store, load = "st.relaxed.sys.global.b64", "ld.relaxed.sys.global.b64"
    assert message(store, "fence.acq_rel.sys;", load, "fence.acq_rel.sys;") == (set(), {42})
    assert message(store, "membar.sys;", load, "membar.sys;") == (set(), {42})
    assert LATE in message(store, "fence.acq_rel.sys;", load)[0]
    assert LATE in message(store, "fence.acq_rel.gpu;", load, "fence.acq_rel.sys;")[0]


WRITE = "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd6, %rd0, %rd5;\nst.global.b32 [%rd6], %r1;\n"


@pytest.mark.parametrize(
    ("barrier", "sem", "fine"),
    [("bar.sync 0;", "acq_rel", True), ("", "acq_rel", False), ("bar.sync 0;", "relaxed", False)],
)
def test_the_last_program_speaks_for_all(barrier: str, sem: str, fine: bool) -> None:
    """kernels/device.py: stores, barrier, arrival counter, the last one's signal; a peer reads everything."""
    races: set[str] = set()
    for seed in SEEDS:
        data, words, out = np.zeros(128, np.uint32), np.zeros(4, np.uint64), np.zeros(128, np.uint32)
        put = "mov.u32 %r9, %ctaid.x;\nmul.wide.u32 %rd7, %r9, 256;\nadd.s64 %rd0, %rd0, %rd7;\n" + WRITE + barrier
        put += f"""
setp.ne.u32 %p1, %r1, 0;
@%p1 bra END;
atom.add.{sem}.sys.global.u64 %rd8, [%rd1+8], 1;
setp.ne.u64 %p2, %rd8, 1;
@%p2 bra END;
atom.exch.release.sys.global.b64 %rd9, [%rd1], 1;
END:"""
        take = (
            "WAIT:\nld.acquire.sys.global.b64 %rd3, [%rd1];\nsetp.eq.u64 %p2, %rd3, 0;\n@%p2 bra WAIT;\nbar.sync 0;\n"
        )
        take += (
            "mov.u32 %r1, %tid.x;\nmul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd6, %rd0, %rd5;\nld.global.b32 %r2, [%rd6];\n"
        )
        take += "add.s64 %rd7, %rd2, %rd5;\nst.global.b32 [%rd7], %r2;"
        world = World(seed)
        for array in (data, words, out):
            world.memory.add(array.ctypes.data, array.nbytes, "an array", array)
        given = [array.ctypes.data for array in (data, words, out)]
        world.launch(world.stream(0), world.code(kernel(put, 3, 64)), 2, given, 16)
        world.launch(world.stream(1), world.code(kernel(take, 3, 128)), 1, given, 16)
        world.run()
        races |= kinds(world)
        assert not fine or np.array_equal(out, np.tile(np.arange(64), 2))
    assert (races == set()) == fine


def test_a_program_needs_barriers_between_its_threads() -> None:
    shared = "mov.u32 %r1, %tid.x;\nshl.b32 %r2, %r1, 2;\nst.shared.b32 [%r2], %r1;\n{}\nxor.b32 %r3, %r2, {};\n"
    shared += (
        "ld.shared.b32 %r4, [%r3];\nmul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd6, %rd0, %rd5;\nst.global.b32 [%rd6], %r4;"
    )
    for lanes, barrier, fine in (
        (128, "bar.sync 0;", True), (128, "", False), (4, "", False), (4, "bar.warp.sync -1;", True),
        (128, "bar.warp.sync -1;", False),
    ):  # fmt: skip
        races: set[str] = set()
        for seed in SEEDS:
            out = np.zeros(64, np.uint32)
            races |= kinds(run([shared.format(barrier, lanes)], [out], seed, threads=64))
        assert (races == set()) == fine, (lanes, barrier, races)
        if fine:
            assert np.array_equal(out, np.arange(64) ^ (lanes // 4))


def test_equal_values_do_not_race_and_reads_are_remembered() -> None:
    same = "mov.b32 %r2, 5;\nst.global.b32 [%rd0], %r2;"
    assert kinds(run([same, same], [np.zeros(1, np.uint32)])) == set()
    store, load = "mov.u32 %r1, %tid.x;\nadd.u32 %r2, %r1, 1;\nst.global.b32 [%rd0], %r2;", "ld.global.b32 %r2, [%rd0];"
    found = set().union(*(kinds(run([store, load], [np.zeros(1, np.uint32)], seed)) for seed in SEEDS))
    assert {LATE, READ} <= found


COPY = """mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 4;
mul.wide.u32 %rd5, %r1, 16;
add.s64 %rd6, %rd0, %rd5;
cp.async.cg.shared.global [%r2], [%rd6], 16;
cp.async.commit_group;
cp.async.wait_group {};
{}
xor.b32 %r2, %r2, 512;
ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2];
add.s64 %rd7, %rd1, %rd5;
st.global.v4.b32 [%rd7], {{%r3, %r4, %r5, %r6}};"""


@pytest.mark.parametrize(
    ("groups", "barrier", "fine"), [(0, "bar.sync 0;", True), (1, "bar.sync 0;", False), (0, "", False)]
)
def test_copies_land_when_they_are_waited_for(groups: int, barrier: str, fine: bool) -> None:
    source, out = np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    world = run([COPY.format(groups, barrier)], [source, out], threads=64)
    assert (kinds(world) == set()) == fine
    assert np.array_equal(out.reshape(64, 4), source.reshape(64, 4)[np.arange(64) ^ 32]) == fine or not fine


def test_the_source_of_a_copy_is_read_until_it_lands() -> None:
    late = COPY.format(0, "bar.sync 0;").replace(
        "cp.async.wait_group 0;", "bar.sync 0;\nst.global.b32 [%rd6], %r1;\nbar.sync 0;\ncp.async.wait_group 0;"
    )
    crossed = late.replace(
        "st.global.b32 [%rd6]",
        "xor.b32 %r8, %r1, 32;\nmul.wide.u32 %rd8, %r8, 16;\nadd.s64 %rd8, %rd0, %rd8;\nst.global.b32 [%rd8]",
    )
    assert READ in kinds(run([crossed], [np.full(256, 9, np.uint32), np.zeros(256, np.uint32)], threads=64))


def test_kernels_of_a_stream_follow_each_other_and_streams_do_not() -> None:
    write = "mov.b32 %r2, 5;\nst.global.b32 [%rd0], %r2;"
    read = "ld.global.b32 %r2, [%rd0];\nst.global.b32 [%rd1], %r2;"
    for joined, races in ((True, False), (False, True)):
        found = set()
        for seed in SEEDS:
            arrays = [np.zeros(1, np.uint32), np.zeros(1, np.uint32)]
            world = World(seed)
            for array in arrays:
                world.memory.add(array.ctypes.data, 4, "an array", array)
            first, second = world.stream(0), world.stream(0)
            world.launch(first, world.code(kernel(write, 2)), 1, [a.ctypes.data for a in arrays], 16)
            if joined:
                world.wait(second, world.record(first))
            world.launch(second, world.code(kernel(read, 2)), 1, [a.ctypes.data for a in arrays], 16)
            world.run()
            found |= kinds(world)
            assert not joined or arrays[1][0] == 5
        assert bool(found) == races


def test_what_no_kernel_may_do_is_said() -> None:
    with pytest.raises(PtxError, match="illegal address"):
        run(["add.s64 %rd0, %rd0, 64;\nld.global.b32 %r1, [%rd0];"], [np.zeros(4, np.uint32)])
    with pytest.raises(PtxError, match="misaligned"):
        run(["add.s64 %rd0, %rd0, 2;\nld.global.b32 %r1, [%rd0];"], [np.zeros(4, np.uint32)])
    wait = "WAIT:\nld.acquire.sys.global.b64 %rd3, [%rd0];\nsetp.eq.u64 %p2, %rd3, 0;\n@%p2 bra WAIT;"
    with pytest.raises(Deadlock, match=r"k on GPU 0: 32 threads at .*polls in vain: ld.acquire"):
        run([wait], [np.zeros(1, np.uint64)])
    timed = "mov.u64 %rd4, %globaltimer;\nWAIT:\nld.acquire.sys.global.b64 %rd3, [%rd0];\nmov.u64 %rd5, %globaltimer;\n"
    timed += "sub.s64 %rd6, %rd5, %rd4;\nsetp.gt.u64 %p1, %rd6, 5000000000;\n@%p1 bra END;\n"
    timed += "setp.eq.u64 %p2, %rd3, 0;\n@%p2 bra WAIT;\nEND:"
    run([timed], [np.zeros(1, np.uint64)])  # a wait that looks at the clock ends
