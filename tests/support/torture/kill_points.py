"""Random kill points: a whole life of a job, and one of its ranks killed at a random moment of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from model_cases import Plain, tokens

from torture.job import Job
from torture.rank import Rank
from torture.table import TIMEOUT_S, Fault

LIFE_S = 4.5
"""How long a forked rank lives, about; a program imports for as long before."""


def whole_life(rank: Rank) -> None:
    """Compile, some calls, a second length, a package, its calls, the end. A rank stops at its first error."""
    from sfcompile.package.export import export
    from sfcompile.package.load import load

    model = Plain()
    run = rank.compiled(model)

    def all_of_it() -> None:
        for step in range(3):
            rank.note("step", number=step)
            close(rank, run(tokens() + step), model(tokens() + step))
        path = rank.folder / "model.sf"
        if rank.number == 0:
            export(model, (tokens(),), {}, path, topology=f"1x{rank.ranks}", placement="shard", inner="eager")
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


def kill_points(count: int, seed: int) -> Sequence[Fault]:
    """Jobs on one to three machines; a sixth of them as programs, some on emulated machines."""
    rng = random.Random(seed)
    faults = []
    for number in range(count):
        machines = rng.choice([(0, 0), (0, 0, 0), (0, 1), (0, 0, 1), (0, 1, 2)])
        programs, emulated = number % 6 == 5, number % 8 == 7
        victim = rng.randrange(len(machines))
        moment_s = rng.uniform(0.0, LIFE_S * (2.5 if programs else 1.0))
        where = "emulated machines" if emulated else "machines"
        faults.append(
            Fault(
                f"kill {number}: rank {victim} of {len(machines)} on {len(set(machines))} {where} "
                f"at {moment_s:.2f} s{' as programs' if programs else ''}",
                "kill_points",
                whole_life,
                "exact or an error on every survivor",
                ranks=len(machines),
                machines=machines,
                rate="1gbit" if emulated else None,
                timeout_s=TIMEOUT_S,
                limit_s=60.0,
                outside=partial(killed_at, victim=victim, moment_s=moment_s),
                programs=programs,
                outputs=("model.sf",),
            )
        )
    return faults
