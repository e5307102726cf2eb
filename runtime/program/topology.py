"""Machines, ranks, links, and what each can do per second: the only place where constants of hardware live."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import tomli_w

from sfcompile.errors import TopologyError
from sfcompile.runtime.program.presets import PRESETS, SOFTWARE

_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)(?::(.+))?")
_MAY_BE_ZERO = {"local_latency_s", "network_latency_s", "launch_s", "message_s", "wait_s", "pairing_s", "slowdown"}

_MAY_BE_INFINITE = {"copy_bytes_per_s", "touch_bytes_per_s", "attention_flops_per_s", "pair_bytes_per_s"}


@dataclass(frozen=True)
class Topology:
    """Which machine every rank sits on, and what one rank can compute and move. Seconds, bytes, FLOPs per second.

    Attributes:
        machine_of: machine index of each rank.
        flops_per_s: matmul rate of one rank.
        memory_bytes_per_s: streaming rate of one rank's memory.
        local_bytes_per_s, local_latency_s: one rank's port to the others of its machine, each way.
        network_bytes_per_s, network_latency_s: one network card, each way, shared by the ranks behind it.
        nics_per_machine: network cards; the ranks of a machine are dealt over them in contiguous groups.
        attention_flops_per_s: rate of one rank inside attention; None: ``flops_per_s``.
        attention_rows: query rows (batch x heads x queries) of one call at which attention reaches half its rate.
        launch_s: start of one attention call.
        message_s: what the sender computes with is busy for so long per message (several to one peer in a row: once).
        copy_bytes_per_s: rate at which it copies the message's bytes itself; None: another engine copies.
        touch_bytes_per_s: rate at which it moves bytes that come from or go to another machine; None: others do.
        wait_s: cost of one wait that finds its chunk there.
        pairing_s: two-sided messages only: sender and receiver meet for so long before bytes flow (in a row: once).
        slowdown: two-sided messages only: part of the compute rate lost while one of them is under way.
        two_sided_rate: two-sided messages only: part of a link's bandwidth that they reach.
        pair_bytes_per_s: two-sided messages only: most that one rank sends to one other machine's rank at a time (an
            exchange with many at once fills the card); None: no such limit.
        software: whose costs of software (presets.py) are only assumed here; empty: all constants are somebody's own.
    """

    machine_of: tuple[int, ...]
    flops_per_s: float = 5e10
    memory_bytes_per_s: float = 1e10
    local_bytes_per_s: float = 5e9
    local_latency_s: float = 5e-5
    network_bytes_per_s: float = 1.25e9
    network_latency_s: float = 2e-4
    nics_per_machine: int = 1
    attention_flops_per_s: float | None = None
    attention_rows: float = 0.0
    launch_s: float = 5e-5
    message_s: float = 3e-5
    copy_bytes_per_s: float | None = 5e9
    touch_bytes_per_s: float | None = None
    wait_s: float = 1e-5
    pairing_s: float = 1e-4
    slowdown: float = 0.0
    two_sided_rate: float = 1.0
    pair_bytes_per_s: float | None = None
    software: str = ""

    @property
    def num_ranks(self) -> int:
        """Ranks of the job: the world size of torch.distributed."""
        return len(self.machine_of)

    @property
    def num_machines(self) -> int:
        """How many machines have a rank; their numbers need not be consecutive."""
        return len(set(self.machine_of))

    @property
    def of_gpus(self) -> bool:
        """Whether ranks are GPUs: another engine than the one that computes moves what they send."""
        return self.copy_bytes_per_s is None

    def ranks_of(self, machine: int) -> tuple[int, ...]:
        """Ranks of a machine, ascending."""
        return tuple(rank for rank, home in enumerate(self.machine_of) if home == machine)

    def same_machine(self, a: int, b: int) -> bool:
        """Whether two ranks share memory."""
        return self.machine_of[a] == self.machine_of[b]

    def nic_of(self) -> tuple[int, ...]:
        """Network card of each rank, numbered over all machines."""
        cards: dict[int, int] = {}
        for index, machine in enumerate(sorted(set(self.machine_of))):
            ranks = self.ranks_of(machine)
            share = -(-len(ranks) // self.nics_per_machine)
            cards.update({rank: index * self.nics_per_machine + i // share for i, rank in enumerate(ranks)})
        return tuple(cards[rank] for rank in range(self.num_ranks))

    def subset(self, ranks: tuple[int, ...]) -> Topology:
        """The same hardware seen by some ranks only, renumbered in the given order."""
        return self.on(tuple(self.machine_of[rank] for rank in ranks))

    def with_constants(self, constants: Mapping[str, Any]) -> Topology:
        """The same ranks with other constants, by name; who knows costs of software no longer assumes them."""
        known = not SOFTWARE.get(self.software, {}).keys().isdisjoint(constants)
        return replace(self, **{"software": "" if known else self.software, **constants})

    def on(self, machine_of: tuple[int, ...]) -> Topology:
        """The same constants for other ranks."""
        return replace(self, machine_of=machine_of)

    @classmethod
    def grid(cls, machines: int, ranks_per_machine: int, **constants: Any) -> Topology:
        """``machines`` machines of ``ranks_per_machine`` consecutive ranks."""
        homes = tuple(rank // ranks_per_machine for rank in range(machines * ranks_per_machine))
        return cls(homes, **constants)

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read ``"NxM"``, ``"NxM:preset"``, ``"NxM:file.toml"`` or ``"file.toml"``.

        A file holds any of this class's constants by name, and ``machine_of`` or ``machines`` and
        ``ranks_per_machine``; ``NxM:`` before it overrides those. ``preset = "name"`` in it fills in the rest.

        Raises:
            TopologyError: unknown preset, a file that cannot be read, a constant that is no positive number.
        """
        match = _SHAPE.fullmatch(text)
        if match is None:
            if not text.endswith(".toml"):
                raise _unreadable(text)
            table = _read(Path(text))
            shape = _shape(table, text)
            return cls(shape, **_constants(table, f"topology file {text}"))
        shape = cls.grid(int(match[1]), int(match[2])).machine_of
        source = match[3]
        if source is None:
            return cls(shape)
        if source.endswith(".toml"):
            table = _read(Path(source))
            _drop_shape(table)
            return cls(shape, **_constants(table, f"topology file {source}"))
        return cls(shape, **_preset(source))

    @classmethod
    def constants(cls, table: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Constants by name, checked; ``source`` says in an error where they come from, and begins its sentence.

        Raises:
            TopologyError: an unknown name, or a value that is no positive number.
        """
        return _constants(dict(table), source)

    def to_toml(self) -> str:
        """What :meth:`parse` reads back."""
        table = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        if not self.software:
            del table["software"]
        return tomli_w.dumps({name: math.inf if value is None else value for name, value in table.items()})


def _unreadable(text: str) -> TopologyError:
    return TopologyError(
        f"topology {text!r} cannot be read",
        '"NxM" is N machines of M ranks; after a colon comes a preset or a .toml file',
        f'write for example "2x4", "4x8:a100-efa" or "cluster.toml"; presets: {", ".join(PRESETS)}',
    )


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        meant = f"Did you mean {close[0]!r}? " if close else ""
        raise TopologyError(
            f"topology preset {name!r} is unknown",
            f"{meant}Presets are {', '.join(PRESETS)}",
            "name one of them, or a .toml file (sfcompile doctor --measure writes one)",
        )
    return dict(PRESETS[name])


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TopologyError(
            f"topology file {path} cannot be read: {error.strerror if isinstance(error, OSError) else error}",
            "it must be a TOML file with this library's constants",
            "sfcompile doctor --measure writes one",
        ) from error


def _drop_shape(table: dict[str, Any]) -> None:
    for key in ("machine_of", "machines", "ranks_per_machine"):
        table.pop(key, None)


def _shape(table: dict[str, Any], source: str) -> tuple[int, ...]:
    homes, machines, ranks = table.get("machine_of"), table.get("machines"), table.get("ranks_per_machine")
    _drop_shape(table)
    if isinstance(homes, list) and homes and all(isinstance(home, int) and home >= 0 for home in homes):
        return tuple(homes)
    if isinstance(machines, int) and isinstance(ranks, int) and machines > 0 and ranks > 0:
        return Topology.grid(machines, ranks).machine_of
    raise TopologyError(
        f"topology file {source} does not say which ranks there are",
        "it needs machine_of = [0, 0, 1, 1], or machines = 2 and ranks_per_machine = 2",
        'add one of them, or write "2x2:' + source + '"',
    )


def _constants(table: dict[str, Any], source: str) -> dict[str, Any]:
    constants = _preset(str(table.pop("preset"))) if "preset" in table else {}
    software = str(table.pop("software", "")) or constants.get("software", "")
    if software:
        if software not in SOFTWARE:
            raise TopologyError(
                f"{source} sets software = {software!r}",
                f"known are the costs of {', '.join(SOFTWARE)}",
                "name one of them, or leave it out",
            )
        constants["software"] = software
    known = [entry.name for entry in fields(Topology) if entry.name not in ("machine_of", "software")]
    for key, value in table.items():
        if key not in known:
            raise TopologyError(
                f"{source} sets {key!r}, which is no constant of a topology",
                f"constants are {', '.join(known)}",
                "remove or rename it",
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value < 0 or (value == 0 and key not in _MAY_BE_ZERO | {"attention_rows"}):
            raise TopologyError(
                f"{source} sets {key} = {value!r}",
                "constants are positive numbers in seconds, bytes or FLOPs per second",
                "correct it",
            )
        constants[key] = int(value) if key == "nics_per_machine" else float(value)
        if key in _MAY_BE_INFINITE and value == float("inf"):
            constants[key] = None
    return constants
