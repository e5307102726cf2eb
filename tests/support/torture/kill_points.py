"""Random kill points: a whole life of a job, and one of its ranks killed at a random moment of it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from model_cases import Plain, tokens

from torture.job import Job
from torture.rank import Rank
from torture.table import TIMEOUT_S, Fault

MACHINES = ((0, 0), (0, 0, 0), (0, 1), (0, 0, 1), (0, 1, 2))
AXES = ("ring", "ulysses", "")
"""The axis of the mesh that all ranks lie on; none: as planned."""


def whole_life(rank: Rank, axis: str) -> None:
    """Compile, some calls, a second length, a package, its calls, the end. A rank stops at its first error."""
    from sfcompile.package.export import export
    from sfcompile.package.load import load

    model = Plain()
    mesh = {axis: rank.ranks} if axis else None
    run = rank.compiled(model, mesh=mesh)

    def all_of_it() -> None:
        for step in range(3):
            rank.note("step", number=step)
            close(rank, run(tokens() + step), model(tokens() + step))
        path = rank.folder / "model.sf"
        if rank.number == 0:
            export(
                model, (tokens(),), {}, path, topology=f"1x{rank.ranks}", placement="shard", mesh=mesh, inner="eager"
            )
            rank.mark("exported")
        if not rank.await_mark("exported", 10.0):
            return
        loaded = load(path, timeout_s=rank.timeout_s)
        for step in range(3):
            close(rank, loaded(tokens() - step), model(tokens() - step))

    rank.attempt("life", all_of_it, must="either")


def close(rank: Rank, got: object, want: object) -> None:
    """Write down a value that is compared with eager's."""
    rank.attempt("value", lambda: got, want)  # type: ignore[arg-type]


def killed_at(job: Job, victim: int, moment_s: float) -> None:
    """Kill a rank so many seconds after the start, if it still runs."""
    if not job.over.wait(moment_s):
        job.strike(victim)


def life(number: int, programs: bool, rng: random.Random) -> Fault:
    """A job that nobody kills, of any shape."""
    machines = rng.choice(MACHINES)
    axis = rng.choice(AXES)
    emulated = number % 8 == 7
    where = f"{len(set(machines))} {'emulated ' if emulated else ''}machines{' as programs' if programs else ''}"
    return Fault(
        f"life {number}: {len(machines)} ranks on {where}, {axis or 'as planned'}",
        "kill_points",
        whole_life,
        "exact",
        args=(axis,),
        ranks=len(machines),
        machines=machines,
        rate="1gbit" if emulated else None,
        timeout_s=2 * TIMEOUT_S if programs else TIMEOUT_S,  # programs that import side by side start far apart
        limit_s=150.0 if programs else 60.0,
        programs=programs,
        outputs=("model.sf",),
    )


def kill_points(count: int, seed: int, lives_s: Mapping[bool, float]) -> Sequence[Fault]:
    """Jobs on one to three machines; a sixth of them as programs, an eighth on emulated machines.

    Args:
        lives_s: seconds that a job lives, whose ranks are programs (True) or forked.
    """
    rng = random.Random(seed)
    faults = []
    for number in range(count):
        programs = number % 6 == 5
        job = life(number, programs, rng)
        victim, share = rng.randrange(job.ranks), rng.random()
        faults.append(
            replace(
                job,
                name=job.name.replace("life", "kill") + f", rank {victim} at {share:.3f} of its life",
                expected="exact or an error on every survivor",
                outside=partial(killed_at, victim=victim, moment_s=share * lives_s[programs]),
            )
        )
    return faults
