"""One copy of the large weights for all ranks of a machine, where each of them would hold its own.

The copy lies in files without a name (runtime/wires/shared_files.py), which every rank maps privately: pages that
nobody has written to are the machine's, and a rank that writes gets its own copy of those that it touches. So a weight
means what it meant before, ``load_state_dict`` and LoRA fusing too: no rank ever sees another rank's write, and one
that writes what the others do not is found by the same comparison as with whole weights. All that a write costs is
memory, until the ranks share what they hold now (:meth:`SharedWeights.share`).

Ranks share what is equal on all of them to the last bit, and look before they do.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from sfcompile.errors import RankMismatchError, StreamFusionError, WeightsError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import LARGE_BYTES
from sfcompile.runtime.rank.calls import fingerprint
from sfcompile.runtime.wires.shared_files import Place, failures, in_words, no_room, opened, shared_file
from sfcompile.torch_private import is_comparable, is_of_torch, storage_users

log = logging.getLogger("sfcompile")
BUNDLE_BYTES = 64 << 20
"""So much is shared at a time, or one weight: what a machine holds twice for a moment."""
_EVERY_S = 5.0
"""So often rank 0 says how far it has come."""
BUNDLE_FILES = 64
"""And so many files are open at a time."""
_WHY = "the ranks of a machine hold one copy of the large weights, in memory that they share"
_NO_ROOM = "enlarge /dev/shm to hold the weights once (docker: --shm-size), or use options={'weights': 'whole'}"
_NOT_SHARED = (
    "run the ranks of a machine as one user, in one container or in containers that share their process ids (docker: "
    "--pid), or use options={'weights': 'whole'}"
)
_SMALL = f"below {in_words(LARGE_BYTES)}"
_NO_WORDS = "its class, layout or dtype is not a plain tensor's"
_OTHERS = "other tensors lie in its memory, such as a state_dict that the program keeps"
_OBSTACLES = ("", _SMALL, _NO_WORDS, _OTHERS)
"""Ranks tell each other which."""


class Ranks(Protocol):
    """What sharing needs of a session."""

    rank: int
    topology: Topology

    def exchange(self, value: Any, doing: str) -> list[Any]:
        """Collective: every rank's value, by rank."""


class MachineCopy(NamedTuple):
    """Bytes of which each machine is to hold one copy.

    Attributes:
        name: for errors.
        fill: writes them into a uint8 tensor of ``nbytes``; on one rank of each machine.
        equal: whether this rank's own bytes are those in a uint8 tensor; None: it has none.
        take: is given them, as a uint8 tensor with a storage of its own.
    """

    name: str
    nbytes: int
    fill: Callable[[torch.Tensor], None]
    equal: Callable[[torch.Tensor], bool] | None
    take: Callable[[torch.Tensor], None]


class _Placed(NamedTuple):
    """Where a weight lay when it was shared, and what it held: elsewhere or with other values it no longer is."""

    ranks: weakref.ref[Ranks]
    memory: int
    mark: int


