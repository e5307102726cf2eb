"""Ranks that die, stop, fork or leave, in every phase of a job's life."""

from __future__ import annotations

import os
import signal
import sys
import time

from model_cases import Plain, tokens

from torture.faults.out_of_step import ATTEND, another
from torture.job import Job
from torture.rank import Injected, Rank
from torture.table import fault

SESSION = "sfcompile.runtime.rank.session:Session"
PHASES = {
    "before the process group": ("sfcompile.runtime.rank.process_group:ensure_process_group", 1, ""),
    "in the first meeting": ("sfcompile.runtime.rank.process_group:ProcessWorld.exchange", 1, ""),
    "before agreement": (f"{SESSION}.agree", 1, ""),
    "in a pass": ("sfcompile.backend:run_passes", 1, ""),
    "before the heap": (f"{SESSION}.load", 1, ""),
    "between heap and its mapping": ("sfcompile.runtime.rank.process_group:ProcessWorld.exchange", 1, "heap"),
    "before the first run": (f"{SESSION}.meet", 1, ""),
    "at the first put": (f"{SESSION}.put", 1, ""),
    "between puts": (f"{SESSION}.put", 2, ""),
    "at attend": (ATTEND, 1, ""),
    "between two sites": (ATTEND, 2, ""),
    "at collect": (f"{SESSION}.collect", 1, ""),
    "in a later call": (ATTEND, 6, ""),
}
"""Phase -> what is about to be called for the how-manieth time, with which text among its arguments."""


def dies_in(rank: Rank, victim: int, phase: str, number: int = signal.SIGKILL) -> None:
    """A rank is killed in a phase; the others go on until they are told."""
    if rank.number == victim:
        target, nth, text = PHASES[phase]
        rank.before(target, lambda: rank.die(number), nth, text)
    model = Plain()
    run = rank.compiled(model)

    def steps() -> None:
        for step in range(5):
            run(tokens() + step)

    rank.attempt("steps", steps, must="error")


for _phase in PHASES:
    for _victim in (0, 1):
        _quick = _victim == 1 and _phase == "between two sites"
        fault("an error on the survivor", name=f"rank {_victim} killed {_phase}", args=(_victim, _phase), quick=_quick)(
            dies_in
        )
fault("an error on the survivors", name="rank 1 of 3 on 3 machines killed between two sites",
      args=(1, "between two sites"), ranks=3, machines=(0, 1, 2))(dies_in)  # fmt: skip
fault("an error on the survivors", name="rank 0 of 3 on 2 machines killed in a later call",
      args=(0, "in a later call"), ranks=3, machines=(0, 1, 1))(dies_in)  # fmt: skip
fault("an error on the survivor", name="SIGTERM between two sites",
      args=(1, "between two sites", signal.SIGTERM))(dies_in)  # fmt: skip
fault("an error on the survivor", name="SIGSEGV at collect", args=(1, "at collect", signal.SIGSEGV))(dies_in)


@fault("nothing is left", name="all killed between heap and its mapping")
def all_die(rank: Rank) -> None:
    """Every rank is killed when the heap is made and not yet mapped by all."""
    rank.before("sfcompile.runtime.rank.process_group:ProcessWorld.exchange", rank.die, 1, "heap")
    model = Plain()
    rank.compiled(model)(tokens())


def _between_calls(job: Job, victim: int) -> None:
    job.await_mark(f"warm-{1 - victim}")
    job.await_mark(f"warm-{victim}")
    job.strike(victim)
    job.mark("killed")


def _calls_after_a_mark(rank: Rank, mark: str) -> None:
    run, model = rank.warm()
    rank.mark(f"warm-{rank.number}")
    rank.await_mark(mark)
    rank.call("next", run, model, must="error")
    rank.call("and again", run, model, must="error")


@fault("an error on the survivor, at every call", outside=lambda job: _between_calls(job, 1), quick=True)
def killed_between_calls(rank: Rank) -> None:
    """Rank 1 is killed while nobody calls."""
    _calls_after_a_mark(rank, "killed")


