"""What carries chunks between GPU ranks: the first that starts on all of them, and why not the ones before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from sfcompile.errors import StreamFusionError, UnsupportedError

CARRIERS = {
    "nvshmem": "one-sided puts between all ranks, from kernels and from streams",
    "symm_mem": "stores between GPUs of a machine that map each other's memory, NCCL's messages between machines",
    "nccl": "messages between all ranks",
}
"""Values of ``transport`` for GPU ranks, in the order in which "auto" tries them, and what each is."""

S = TypeVar("S")


class Started(NamedTuple, Generic[S]):
    """A carrier that has started.

    Attributes:
        side: what its attempt returned.
        line: its name, and why it and none before it, for reports.
    """

    name: str
    side: S
    line: str


def choose_carrier(asked: str, attempts: Mapping[str, Callable[[], S]]) -> Started[S]:
    """Collective: start a carrier.

    Args:
        asked: one of CARRIERS, or "auto".
        attempts: by name, in order, what starts a carrier. Each fails on every rank or on none (together.py).

    Raises:
        StreamFusionError: the carrier that was asked for does not start, or a rank has gone.
        UnsupportedError: none starts.
    """
    if asked != "auto":
        return Started(asked, attempts[asked](), f"{asked} (asked for): {CARRIERS[asked]}")
    problems: list[str] = []
    for name, attempt in attempts.items():
        try:
            side = attempt()
        except StreamFusionError as error:
            if not error.on_every_rank:
                raise  # the others may be elsewhere: no further attempt would find them
            problems.append(f"not {name}: {error.what}")
            continue
        return Started(name, side, f"{name}: {'; '.join([CARRIERS[name], *problems])}")
    failure = UnsupportedError(
        f"nothing carries chunks between the GPU ranks ({'; '.join(problems)})",
        "the ranks compute one model together and exchange its tokens",
        "mend one of these; `sfcompile doctor` says what is missing",
    )
    failure.on_every_rank = True
    raise failure