_placed: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By tensor."""


class SharedWeights:
    """The weights of one compiled graph, of which the ranks of a machine hold the large ones once.

    Several models may share the graph. Whether ranks meet to share anew must not depend on what one of them alone
    knows: it depends on fingerprints, which every call compares, and on what they told each other when they met.

    Attributes:
        names: of the weights, for errors.
        line: how much is shared, for the report.
    """

    def __init__(self, ranks: Ranks, names: Sequence[str]) -> None:
        self._ranks, self._names = ranks, tuple(names)
        self._shared: set[int] = set()  # fingerprints of models whose weights are shared as they are
        self._before: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by a model's first weight: the one shared last
        self.line = ""

    def share(self, weights: Sequence[torch.Tensor], mark: int | None = None) -> int:
        """Collective: share what is not shared yet, or was written to; how many weights that were.

        Args:
            mark: the fingerprint of the weights; None: it is taken.

        Raises:
            WeightsError, RankMismatchError: see :func:`share_copies`.
        """
        ranks, before = self._ranks, self._before.get(weights[0]) if weights else None
        mine = [
            (_OBSTACLES.index(obstacle_of(weight)), is_placed(ranks, weight), _nbytes(weight)) for weight in weights
        ]
        everyone = ranks.exchange((before, mine), "see which weights they can share")
        if len({tuple(size for *_, size in its) for _, its in everyone}) > 1:
            raise on_all(
                RankMismatchError(
                    "the ranks hold weights of other sizes or in another order",
                    "they would share one copy of them",
                    "make and load the model in the same way on every rank",
                    rank=ranks.rank,
                )
            )
        # What one rank cannot share stays whole on all; what one rank does not share yet is shared anew by all.
        by_weight = list(zip(*(its for _, its in everyone), strict=True))
        obstacles = [_OBSTACLES[max(obstacle for obstacle, *_ in its)] for its in by_weight]
        here = [all(its_placed for _, its_placed, _ in its) for its in by_weight]
        chosen = [i for i, text in enumerate(obstacles) if not text and not here[i]]
        share_copies(ranks, [_copy_of(ranks, self._names[i], weights[i]) for i in chosen])
        if len({its_before for its_before, _ in everyone}) == 1:  # that model now holds something else
            self._shared.discard(before)
        mark = fingerprint(weights) if mark is None else mark
        self._shared.add(mark)
        if weights:
            self._before[weights[0]] = mark
        line = _line(ranks, weights, obstacles)
        if set(obstacles) - {"", _SMALL} and line != self.line:
            log.warning("weights that cannot be shared: %s", line)
        self.line = line
        return len(chosen)

    def share_again(self, mark: int, weights: Sequence[torch.Tensor]) -> None:
        """Collective, at the end of a call: share the weights of a model that is new here or was written to.

        Args:
            mark: fingerprint of the weights that the call ran with. Every chunk of the call carried it, so the ranks
                that come here hold the same, and come at the same call.

        Raises:
            WeightsError, RankMismatchError: see :func:`share_copies`.
        """
        if mark in self._shared:
            return
        began = time.perf_counter()
        count = self.share(weights, mark)
        if count:
            log.info("%d weights, new or written to, shared in %.1f s", count, time.perf_counter() - began)


def obstacle_of(weight: torch.Tensor) -> str:
    """Why a weight stays each rank's own; "" if it can be shared."""
    if _nbytes(weight) < LARGE_BYTES:
        return _SMALL
    if not is_comparable(weight) or not is_of_torch(weight):
        return _NO_WORDS
    if weight.untyped_storage().nbytes() != _nbytes(weight) or storage_users(weight) > 1:
        return _OTHERS  # they would keep the old memory, and be cut off from the weight
    return ""


def is_placed(ranks: Ranks, weight: torch.Tensor) -> bool:
    """Whether a weight still lies where it was shared with these ranks, with what it held."""
    before: _Placed | None = _placed.get(weight)
    if before is None or before.ranks() is not ranks or before.memory != weight.data_ptr():
        return False
    return before.mark == fingerprint([weight])


def place(ranks: Ranks, weight: torch.Tensor, memory: torch.Tensor) -> None:
    """Give a weight the bytes of ``memory`` for its own: it stays the same tensor, with the same strides."""
    with torch.inference_mode(weight.is_inference()):
        weight.data = lying_in(memory, weight.dtype, weight.shape, weight.stride())
    placed(ranks, weight)


def lying_in(
    memory: torch.Tensor, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int] | None = None
) -> torch.Tensor:
    """A tensor, contiguous unless ``strides`` are given, in the storage of ``memory``: no view of it, which would count
    as another tensor that lies there."""
    value = torch.empty(0, dtype=dtype)
    return value.set_(memory.untyped_storage(), 0, shape, strides or torch.empty(shape, device="meta").stride())


def placed(ranks: Ranks, weight: torch.Tensor) -> None:
    """From now on a weight counts as shared, until it is written to or lies elsewhere."""
    _placed[weight] = _Placed(weakref.ref(ranks), weight.data_ptr(), fingerprint([weight]))


def _copy_of(ranks: Ranks, name: str, weight: torch.Tensor) -> MachineCopy:
    """All of a weight's storage, looked up when it is needed: a copy keeps no old memory."""

    def fill(memory: torch.Tensor) -> None:
        memory.copy_(_storage_of(weight))

    def equal(memory: torch.Tensor) -> bool:
        return torch.equal(memory, _storage_of(weight))

    def take(memory: torch.Tensor) -> None:
        place(ranks, weight, memory)

    return MachineCopy(name, weight.untyped_storage().nbytes(), fill, equal, take)


def _storage_of(weight: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage())


def _nbytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


def _line(ranks: Ranks, weights: Sequence[torch.Tensor], obstacles: Sequence[str]) -> str:
    """What is shared and what is not, and why."""
    sizes = [_nbytes(weight) for weight in weights]
    neighbours = sum(ranks.topology.same_machine(rank, ranks.rank) for rank in range(ranks.topology.num_ranks))
    shared = sum(size for size, text in zip(sizes, obstacles, strict=True) if not text)
    line = f"{in_words(shared)} of {in_words(sum(sizes))} lie once for the {neighbours} ranks of a machine"
    for reason in dict.fromkeys(text for text in obstacles if text):
        left = [size for size, text in zip(sizes, obstacles, strict=True) if text == reason]
        line += f"; {len(left)} ({in_words(sum(left))}) are each rank's own: {reason}"
    return line


