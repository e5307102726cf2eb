"""Tables of a rank: what the kernels are told is what the schedule says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from kernel_ranks import Job, make_site

from sfcompile.codegen.kernels.tables import (
    COLLECT,
    FORWARD,
    KEY,
    PUT,
    QUERY,
    UNIT,
    KernelTables,
    make_tables,
    spans_of,
)  # fmt: skip
from sfcompile.options import Wire
from sfcompile.runtime.program.instructions import Attend, Forward, Push, Put, Wait

JOBS = [
    Job("torus", 2, 2, 2, 2, make_site([40, 21, 7, 33], 4)),
    Job("torus", 3, 1, 3, 1, make_site([40, 0, 33], 3, 6), True),
    Job("usp", 2, 2, 2, 2, make_site(16, 4), True, "ring"),
    Job("ring", 1, 3, 1, 3, make_site([5, 9, 2], 3)),
]


def column(table: np.ndarray, columns: tuple[str, ...], name: str) -> list[int]:
    return table[:, columns.index(name)].tolist()


def tables_of(job: Job, rank: int, **changes: int) -> KernelTables:
    return make_tables(job.schedule(), rank, 16, job.machine_of, **changes)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.kind}-{job.ranks}")
@pytest.mark.parametrize("merge", [True, False])
def test_every_pair_is_attended_once_and_outputs_leave_when_they_are_done(job: Job, merge: bool) -> None:
    schedule = job.schedule()
    for rank in range(job.ranks):
        tables = tables_of(job, rank, merge=merge)
        pairs = []
        rows = [tuple(row) for row in tables.queries.tolist()]
        for query, first, last, fresh, done, _ in tables.units.tolist():
            earlier = [unit for unit in tables.units.tolist() if unit[0] == query]
            assert fresh == (earlier[0][1:3] == [first, last]) or fresh == 0
            pairs += [(query, tuple(tables.keys[key, 2:4])) for key in range(first, last)]
            assert done in (0, 1)
        assert len(pairs) == len(set(pairs))
        steps = schedule.program(rank).phases["attend"]
        places = job.site.kv_positions
        wanted = [
            (q, kv) for step in steps if isinstance(step, Attend) for q in step.q for kv in step.kv if places[kv.src]
        ]
        assert len(pairs) == len(wanted)
        assert sum(unit[4] for unit in tables.units.tolist()) == len(rows)  # each output is finished once
        sent = [row for row in rows if row[QUERY.index("dst")] >= 0]
        # An output without rows would be a signal that nobody awaits: it might take back a later one of its slot.
        assert len(sent) == sum(isinstance(step, Push) and bool(job.site.q_positions[step.q.src]) for step in steps)
        assert all(row[QUERY.index("rows")] and row[QUERY.index("nbytes")] for row in sent)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.kind}-{job.ranks}")
def test_waits_and_moves_are_the_schedules(job: Job) -> None:
    schedule = job.schedule()
    for rank in range(job.ranks):
        tables, program = tables_of(job, rank), schedule.program(rank)
        shapes = {arrival.slot: schedule.shape(rank, arrival) for arrival in program.arrivals}
        full = {slot for slot, shape in shapes.items() if 0 not in shape}
        waits = {step.slot for step in program.phases["attend"] if isinstance(step, Wait)} & full
        forwards = [step for step in program.phases["attend"] if isinstance(step, Forward) and step.slot in full]
        awaited = {*column(tables.queries, QUERY, "slot"), *column(tables.keys, KEY, "k_slot")}
        awaited |= {*column(tables.keys, KEY, "v_slot"), *column(tables.forwards, FORWARD, "slot")}
        assert awaited - {-1} == waits
        assert column(tables.forwards, FORWARD, "to_slot") == [step.to_slot for step in forwards]
        assert len(tables.collects) == len([s for s in program.phases["collect"] if 0 not in shapes[s.slot]])
        assert set(column(tables.collects, COLLECT, "slot")) <= full
        for name in ("q", "k", "v"):
            puts = [step for step in program.phases[f"put_{name}"] if isinstance(step, Put)]
            made = [slot for slot in column(tables.puts[name], PUT, "slot") if slot >= 0]
            assert set(made) <= {step.slot for step in puts}
            assert column(tables.puts[name], PUT, "dst")[-1] == -1  # what stays comes last


def test_banks_are_equal_and_nothing_overlaps() -> None:
    job = JOBS[1]
    every = [tables_of(job, rank) for rank in range(job.ranks)]
    assert len({tables.bank_bytes for tables in every}) == 1
    spans = []
    for name, puts in every[0].puts.items():
        spans += [(row[8], row[9]) for row in puts.tolist() if row[0] >= 0]
        spans.append((every[0].own_at[name], puts[-1, 9]))
    spans += [(row[10], row[11]) for row in every[0].queries.tolist() if row[6] >= 0]
    spans.sort()
    assert spans[0][0] >= job.schedule().heap_bytes
    assert all(first + size <= second for (first, size), (second, _) in zip(spans, spans[1:], strict=False))
    assert spans[-1][0] + spans[-1][1] <= every[0].bank_bytes


def test_what_travels_is_as_long_as_it_travels_and_what_came_is_marked() -> None:
    plain = JOBS[1]
    coded = replace(plain, site=replace(plain.site, wire=Wire("fp8", "fp8", "same", "bf16")))
    for rank in range(plain.ranks):
        before, after, schedule = tables_of(plain, rank), tables_of(coded, rank), coded.schedule()
        assert after.own_at.keys() == before.own_at.keys() and after.bank_bytes < before.bank_bytes
        for name, ratio in (("q", (32 + 4) / 128), ("k", (32 + 4) / 128), ("v", 1.0)):
            sizes = [np.array(column(tables.puts[name], PUT, "nbytes")) for tables in (before, after)]
            assert sizes[1][:-1].tolist() == (ratio * sizes[0][:-1]).tolist() and sizes[1][-1] == sizes[0][-1]
        sizes = [np.array(column(tables.queries, QUERY, "nbytes")) for tables in (before, after)]
        assert sizes[1].tolist() == (0.5 * sizes[0]).tolist()
        leaves = [dst >= 0 for dst in column(after.queries, QUERY, "dst")]
        came = [
            came and rows > 0
            for came, rows in zip(*(column(after.queries, QUERY, x) for x in ("came", "rows")), strict=True)
        ]
        assert leaves == came
        starts = {schedule.slots[a.slot].offset for a in schedule.program(rank).arrivals if a.tensor == "k"}
        assert [at in starts for at in column(after.keys, KEY, "k_at")] == [
            bool(came) for came in column(after.keys, KEY, "came")
        ]


def test_columns_are_distinct() -> None:
    for columns in (UNIT, QUERY, KEY, FORWARD, PUT, COLLECT):
        assert len(set(columns)) == len(columns)


@pytest.mark.parametrize("keys", [range(100, 240), [*range(60, 120), *range(0, 60)], [7], range(300, 364)])
def test_spans_are_what_positions_say(keys: Sequence[int]) -> None:
    """Whole blocks from the chunk's begin; none left out that a query sees, and those not compared that all see."""
    queries, columns = np.array([*range(150, 190), *range(30, 60)], np.int32), np.array(keys, np.int32)
    for tile, (seen, partial) in enumerate(spans_of(queries, columns, 16, 32).tolist()):
        visible = columns[None, :] <= queries[tile * 16 : tile * 16 + 16, None]
        for at in range(0, len(columns), 32):
            block = visible[:, at : at + 32]
            assert at < seen or not block.any()
            assert seen - at <= partial or at >= seen or block.all()
        last = visible[:, max(seen - 32, 0) : seen]
        assert seen == 0 or (last.any() and (seen % 32 == 0 or seen == len(columns)))
        assert partial == 0 or not visible[:, : seen - partial + 32].all()


def test_spans_lie_by_unit_tile_and_key() -> None:
    job = Job("usp", 1, 2, 1, 2, replace(make_site([40, 70], 2), causal=True))
    tables = tables_of(job, 1, span_keys=32)
    assert column(tables.units, UNIT, "span_at")[0] == 0 and tables.spans.dtype == np.int32
    sizes = [
        -(-int(tables.queries[query, QUERY.index("rows")]) // 16) * (last - first)
        for query, first, last, *_ in tables.units.tolist()
    ]
    assert column(tables.units, UNIT, "span_at") == [sum(sizes[:i]) for i in range(len(sizes))]
    assert len(tables.spans) == sum(sizes) and (tables.spans[:, 0] > 0).any()
    assert len(tables_of(job, 1).spans) == 1  # nobody asked
