"""Messages of chosen sizes between the ranks of a session, sent as a model's are: by proved schedules."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch

from sfcompile.codegen.proof.checker import check
from sfcompile.codegen.schedule.exchange import ExchangeSchedule, build_exchange
from sfcompile.codegen.schedule.mesh import Mesh
from sfcompile.codegen.schedule.schedule import Schedule, lay_out
from sfcompile.measuring.estimate import Matrix
from sfcompile.runtime.program.instructions import Arrival, Chunk, Put, RankProgram, Wait
from sfcompile.runtime.program.phases import EXCHANGE_FINISH, EXCHANGE_START
from sfcompile.runtime.program.sites import ExchangeSite, nbytes
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import Session

LANES = 2
"""So many messages of one size may be under way: as many as the heap has banks."""
_PROGRAM = "measure links"
_VALUES = 2


def is_even(topology: Topology) -> bool:
    """Whether machines have equal numbers of ranks."""
    return len({len(topology.ranks_of(machine)) for machine in set(topology.machine_of)}) == 1


def goes_round(topology: Topology) -> bool:
    """Whether in shifts every rank that sends a message gets one of a rank that waits for it: rounds then take as long
    as a message does. Else some ranks run ahead of others."""
    return is_even(topology) or topology.num_ranks % 2 == 0


def _steps(topology: Topology, across: bool) -> tuple[Mesh, int]:
    """A mesh, and the offset in it from a rank to the one that sends to it."""
    ranks = topology.num_ranks
    if is_even(topology):
        mesh = Mesh.of(topology, topology.num_machines, ranks // topology.num_machines)
        return mesh, mesh.offset(1, 0) if across else mesh.offset(0, 1)
    if ranks % 2:
        mesh = Mesh.of(topology, 1, ranks)
        return mesh, mesh.offset(0, ranks // 2 if across else 1)
    pairs = _pairs(topology, across)
    mesh = Mesh(1, ranks, tuple(first for first, _ in pairs) + tuple(second for _, second in pairs))
    return mesh, mesh.offset(0, ranks // 2)


def _pairs(topology: Topology, across: bool) -> list[tuple[int, int]]:
    """Every rank with one of its machine, or of another, as far as there are any; the rest as it happens."""
    left = [list(topology.ranks_of(machine)) for machine in sorted(set(topology.machine_of))]
    pairs = []
    while across and sum(map(bool, left)) > 1:
        left.sort(key=len, reverse=True)
        pairs.append((left[0].pop(0), left[1].pop(0)))
    for ranks in left:
        while len(ranks) > 1:
            pairs.append((ranks.pop(0), ranks.pop(0)))
    single = [ranks[0] for ranks in left if ranks]
    return pairs + list(zip(single[::2], single[1::2], strict=True))


def sources(topology: Topology, across: bool) -> tuple[int | None, ...]:
    """By rank, who sends to it in a shift; None: nobody."""
    mesh, step = _steps(topology, across)
    senders = [mesh.rank_after(rank, step) for rank in range(topology.num_ranks)]
    return tuple(
        src if src != rank and topology.same_machine(src, rank) != across else None for rank, src in enumerate(senders)
    )


def shift(topology: Topology, across: bool, floats: int, keeps: bool = True) -> ExchangeSchedule:
    """Every rank sends a chunk to the next rank of its machine, or to its peer on the next machine.

    Where machines have unequal numbers of ranks, pairs of ranks send to each other, and some ranks have no partner. Of
    an odd number of ranks no such pairs can be made: then some only send, some only receive.

    Args:
        keeps: a rank's own chunk is moved to a place of its own, too.
    """
    ranks = topology.num_ranks
    mesh, step = _steps(topology, across)
    wanted = []
    for rank, src in enumerate(sources(topology, across)):
        sent = set() if src is None else {src}
        wanted.append(tuple((row, 1) for row in sorted(sent | ({rank} if keeps else set()))))
    owned = tuple(((rank, 1),) for rank in range(ranks))
    site = ExchangeSite("shift", (ranks, floats), torch.float32, 0, 1, 1, owned, 0, tuple(wanted))
    origin = RankProgram(
        0,
        {EXCHANGE_START: (Put("x", 0, mesh.back(step), 0),), EXCHANGE_FINISH: (Wait(0, step),)},
        (Arrival(0, step, "x", Chunk(step)),),
    )
    return ExchangeSchedule("shift", site, mesh, lay_out([("x", nbytes((floats,), torch.float32))]), origin)


class Shifts:
    """Shifts of some sizes, loaded into a session while the context lasts; all methods are collective.

    Args:
        sizes: of messages, in floats, inside machines and (``across``) between them.

    Attributes:
        device: where messages lie.
    """

    def __init__(self, session: Session, inside: Sequence[int], across: Sequence[int]) -> None:
        self.device = session.side.device
        self._session = session
        self._places: dict[tuple[bool, int], int] = {}
        topology = session.topology
        rows = tuple(((rank, 1),) for rank in range(topology.num_ranks))
        meeting = ExchangeSite.gather("meet", (topology.num_ranks, _VALUES), torch.float64, 0, rows)
        self._schedules: list[Schedule] = [build_exchange(meeting, Mesh.of(topology, 1, topology.num_ranks))]
        for is_across, floats in [*((False, n) for n in inside), *((True, n) for n in across)]:
            self._places[is_across, floats] = len(self._schedules)
            self._schedules += [shift(topology, is_across, floats, keeps=False)] * LANES
        self._tensors: dict[tuple[bool, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __enter__(self) -> Shifts:
        for at in (0, *self._places.values()):
            check(self._schedules[at])
        self._session.load(_PROGRAM, self._schedules)
        for key, at in self._places.items():
            site = self._schedules[at].site
            assert isinstance(site, ExchangeSite)
            chunk = torch.zeros(1, key[1], device=self.device, dtype=torch.float32)
            out = torch.zeros(site.wanted_shape(self._session.rank), device=self.device, dtype=torch.float32)
            self._tensors[key] = chunk, out
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.forget(_PROGRAM)

    def put(self, across: bool, floats: int, lane: int = 0) -> None:
        """Begin a shift; at most LANES are open at a time, each in a lane of its own."""
        chunk, _ = self._tensors[across, floats]
        self._session.put(_PROGRAM, self._places[across, floats] + lane, EXCHANGE_START, chunk)

    def receive(self, across: bool, floats: int, lane: int = 0) -> None:
        """End it: this rank's message has come (on a GPU: has been seen to come by its stream)."""
        _, out = self._tensors[across, floats]
        self._session.receive(_PROGRAM, self._places[across, floats] + lane, out)
        self.synchronize()

    def comes(self, across: bool, floats: int) -> bool:
        """Whether this rank gets a message in such a shift."""
        return self._tensors[across, floats][1].numel() > 0

    def goes(self, across: bool) -> bool:
        """Whether it sends one."""
        return self._session.rank in sources(self._session.topology, across)

    def put_word(self, first: float, second: float) -> None:
        """Begin to tell all ranks two numbers; takes one of the LANES messages that may be open."""
        own = torch.tensor([[first, second]], dtype=torch.float64).to(self.device)
        self._session.put(_PROGRAM, 0, EXCHANGE_START, own)

    def receive_word(self) -> Matrix:
        """What all ranks told, [ranks, 2], the same on every rank."""
        everyone = torch.empty(self._session.topology.num_ranks, _VALUES, dtype=torch.float64, device=self.device)
        self._session.receive(_PROGRAM, 0, everyone)
        return np.array(everyone.cpu().numpy())

    def meet(self, first: float = 0.0, second: float = 0.0) -> Matrix:
        """Two numbers of every rank, [ranks, 2]; all ranks come back within a message's time."""
        self.put_word(first, second)
        return self.receive_word()

    def synchronize(self) -> None:
        """Until the device has done what was asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
