"""Groups beside and across each other: ranks in two groups, groups made late, with threads, packages and traces."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.distributed as dist
from model_cases import Plain, tokens

from torture.faults.disk import OURS, package
from torture.faults.groups import own_input
from torture.faults.out_of_step import another
from torture.rank import Rank
from torture.table import fault


def rows_and_columns(rank: Rank) -> tuple[Any, Any]:
    """This rank's row (0, 1 or 2, 3) and column (0, 2 or 1, 3) of a mesh of two by two."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("column", "row"))
    return mesh["row"], mesh["column"]


@fault("exact in both groups of every rank", ranks=4, limit_s=60.0)
def a_rank_in_two_groups(rank: Rank) -> None:
    """Two models, one split along the rows of a mesh and one along its columns, called in turn."""
    row, column = rows_and_columns(rank)
    first, second = Plain(), another()
    runs = rank.compiled(first, mesh=row), rank.compiled(second, mesh=column)
    for step in range(3):
        rank.call(f"row {step}", runs[0], first, own_input(rank.number // 2) + step)
        rank.call(f"column {step}", runs[1], second, own_input(rank.number % 2) + step)
    rank.meet("done")  # rank 0 keeps the store of all


@fault("an error on three, exact on one row; then exact", ranks=4, limit_s=60.0)
def one_of_a_ranks_two_groups_fails(rank: Rank) -> None:
    """Rank 3's input is another one in its column; the rows go on, and so does the column."""
    row, column = rows_and_columns(rank)
    first, second = Plain(), another()
    runs = rank.compiled(first, mesh=row), rank.compiled(second, mesh=column)
    rank.call("row", runs[0], first)
    rank.call("column", runs[1], second)
    rank.meet("warm")
    odd = rank.number % 2 == 1
    rank.call("odd", runs[1], second, own_input(rank.number // 2 if odd else 0), must="error" if odd else "exact")
    rank.call("row again", runs[0], first, tokens() + 1)
    rank.recovers(runs[1], second)
    rank.meet("done")


@fault("exact before, in and after the groups", ranks=4, limit_s=60.0)
def groups_made_late(rank: Rank) -> None:
    """All ranks compute a model together, then two and two another one, then all again."""
    run, model = rank.warm()
    groups = [dist.new_group(members) for members in ([0, 1], [2, 3])]
    second, mine = another(), rank.number // 2
    later = rank.compiled(second, mesh=groups[mine])
    for step in range(2):
        rank.call(f"group {mine} step {step}", later, second, own_input(mine) + step)
        rank.call(f"all {step}", run, model, tokens() + step)


@fault("exact in both threads of every rank", ranks=4, limit_s=60.0)
def threads_with_a_group_each(rank: Rank) -> None:
    """A thread calls the row's model while another one calls the column's."""
    row, column = rows_and_columns(rank)
    models = Plain(), another()
    runs = rank.compiled(models[0], mesh=row), rank.compiled(models[1], mesh=column)
    for which in range(2):
        rank.call(f"compile {which}", runs[which], models[which])
    rank.meet("compiled")

    def work(which: int) -> None:
        with torch.no_grad():
            for step in range(6):
                rank.call(f"thread {which} step {step}", runs[which], models[which], tokens() + step)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rank.meet("done")


@fault("exact or an error, never stuck; then exact", ranks=4, limit_s=90.0)
def threads_that_compile_for_a_group_each(rank: Rank) -> None:
    """Both threads compile at once: torch compiles one model at a time, and ranks may begin with different ones."""
    row, column = rows_and_columns(rank)
    models = Plain(), another()
    runs = rank.compiled(models[0], mesh=row), rank.compiled(models[1], mesh=column)

    def work(which: int) -> None:
        with torch.no_grad():
            rank.call(f"thread {which}", runs[which], models[which], must="either")

    order = (0, 1) if rank.number in (0, 3) else (1, 0)
    threads = [threading.Thread(target=work, args=(which,)) for which in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        rank.recovers(runs[which], models[which])
    rank.meet("done")


@fault("exact on all four", ranks=4, outputs=OURS, limit_s=60.0)
def a_package_for_each_group(rank: Rank) -> None:
    """``load(path, mesh=...)``: one package of two ranks, loaded by two groups."""
    from sfcompile.package.load import load

    row, _ = rows_and_columns(rank)
    path = package(rank, ranks=2)
    loaded = rank.attempt("load", lambda: load(path, timeout_s=rank.timeout_s, mesh=row))
    for step in range(2):
        rank.call(f"step {step}", loaded, Plain(), own_input(rank.number // 2) + step)
    rank.meet("done")


@fault(
    "exact, and each group's files beside the other's",
    ranks=4,
    limit_s=60.0,
    outputs=("*.txt", "*.json", "*.png", "*.html"),
)
def groups_that_trace_and_dump(rank: Rank) -> None:
    """Two groups give one folder for their traces and one for their dumps."""
    from sfcompile.tracing.trace import trace

    row, _ = rows_and_columns(rank)
    mine, model = rank.number // 2, Plain()
    run = rank.compiled(model, mesh=row, dump=str(rank.folder / "dump"))
    with trace(rank.folder / "trace") as traced:
        for step in range(2):
            rank.call(f"step {step}", run, model, own_input(mine) + step)
    rank.meet("traced")
    for folder in ("trace/ranks-0-1", "trace/ranks-2-3"):
        names = {path.name for path in (rank.folder / folder).iterdir()}
        rank.check(folder, {"rank0.json", "rank1.json", "trace.json", "summary.txt"} <= names, f"{sorted(names)}")
    dumps = sorted(path.name for path in (rank.folder / "dump").iterdir())
    rank.check("dumps", dumps == ["ranks-0-1", "ranks-2-3"], f"{dumps}")
    said = traced.report.headline if traced.report is not None else "2 ranks"
    rank.check("steps", "2" in said, said)
    rank.meet("done")
