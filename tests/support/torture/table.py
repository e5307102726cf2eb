"""The table of faults: what a fault is, and all of them by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torture.job import Job

TIMEOUT_S = 4.0
"""``timeout_s`` of most faults: what they wait for must not come by itself on a busy machine."""

_table: dict[str, Fault] = {}


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        work: what every rank runs, ``work(rank, *args)``; importable by name.
        expected: for the table, in words; what must hold is said at each attempt (rank.py).
        ranks: how many ranks the job has.
        machines: GROUP_RANK of each; None: all on one.
        rate: uplink of emulated machines, one network namespace each (root); None: no namespaces.
        timeout_s: the option, in seconds.
        limit_s: a rank that has not ended so many seconds after the start of the job hangs.
        outside: what is done to the job meanwhile, by the harness.
        small_shm: bytes of /dev/shm for this job (root); None: as it is.
        own_shm: every rank has a /dev/shm of its own, as in containers (root).
        programs: ranks are started as programs, which import by themselves.
        outputs: what may stay in the job's folder.
        quick: runs in ``make test``.
    """

    name: str
    kind: str
    work: Callable[..., None]
    expected: str
    args: tuple[Any, ...] = ()
    ranks: int = 2
    machines: tuple[int, ...] | None = None
    rate: str | None = None
    timeout_s: float = TIMEOUT_S
    limit_s: float = 45.0
    outside: Callable[[Job], None] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    small_shm: int | None = None
    own_shm: bool = False
    programs: bool = False
    outputs: tuple[str, ...] = ()
    quick: bool = False

    @property
    def needs_root(self) -> bool:
        """Namespaces and mounts are for root."""
        return self.rate is not None or self.small_shm is not None or self.own_shm


def fault(expected: str, name: str | None = None, **how: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put a function into the table, under its own name unless ``name`` says another; several times if asked to."""

    def enter(work: Callable[..., None]) -> Callable[..., None]:
        called = name or work.__name__
        assert called not in _table, called
        _table[called] = Fault(called, work.__module__.rpartition(".")[2], work, expected, **how)
        return work

    return enter


def fault_modules() -> list[str]:
    """Every module of faults."""
    package = importlib.import_module("torture.faults")
    return sorted(f"torture.faults.{module.name}" for module in pkgutil.iter_modules(package.__path__))


def all_faults() -> list[Fault]:
    """The table, in its order: by kind, then as written."""
    for module in fault_modules():
        importlib.import_module(module)
    return list(_table.values())
