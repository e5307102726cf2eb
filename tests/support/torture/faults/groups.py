"""Several jobs, groups and threads: what must not mix."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from model_cases import Plain, tokens

from torture.faults.out_of_step import another, other
from torture.rank import Rank
from torture.table import fault


def own_input(number: int) -> torch.Tensor:
    """Another picture for each pipeline."""
    return tokens() * (1.0 + 0.5 * number)


@fault("an error on all four, which names the way out", ranks=4)
def two_pipelines_taken_for_one(rank: Rank) -> None:
    """Data parallel 2 x sequence parallel 2 with no word of it: the pipelines' inputs differ."""
    model = Plain()
    rank.call("first", rank.compiled(model), model, own_input(rank.number // 2), must="error")


@fault("exact on all four, side by side", ranks=4, limit_s=60.0)
def two_pipelines_by_a_device_mesh(rank: Rank) -> None:
    """The same with ``options={"mesh": DeviceMesh}``."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"]
    model = Plain()
    run = rank.compiled(model, mesh=mesh)
    for step in range(3):
        rank.call(f"step {step}", run, model, own_input(rank.number // 2) + step)
    rank.meet("done")  # rank 0 keeps the store of both


@fault("exact on all four, side by side", ranks=4, machines=(0, 0, 1, 1), limit_s=60.0)
def two_pipelines_across_machines(rank: Rank) -> None:
    """Groups (0, 2) and (1, 3), each on both machines, by ``options={"mesh": ProcessGroup}``."""
    dist.init_process_group("gloo")
    groups = [dist.new_group(members) for members in ([0, 2], [1, 3])]
    model = Plain()
    run = rank.compiled(model, mesh=groups[rank.number % 2])
    for step in range(3):
        rank.call(f"step {step}", run, model, own_input(rank.number % 2) + step)
    rank.meet("done")  # rank 0 keeps the store of both


@fault("an error in the dead rank's group, exact in the other", ranks=4, limit_s=60.0)
def one_of_two_groups_dies(rank: Rank) -> None:
    """A rank of one pipeline is killed between its calls; the other pipeline goes on."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["sp"]
    model, mine = Plain(), rank.number // 2
    run = rank.compiled(model, mesh=mesh)
    rank.call("warm", run, model, own_input(mine))
    rank.meet("warm")
    if rank.number == 3:
        rank.die()
    for step in range(3):
        rank.call(f"group {mine} step {step}", run, model, own_input(mine) + step, must="error" if mine else "exact")


@fault("exact, and torch's own results too")
def collectives_of_the_users(rank: Rank) -> None:
    """The user's own gloo collectives between calls, on the same process group."""
    dist.init_process_group("gloo")
    model = Plain()
    run = rank.compiled(model)
    for step in range(3):
        rank.call(f"step {step}", run, model, tokens() + step)
        total = torch.full((3,), float(rank.number))
        dist.all_reduce(total)
        rank.check(f"sum {step}", bool((total == sum(range(rank.ranks))).all()), str(total))
        dist.barrier()


@fault("exact or an error on both")
def the_process_group_is_destroyed(rank: Rank) -> None:
    """dist.destroy_process_group() before a call, by a script that made the group itself."""
    dist.init_process_group("gloo")
    run, model = rank.warm()
    rank.meet("warm")
    dist.destroy_process_group()
    rank.call("after", run, model, must="either")
    second = another()
    rank.call("a compile", rank.compiled(second), second, must="either")


@fault("an error or exact on both")
def destroyed_by_one_rank(rank: Rank) -> None:
    """Only rank 1 destroys the process group."""
    dist.init_process_group("gloo")
    run, model = rank.warm()
    if rank.number == 1:
        dist.destroy_process_group()
    rank.call("after", run, model, must="either")


# ---------------------------------------------------------------------- threads


def in_thread(work: Callable[[], Any]) -> None:
    """Run in a thread of its own, to its end; grad mode belongs to a thread."""

    def body() -> None:
        with torch.no_grad():
            work()

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()


@fault("exact", quick=True)
def called_in_another_thread(rank: Rank) -> None:
    """Compiled in the main thread, called in others."""
    run, model = rank.warm()
    for step in range(3):
        in_thread(lambda step=step: rank.call(f"thread {step}", run, model, tokens() + step))  # type: ignore[misc]
    rank.call("main", run, model)


@fault("exact")
def compiled_in_a_thread(rank: Rank) -> None:
    """Compiled in a thread that has ended when the main one calls."""
    model = Plain()
    run = rank.compiled(model)
    in_thread(lambda: rank.call("thread", run, model))
    rank.call("main", run, model)


@fault("never wrong: exact or an error on both; then exact", limit_s=60.0)
def two_requests_at_once(rank: Rank) -> None:
    """Two threads of each rank call at once, in an order that nobody keeps."""
    run, model = rank.warm()

    def request(number: int) -> None:
        with torch.no_grad():
            rank.call(f"request {number}", run, model, tokens() + number, must="either")

    for turn in range(2):
        threads = [threading.Thread(target=request, args=(2 * turn + number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rank.meet(f"turn {turn}", 40.0)
    rank.recovers(run, model)


@fault("an error on both; then exact")
def two_threads_in_another_order(rank: Rank) -> None:
    """Threads A and B call in turn, A first on rank 0 and B first on rank 1."""
    run, model = rank.warm()
    for place in (0, 1):
        number = place if rank.number == 0 else 1 - place
        in_thread(lambda n=number: rank.call(f"thread {n}", run, model, tokens() + n, must="error"))  # type: ignore[misc]
    rank.recovers(run, model)


@fault("never wrong: exact or an error on both; then exact", limit_s=60.0)
def two_compiles_at_once(rank: Rank) -> None:
    """Two threads compile two models at once."""
    run, model = rank.warm()
    models = [another(100), another(200)]

    def compile(number: int) -> None:
        with torch.no_grad():
            rank.call(f"model {number}", rank.compiled(models[number]), models[number], must="either")

    threads = [threading.Thread(target=compile, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rank.recovers(run, model)


# ---------------------------------------------------------------------- jobs


def as_job(rank: Rank, number: int, port: int) -> Rank:
    """Make this process a rank of one of two jobs of two ranks."""
    os.environ |= {"RANK": str(rank.number % 2), "LOCAL_RANK": str(rank.number % 2), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    return rank


@fault("exact in both jobs", ranks=4, limit_s=60.0)
def two_jobs_on_one_machine(rank: Rank) -> None:
    """Two jobs side by side, each with its own port."""
    job = rank.number // 2
    as_job(rank, job, int(os.environ["MASTER_PORT"]) + job)
    model = Plain() if job == 0 else other()
    run = rank.compiled(model)
    for step in range(5):
        rank.call(f"job {job} step {step}", run, model, own_input(job) + step)


@fault("exact in the first job, an error in the second", ranks=4, limit_s=60.0)
def two_jobs_on_one_port(rank: Rank) -> None:
    """A second job is started with the first one's port, and other inputs: they must not mix."""
    job = rank.number // 2
    as_job(rank, job, int(os.environ["MASTER_PORT"]))
    model = Plain()
    run = rank.compiled(model)
    if job == 1:
        for first in range(2):
            rank.await_mark(f"running-{first}")
    for step in range(20):
        rank.call(f"job {job} step {step}", run, model, own_input(job) + step, must="either" if job else "exact")
        if job == 1:
            break
        rank.mark(f"running-{rank.number}")
        time.sleep(0.2)


@fault("exact", quick=True)
def leftovers_of_dead_jobs(rank: Rank) -> None:
    """Files in /dev/shm with names like ours, of processes that are long dead."""
    import glob

    stale = [f"/dev/shm/sfcompile-0123456789ab-{number}-{rank.number}" for number in range(3)]
    for path in stale:
        with open(path, "wb") as file:
            file.write(b"\x01" * 4096)
    rank.meet("stale")
    run, model = rank.warm()
    rank.call("next", run, model)
    rank.meet("done")
    for path in glob.glob(f"/dev/shm/sfcompile-0123456789ab-*-{rank.number}"):
        os.unlink(path)
