"""Machines, ranks and links."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sfcompile.errors import TopologyError


@dataclass(frozen=True)
class Topology:
    """Which machine every rank sits on, and what one rank can compute and move.

    Attributes:
        machine_of: machine index of each rank.
        flops_per_s: matmul and attention rate of one rank.
        memory_bytes_per_s: streaming rate of one rank's memory.
        local_bytes_per_s, local_latency_s: link between two ranks of one machine, per rank.
        network_bytes_per_s, network_latency_s: uplink of one machine, shared by its ranks.
    """

    machine_of: tuple[int, ...]
    flops_per_s: float = 5e10
    memory_bytes_per_s: float = 1e10
    local_bytes_per_s: float = 5e9
    local_latency_s: float = 5e-5
    network_bytes_per_s: float = 1.25e9
    network_latency_s: float = 2e-4

    @property
    def num_ranks(self) -> int:
        """World size."""
        return len(self.machine_of)

    @property
    def num_machines(self) -> int:
        """Number of machines."""
        return len(set(self.machine_of))

    def ranks_of(self, machine: int) -> tuple[int, ...]:
        """Ranks of a machine, ascending."""
        return tuple(rank for rank, home in enumerate(self.machine_of) if home == machine)

    def same_machine(self, a: int, b: int) -> bool:
        """Whether two ranks share memory."""
        return self.machine_of[a] == self.machine_of[b]

    @classmethod
    def grid(cls, machines: int, ranks_per_machine: int) -> Topology:
        """``machines`` machines of ``ranks_per_machine`` consecutive ranks."""
        return cls(tuple(rank // ranks_per_machine for rank in range(machines * ranks_per_machine)))

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Read ``"NxM"``.

        Raises:
            TopologyError: anything else.
        """
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise TopologyError(
                f"topology {text!r} cannot be read",
                '"NxM" (N machines of M ranks) is known; presets and files arrive with the cost model',
                'write for example "2x4"',
            )
        return cls.grid(int(match[1]), int(match[2]))
