"""What carries chunks between GPU ranks: the first layer that starts on all of them, and why not the ones before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar

from sfcompile.errors import StreamFusionError, UnsupportedError

LAYERS = {
    "nvshmem": "one-sided puts between all ranks, from kernels and from streams",
    "symm_mem": "stores between GPUs of a machine that map each other's memory, NCCL's messages between machines",
    "nccl": "messages between all ranks",
}
"""Values of ``transport`` for GPU ranks, in the order in which "auto" tries them, and what each is."""

S = TypeVar("S")


class Chosen(NamedTuple, Generic[S]):
    """A layer that has started.

    Attributes:
        side: what its attempt returned.
        line: its name, and why it and none before it, for reports.
    """

    name: str
    side: S
    line: str


def choose_layer(asked: str, attempts: Mapping[str, Callable[[], S]]) -> Chosen[S]:
    """Collective: start a layer.

    Args:
        asked: one of LAYERS, or "auto".
        attempts: by name, in order, what starts a layer. Each fails on every rank or on none (together.py).

    Raises:
        StreamFusionError: the layer that was asked for does not start, or a rank has gone.
        UnsupportedError: none starts.
    """
    if asked != "auto":
        return Chosen(asked, attempts[asked](), f"{asked} (asked for): {LAYERS[asked]}")
    problems: list[str] = []
    for name, attempt in attempts.items():
        try:
            side = attempt()
        except StreamFusionError as error:
            if not error.on_every_rank:
                raise  # the others may be elsewhere: no further attempt would find them
            problems.append(f"not {name}: {error.what}")
            continue
        return Chosen(name, side, f"{name}: {'; '.join([LAYERS[name], *problems])}")
    failure = UnsupportedError(
        f"nothing carries chunks between the GPU ranks ({'; '.join(problems)})",
        "the ranks compute one model together and exchange its tokens",
        "mend one of these; `sfcompile doctor` says what is missing",
    )
    failure.on_every_rank = True
    raise failure