@fault("an error on the survivor, at every call", outside=lambda job: _between_calls(job, 0))
def rank_0_killed_between_calls(rank: Rank) -> None:
    """Rank 0, which keeps the store, is killed while nobody calls."""
    _calls_after_a_mark(rank, "killed")


@fault("the survivor ends", name="rank 0 killed at its close", args=(0,))
@fault("the survivor ends", name="rank 1 killed at its close", args=(1,))
def killed_at_close(rank: Rank, victim: int) -> None:
    """A rank is killed when it closes its session."""
    rank.warm()
    if rank.number == victim:
        rank.before("sfcompile.runtime.rank.session:Session.close", rank.die)


@fault("an error on the survivor", name="killed_while_importing", programs=True, timeout_s=8.0, limit_s=120.0,
       outside=lambda job: (time.sleep(1.0), job.strike(1)))  # fmt: skip
def killed_while_importing(rank: Rank) -> None:
    """Rank 1 is killed before it has imported everything."""
    model = Plain()
    rank.call("first", rank.compiled(model), model, must="error")


# ---------------------------------------------------------------------- stopped


def _stops(job: Job, victim: int, seconds: float) -> None:
    job.await_mark("stop me")
    job.strike(victim, signal.SIGSTOP, victim=False)
    job.mark("stopped")
    job.over.wait(seconds)
    job.strike(victim, signal.SIGCONT, victim=False)


@fault("exact", outside=lambda job: _stops(job, 1, 1.5), timeout_s=8.0)
def stopped_for_less_than_the_timeout(rank: Rank) -> None:
    """SIGSTOP of rank 1 in a call, and SIGCONT in time."""
    if rank.number == 1:
        rank.before(ATTEND, lambda: rank.mark("stop me"), nth=3)
    model = Plain()
    run = rank.compiled(model)
    for step in range(200):
        if rank.number == 1 and step == 3:
            rank.await_mark("stopped")
        run(tokens())
    rank.call("last", run, model)


@fault("an error on both; then exact", outside=lambda job: _stops(job, 1, 8.0))
def stopped_for_longer_than_the_timeout(rank: Rank) -> None:
    """SIGSTOP of rank 1 between calls, and SIGCONT when rank 0 has given up."""
    run, model = rank.warm()
    if rank.number == 1:
        rank.mark("stop me")
    rank.await_mark("stopped")
    rank.call("while stopped", run, model, must="error")
    rank.recovers(run, model)


def _all_stop(job: Job) -> None:
    job.await_mark("stop me")
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(job.fault.ranks):
            job.strike(rank, number, victim=False)
        job.over.wait(job.fault.timeout_s + 2.0 if number == signal.SIGSTOP else 0.0)


@fault("exact, or an error on both; then exact", outside=_all_stop)
def all_ranks_stop_for_a_while(rank: Rank) -> None:
    """The machine is suspended in a loop of calls, for longer than the timeout."""
    run, model = rank.warm()
    rank.mark("stop me")
    for step in range(40):
        rank.call("loop", run, model, tokens() + step, must="either")
        time.sleep(0.02)
    rank.recovers(run, model)


def _stops_for_good(job: Job, victim: int) -> None:
    job.await_mark("stop me")
    job.strike(victim, signal.SIGSTOP)
    job.mark("stopped")


@fault("an error on the others within the timeout", ranks=3, outside=lambda job: _stops_for_good(job, 0))
def the_store_host_stops(rank: Rank) -> None:
    """SIGSTOP of rank 0, which keeps the store, between calls, for good."""
    run, model = rank.warm()
    rank.meet("warm")
    rank.mark("stop me")
    rank.await_mark("stopped")
    rank.call("next", run, model, must="error")
    rank.call("and again", run, model, must="error")


@fault("an error on the others within the timeout", ranks=3, outside=lambda job: _stops_for_good(job, 0))
def the_store_host_stops_in_a_compile(rank: Rank) -> None:
    """SIGSTOP of rank 0 while all compile a second model."""
    run, model = rank.warm()
    second = another()
    if rank.number == 0:
        rank.before("sfcompile.backend:run_passes", lambda: (rank.mark("stop me"), time.sleep(60)))
    rank.call("second", rank.compiled(second), second, must="error")


