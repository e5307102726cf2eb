"""The fast proof: it agrees with the explicit run on right schedules and on broken ones, at any number of ranks."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_ops import examples
from random_sites import attention_site, cut, gather_site
from symbolic_run import run_explicitly

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.builders import BUILDERS, build
from sfcompile.codegen.schedule.mesh import ACROSS, Mesh
from sfcompile.codegen.schedule.schedule import Schedule
from sfcompile.codegen.schedule.torus import build_torus
from sfcompile.errors import ScheduleError
from sfcompile.runtime.program.instructions import Arrival, Attend, Chunk, Forward, Instruction, Push, Put, Wait
from sfcompile.runtime.program.topology import Topology

Steps = list[Instruction]


def torus(ulysses: int = 2, ring: int = 2, parts: int = 1) -> Schedule:
    ranks = ulysses * ring
    mesh = Mesh.of(Topology.grid(ulysses, ring), ulysses, ring)
    return build_torus(attention_site(ranks, heads=max(4, ulysses)), mesh, parts, parts)


def runs_right(schedule: Schedule, epochs: int = 3) -> bool:
    """The verdict of the explicit run of every rank."""
    try:
        run_explicitly(schedule, epochs)
    except ScheduleError:
        return False
    return True


def proves(schedule: Schedule) -> bool:
    try:
        check(schedule)
    except ScheduleError:
        return False
    return True


@examples(3000)
@given(
    kind=st.sampled_from(list(BUILDERS)),
    machines=st.integers(1, 6),
    inside=st.integers(1, 6),
    ulysses_pick=st.integers(0, 20),
    across=st.sampled_from(ACROSS),
    lanes_pick=st.integers(0, 9),
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 3),
    tokens=st.integers(0, 97),
    parts=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 10**6),
)
def test_every_builder_is_right_on_every_shape(
    kind: str, machines: int, inside: int, ulysses_pick: int, across: str, lanes_pick: int, kv_heads: int, group: int,
    tokens: int, parts: tuple[int, int], seed: int,
) -> None:  # fmt: skip
    """(N, M, H, H_kv, L, chunks) at random: proved, and for up to 6 ranks run explicitly too."""
    ranks = machines * inside
    legal = [u for u in range(1, ranks + 1) if ranks % u == 0 and u <= kv_heads * group]
    ulysses = legal[ulysses_pick % len(legal)]
    divisors = [n for n in range(1, ulysses + 1) if ulysses % n == 0]
    lanes = divisors[lanes_pick % len(divisors)]
    rng = random.Random(seed)
    places = cut(tokens, ranks, rng)
    site = replace(
        attention_site(ranks), heads=kv_heads * group, kv_heads=kv_heads, q_positions=places, kv_positions=places
    )
    mesh = Mesh.of(Topology.grid(machines, inside), ulysses, ranks // ulysses, across, lanes)
    schedule = build(kind, site, mesh, *parts)
    proof = check(schedule)
    assert proof.puts == proof.waits == ranks * len(schedule.slots)
    groups = 1 if kind == "allgather" else ulysses
    assert proof.pairs == ranks * groups * parts[0] * ranks * parts[1]
    if ranks <= 4 and seed % 7 == 0:
        assert runs_right(schedule)


# ---------------------------------------------------------------------- mutants: the same mistake on every rank


def edited(schedule: Schedule, phase: str, edit: Callable[[Steps], Steps]) -> Schedule:
    phases = {**schedule.origin.phases, phase: tuple(edit(list(schedule.origin.phases[phase])))}
    return replace(schedule, origin=replace(schedule.origin, phases=phases))


def find(steps: Steps, kind: type, nth: int = 0) -> int:
    return [i for i, step in enumerate(steps) if isinstance(step, kind)][nth]


def drop(kind: type, nth: int = 0) -> Callable[[Steps], Steps]:
    return lambda steps: [step for i, step in enumerate(steps) if i != find(steps, kind, nth)]


def double(kind: type) -> Callable[[Steps], Steps]:
    return lambda steps: steps[: find(steps, kind) + 1] + steps[find(steps, kind) :]


def swap(kind: type, nth: int = 0, by: int = 1) -> Callable[[Steps], Steps]:
    def edit(steps: Steps) -> Steps:
        at = find(steps, kind, nth)
        steps[at], steps[at + by] = steps[at + by], steps[at]
        return steps

    return edit


def alter(kind: type, **fields: object) -> Callable[[Steps], Steps]:
    def edit(steps: Steps) -> Steps:
        at = find(steps, kind)
        steps[at] = replace(steps[at], **fields)  # type: ignore[arg-type]
        return steps

    return edit


MUTANTS = {
    "a signal is dropped: put": ("put_q", drop(Put), "its signal never comes"),
    "a signal is dropped: ring hop": ("attend", drop(Forward), "its signal never comes"),
    "a signal is dropped: output": ("attend", drop(Push), "its signal never comes"),
    "a wait is dropped": ("attend", drop(Wait), "without having waited|nobody waits"),
    "a wait is dropped at the end": ("collect", drop(Wait), "nobody waits for o"),
    "order: read before the wait": ("attend", swap(Wait, 1), "without having waited"),
    "order: output leaves early": ("attend", swap(Push, by=-1), "is without KV"),
    "order: attention after the pushes": ("attend", lambda steps: sorted(steps, key=lambda s: isinstance(s, Attend)),
                                          "is without KV"),
    "a slot is reused": ("put_v", lambda steps: [replace(step, slot=0) for step in steps],
                         "also filled|arrival table"),
    "a put is doubled": ("put_k", double(Put), "also filled by"),
    "a pair is doubled": ("attend", double(Attend), "attended twice"),
    "a pair is lost": ("attend", drop(Attend), "is without KV"),
    "the last pair is lost": ("attend", drop(Attend, -1), "is without KV"),
    "a put goes astray": ("put_q", alter(Put, dst=1), "its arrival table says"),
    "a hop goes to another group": ("attend", alter(Forward, dst=2), "its arrival table says"),
    "a wait names another rank": ("attend", alter(Wait, src=3), "the arrival table says"),
    "attention reads another chunk": ("attend", alter(Attend, kv=(Chunk(2),)), "holds k"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_every_rank_are_caught_and_named(name: str) -> None:
    phase, edit, message = MUTANTS[name]
    broken = edited(torus(), phase, edit)
    with pytest.raises(ScheduleError, match=message):
        check(broken)
    assert not runs_right(broken)


def test_a_circle_of_waits_is_a_deadlock_however_long_the_ring() -> None:
    """Every rank waits for its predecessor's put before its own: no rank can begin."""
    good = torus(1, 5)
    waits = [step for step in good.origin.phases["attend"] if isinstance(step, Wait)]
    rest = [step for step in good.origin.phases["attend"] if not isinstance(step, Wait)]
    broken = edited(good, "attend", lambda steps: [*waits, *rest])
    with pytest.raises(ScheduleError, match="deadlock: attend: wait"):
        check(broken)
    assert not runs_right(broken)