def share_copies(ranks: Ranks, copies: Sequence[MachineCopy]) -> None:
    """Collective: every copy lies once on every machine, and all its ranks have taken it.

    The ranks of a machine take turns in filling. What was taken before an error stays taken: it is right.

    Args:
        copies: the same on every rank, but for what they call.

    Raises:
        WeightsError: no room, memory that cannot be shared, or a ``fill`` that raised it; on every rank.
        RankMismatchError: the bytes of some rank are others; on every rank.
    """
    neighbours = [rank for rank in range(ranks.topology.num_ranks) if ranks.topology.same_machine(rank, ranks.rank)]
    total, shared, said = sum(copy.nbytes for copy in copies), 0, time.monotonic()
    for number, bundle in enumerate(_bundles(copies)):
        _share_bundle(ranks, neighbours[number % len(neighbours)], bundle)
        shared += sum(copy.nbytes for copy in bundle)
        if time.monotonic() - said > _EVERY_S:
            said = time.monotonic()
            log.info("weights: %s of %s lie once for every machine", in_words(shared), in_words(total))


def _bundles(copies: Sequence[MachineCopy]) -> Iterator[list[MachineCopy]]:
    """Copies that are shared together: of BUNDLE_BYTES at most, or one larger one, and BUNDLE_FILES."""
    bundle, nbytes = list[MachineCopy](), 0
    for copy in copies:
        if bundle and (nbytes + copy.nbytes > BUNDLE_BYTES or len(bundle) == BUNDLE_FILES):
            yield bundle
            bundle, nbytes = [], 0
        bundle.append(copy)
        nbytes += copy.nbytes
    if bundle:
        yield bundle


def _share_bundle(ranks: Ranks, owner: int, bundle: Sequence[MachineCopy]) -> None:
    """Every copy in a file of its own, whose memory is free again when the weight that lies there is."""
    places, memories, problem = list[tuple[int, ...]](), list[torch.Tensor](), ""
    with ExitStack() as held:
        if ranks.rank == owner:
            try:
                for copy in bundle:
                    place = held.enter_context(shared_file(copy.nbytes))
                    copy.fill(_bytes(mmap.mmap(place.fd, copy.nbytes)))
                    # That mapping has ended: from now on nobody can write to the file.
                    memories.append(_map(place.fd, copy))
                    places.append(tuple(place))
            except (OSError, OverflowError) as error:
                problem = no_room(f"a weight of {in_words(copy.nbytes)}", error)
            except WeightsError as error:
                problem = error.what
        everyone = ranks.exchange((problem, places), "share their weights")
        _refuse(ranks, [text for text, _ in everyone], _NO_ROOM)
        different = list[str]()
        if ranks.rank != owner:
            try:
                for copy, facts in zip(bundle, everyone[owner][1], strict=True):
                    with opened(Place(*facts), os.O_RDONLY) as fd:
                        memories.append(_map(fd, copy))
                    if copy.equal is not None and not copy.equal(memories[-1]):
                        different.append(copy.name)
            except OSError as error:
                problem = f"the memory of rank {owner} on this machine cannot be mapped ({error})"
        answers = ranks.exchange((problem, different[:3]), "map their weights")
    _refuse(ranks, [text for text, _ in answers], _NOT_SHARED)
    _refuse_different(ranks, [names for _, names in answers])
    for copy in bundle:
        copy.take(memories.pop(0))


def _map(fd: int, copy: MachineCopy) -> torch.Tensor:
    """Private memory with a file's bytes: a page is the file's until it is written to."""
    return _bytes(mmap.mmap(fd, copy.nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE))


def _bytes(memory: mmap.mmap) -> torch.Tensor:
    """All of a mapping, which stays as long as the tensor's storage."""
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8)


def _refuse(ranks: Ranks, problems: Sequence[str], fix: str) -> None:
    failed = failures(problems)
    if failed:
        raise on_all(WeightsError(failed, _WHY, fix, rank=ranks.rank))


def _refuse_different(ranks: Ranks, names: Sequence[Sequence[str]]) -> None:
    odd = [rank for rank, its in enumerate(names) if its]
    if odd:
        raise on_all(
            RankMismatchError(
                f"weights differ between the ranks of a machine: {', '.join(names[odd[0]])} of rank {odd[0]}",
                "the ranks would hold one copy of their weights, so all must have the same values to the last bit",
                "load or seed the same weights on every rank",
                rank=ranks.rank,
                peer=odd[0],
            )
        )


def on_all(error: StreamFusionError) -> StreamFusionError:
    """An error that every rank raises at this point."""
    error.on_every_rank = True
    return error