@fault("an error on the others within the timeout", ranks=3, machines=(0, 1, 1),
       outside=lambda job: _stops_for_good(job, 0))  # fmt: skip
def the_store_host_stops_on_another_machine(rank: Rank) -> None:
    """As the_store_host_stops; the others sit on a second machine and have TCP to it."""
    the_store_host_stops(rank)


@fault("an error on the other within the timeout", outside=lambda job: _stops_for_good(job, 1))
def a_rank_stops_before_the_first_meeting(rank: Rank) -> None:
    """SIGSTOP of rank 1 when it has joined the process group and not yet met."""
    if rank.number == 1:
        rank.before(
            "sfcompile.runtime.rank.process_group:ProcessWorld.exchange",
            lambda: (rank.mark("stop me"), time.sleep(60)),
        )
    model = Plain()
    rank.call("first", rank.compiled(model), model, must="error")


# ---------------------------------------------------------------------- forks and exits


@fault("exact on every rank")
def a_forked_child_exits(rank: Rank) -> None:
    """os.fork(), and the child ends through its exit handlers, as a worker of a pool does."""
    run, model = rank.warm()
    child = os.fork()
    if child == 0:
        sys.exit(0)
    rank.call("meanwhile", run, model)
    rank.check("child", _ends(child) == 0, "the child's exit")
    rank.call("after", run, model)
    second = another()
    rank.call("a compile", rank.compiled(second), second)


@fault("an error of ours in the child; exact in the parent")
def a_forked_child_calls(rank: Rank) -> None:
    """os.fork(), and the child calls the compiled model."""
    from sfcompile.errors import StreamFusionError

    run, model = rank.warm()
    child = os.fork()
    if child == 0:
        try:
            run(tokens())
        except StreamFusionError:
            os._exit(7)
        except BaseException:
            os._exit(8)
        os._exit(9)
    rank.check("child", (code := _ends(child)) == 7, f"exit code {code}: 7 is an error of ours, 9 none")
    rank.call("after", run, model)


def _ends(child: int, limit_s: float = 15.0) -> int | None:
    """The exit code of a child; None, and it is killed, after the limit."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@fault("exact")
def workers_of_a_data_loader(rank: Rank) -> None:
    """Forked workers feed the model."""
    from torch.utils.data import DataLoader

    run, model = rank.warm()
    samples = [tokens()[0] + number for number in range(4)]
    for number, batch in enumerate(DataLoader(samples, batch_size=2, num_workers=2)):  # type: ignore[arg-type]
        rank.call(f"batch {number}", run, model, batch)


@fault("an error on the others, which does not speak of memory", ranks=3, name="a rank ends by ValueError",
       args=("error",))  # fmt: skip
@fault("an error on the others, which does not speak of memory", ranks=3, name="a rank ends by sys.exit",
       args=("exit",))  # fmt: skip
@fault("an error on the others, which does not speak of memory", ranks=3, name="a rank comes to its script's end",
       args=("end",))  # fmt: skip
def a_rank_leaves_early(rank: Rank, how: str) -> None:
    """Rank 1 leaves between two calls."""
    run, model = rank.warm()
    if rank.number == 1:
        rank.strike()
        if how == "error":
            raise ValueError("a mistake in the user's script")
        if how == "exit":
            sys.exit(3)
        return
    told: list[str] = []

    def call() -> None:
        try:
            run(tokens())
        except Exception as error:
            told.append(str(error))
            raise

    rank.attempt("without it", call, must="error")
    rank.check("cause", "out of memory" not in " ".join(told), " ".join(told))


@fault("SystemExit on one, an error on the others", ranks=3)
def sys_exit_inside_a_call(rank: Rank) -> None:
    """A callback of rank 1 calls sys.exit in the middle of a call."""
    run, model = rank.warm()
    if rank.number == 1:
        rank.before(ATTEND, lambda: sys.exit(3))
    rank.call("exit", run, model, must="error", own=(SystemExit, Injected))