def test_random_edits_are_judged_alike() -> None:
    """Both proofs agree on hundreds of random mutants: swapped, dropped and doubled instructions."""
    rng = random.Random(5)
    verdicts = {True: 0, False: 0}
    for _ in range(300):
        good = build(
            rng.choice(list(BUILDERS)), attention_site(4), Mesh.of(Topology.grid(2, 2), 2, 2), rng.randint(1, 2)
        )
        phase = rng.choice([name for name, steps in good.origin.phases.items() if len(steps) > 1] or ["put_k"])

        def edit(steps: Steps) -> Steps:
            i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
            kind = rng.choice(["swap", "swap", "drop", "double"])
            if kind == "swap":
                steps[i], steps[j] = steps[j], steps[i]
            elif kind == "drop":
                del steps[i]
            else:
                steps.insert(j, steps[i])
            return steps

        mutant = edited(good, phase, edit)
        verdict = proves(mutant)
        assert verdict == runs_right(mutant), f"{phase}\n{mutant}"
        verdicts[verdict] += 1
    assert min(verdicts.values()) > 20, verdicts


def test_slots_that_overlap_or_are_small_are_caught() -> None:
    good = torus()
    first, second, *rest = good.slots
    with pytest.raises(ScheduleError, match="inside slot"):
        check(replace(good, slots=(first, replace(second, offset=first.offset + 4), *rest)))
    with pytest.raises(ScheduleError, match="a chunk of"):
        check(replace(good, slots=(replace(first, nbytes=first.nbytes - 4), second, *rest)))


def test_bytes_that_nobody_reads_are_caught() -> None:
    """An extra chunk that is sent and waited for, but read by nobody."""
    good = torus(2, 1)
    slot = len(good.slots)
    extra = replace(good.slots[0], name="extra", offset=good.heap_bytes + 64)
    origin = replace(
        good.origin,
        phases={
            **good.origin.phases,
            "put_q": (*good.origin.phases["put_q"], Put("q", 0, 1, slot)),
            "collect": (*good.origin.phases["collect"], Wait(slot, 1)),
        },
        arrivals=(*good.origin.arrivals, Arrival(slot, 1, "q", Chunk(1))),
    )
    with pytest.raises(ScheduleError, match="sent for nothing"):
        check(replace(good, slots=(*good.slots, extra), origin=origin))


def test_a_gather_is_right() -> None:
    assert check(build("", gather_site(5), Mesh.of(Topology.grid(1, 5), 1, 5))).puts == 20


def test_a_thousand_ranks_are_proved() -> None:
    """128 machines of 8; seconds are printed, not asserted."""
    for ulysses in (8, 64, 1024):
        schedule = torus(ulysses, 1024 // ulysses) if ulysses < 1024 else torus(32, 32)
        start = time.perf_counter()
        proof = check(schedule)
        print(f"{schedule.title}: {len(schedule.slots)} slots, proved in {time.perf_counter() - start:.3f} s")
        assert proof.ranks == 1024
