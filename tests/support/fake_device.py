"""GPUs without GPUs: work that is put on streams runs later, ordered only as CUDA would order it.

Ranks are threads of one process, tensors lie on the CPU. Under a :class:`Gpu` (a dispatch mode of its rank's thread)
every operation on tensors becomes a work item of the rank's current stream: its outputs hold garbage (NaN, -1) until
the item has run. Items of one stream run in order. Between streams, and between ranks, only events order them: a
scheduler picks any item that may run. Views cost nothing and are made at once; reading a value makes the host wait.

Memory follows torch's caching allocator: what the host lets go of may be written over by whatever comes next on the
stream that it was allocated on. Here garbage is what comes next.

:class:`Nccl` stands for ``torch.distributed`` with NCCL's habits: groups of messages run one after the other on a
stream of their own, begin after what the current stream holds, match by order alone, and end when all peers have come;
``work.wait()`` holds up the current stream, not the host.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch._dynamo  # here: two rank threads that import it at their first op at a time make Python's parser fail
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only

from sfcompile.runtime.wires.symmetric_heap import PLACE

POLICIES = ("any order", "messages late", "messages early")
"""Which of several items that may run does: any; those of message streams only when nothing else may, or first."""
RANK_0_LATE, STORES_LATE = "rank 0 late", "rank 0's stores late"
"""Of rank 0's main stream, or of its side stream, an item runs only when nothing else may, and who puts something on
other streams has been silent for a while."""
_LATE_STREAM = {RANK_0_LATE: "main stream of rank 0", STORES_LATE: "side stream of rank 0"}
_SILENT_S = 0.05

_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "allclose"}
_STUCK_S = 3.0
_GARBAGE = 0xFF
"""A byte of memory that nobody has written: floats of it are NaN, integers -1."""


class Event:
    """Something that has happened once everything before it on a stream has."""

    def __init__(self) -> None:
        self.happened = False


class Item(NamedTuple):
    """Work on a stream: ``run`` when ``may_run``."""

    name: str
    may_run: Callable[[], bool]
    run: Callable[[], object]


class Stream:
    """Items of a rank that run in order."""

    def __init__(self, machine: Machine, name: str, carries_messages: bool = False) -> None:
        self.name, self.carries_messages, self.items = name, carries_messages, deque[Item]()
        self._machine = machine
        machine.streams.append(self)

    def add(self, name: str, run: Callable[[], object], may_run: Callable[[], bool] = lambda: True) -> None:
        """Put an item at the end."""
        self.append(name, run, may_run)
        self._machine.run_some()

    def append(self, name: str, run: Callable[[], object], may_run: Callable[[], bool] = lambda: True) -> None:
        """Put an item at the end, and run nothing now."""
        with self._machine.changed:
            self.items.append(Item(name, may_run, run))
            self._machine.heard(self)
            self._machine.changed.notify_all()

    def record(self) -> Event:
        """An event at the end."""
        event = Event()
        self.add("record an event", lambda: setattr(event, "happened", True))
        return event

    def wait(self, event: Event) -> None:
        """What is added from now on runs after the event."""
        self.add("wait for an event", lambda: None, lambda: event.happened)


class Machine:
    """All GPUs of a test, and the scheduler that runs their items, one at a time."""

    def __init__(self, seed: int, policy: str = "any order") -> None:
        assert policy in POLICIES or policy in _LATE_STREAM
        self.streams: list[Stream] = []
        self.changed = threading.Condition(threading.RLock())
        self._rng, self._policy = random.Random(seed), policy
        self._heard_at = time.monotonic()
        self._error: BaseException | None = None

    def heard(self, stream: Stream) -> None:
        """A host has put something on a stream."""
        if stream.name != _LATE_STREAM.get(self._policy):
            self._heard_at = time.monotonic()

    def run_some(self) -> None:
        """A few items, now and then: work need not wait until the host does."""
        if self._rng.random() < 0.3:
            for _ in range(self._rng.randint(1, 4)):
                self._step()

    def synchronize(self, event: Event) -> None:
        """The host waits for an event, and items run meanwhile.

        Raises:
            TimeoutError: nothing could run for a while; says what each stream is stuck at.
        """
        end = time.monotonic() + _STUCK_S
        while not event.happened:
            if self._step():
                end = time.monotonic() + _STUCK_S
                continue
            with self.changed:
                self.changed.wait(0.01)
            if time.monotonic() > end:
                heads = [f"{stream.name}: {stream.items[0].name}" for stream in self.streams if stream.items]
                raise TimeoutError(f"nothing can run: {'; '.join(heads)}")

    def _step(self) -> bool:
        with self.changed, _disable_current_modes(), torch.no_grad():
            if self._error is not None:
                raise RuntimeError(f"the device has failed: {self._error}") from self._error
            ready = [stream for stream in self.streams if stream.items and stream.items[0].may_run()]
            if self._policy in _LATE_STREAM:
                others = [stream for stream in ready if stream.name != _LATE_STREAM[self._policy]]
                silent = time.monotonic() - self._heard_at > _SILENT_S
                ready = others or (ready if silent else [])
            elif self._policy != "any order":
                first = self._policy == "messages early"
                ready = [stream for stream in ready if stream.carries_messages == first] or ready
            if not ready:
                return False
            try:
                self._rng.choice(ready).items.popleft().run()
            except BaseException as error:
                self._error = error
                raise
            return True


class Gpu(TorchDispatchMode):
    """One rank's GPU; as a context, operations of this thread run on it.

    Attributes:
        held_bytes: of memory of this GPU that the host holds, without what a test brought; ``most_bytes``: most of it.
    """

    def __init__(self, machine: Machine, rank: int) -> None:
        super().__init__()
        self.machine, self.rank = machine, rank
        self.current = Stream(machine, f"main stream of rank {rank}")
        self._owned: dict[int, _Memory] = {}
        self.held_bytes = self.most_bytes = 0

    def synchronize(self) -> None:
        """Wait for all work of the current stream."""
        self.machine.synchronize(self.current.record())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # what a tensor of another class does comes here piece by piece
        kwargs = kwargs or {}
        if func.namespace == "streamfusion":  # what such an op does inside is the GPU's work, not the op itself
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if func._schema.name.removeprefix("aten::") in _READS:
            self.synchronize()
            return func(*args, **kwargs)
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        written = [place for place in func._schema.arguments if place.alias_info and place.alias_info.is_write]
        if written:
            self.current.add(str(func), lambda: func(*kept[0], **kept[1]))
            names = [place.name for place in func._schema.arguments]
            return (dict(zip(names, args, strict=False)) | kwargs)[written[0].name]
        outputs = func(*args, **kwargs)  # for their shapes and strides; and views are what they are
        old = {_address(value) for value in _tensors(kept)}
        fresh = [value for value in _tensors(outputs) if _address(value) not in old]
        for value in fresh:
            _spoil(value)
        if fresh and "empty" not in func._schema.name:
            places = tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)
            self.current.add(str(func), lambda: _fill(places, func(*kept[0], **kept[1])))
        self._hold(fresh, _tensors(outputs))
        return outputs

    def _hold(self, fresh: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Count the tensors by which the host holds memory of this GPU."""
        for value in fresh:
            if _address(value) not in self._owned:
                self._owned[_address(value)] = _Memory(value.untyped_storage(), self.current)
                self.held_bytes += value.untyped_storage().nbytes()
                self.most_bytes = max(self.most_bytes, self.held_bytes)
        for value in outputs:
            memory = self._owned.get(_address(value))
            if memory is not None:  # else it is what the test brought
                memory.holders += 1
                weakref.finalize(value, self._let_go, memory)

    def _let_go(self, memory: _Memory) -> None:
        memory.holders -= 1
        if memory.holders == 0:
            del self._owned[memory.storage.data_ptr()]
            self.held_bytes -= memory.storage.nbytes()
            memory.stream.append("give memory to others", lambda: memory.storage.fill_(_GARBAGE))


class _Memory:
    """A storage, the stream that it was allocated on, and how many tensors of the host's hold it."""

    def __init__(self, storage: torch.UntypedStorage, stream: Stream) -> None:
        self.storage, self.stream, self.holders = storage, stream, 0


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _spoil(tensor: torch.Tensor) -> None:
    """Garbage, as in memory that was just allocated: NaN in floats, -1 in integers."""
    tensor.untyped_storage().fill_(_GARBAGE)


def _fill(places: Any, outputs: Any) -> None:
    for place, value in zip(_tensors(places), _tensors(outputs), strict=True):
        place.copy_(value)


class FakeSide:
    """A side stream (runtime/gpu/streams.py) of a fake GPU.

    Args:
        after_current: what is put on it runs after what the current stream held (False: a mutant).
    """

    def __init__(self, gpu: Gpu, after_current: bool = True) -> None:
        self._gpu, self._after_current = gpu, after_current
        self._stream = Stream(gpu.machine, f"side stream of rank {gpu.rank}", carries_messages=True)

    @contextmanager
    def after_current(self) -> Iterator[None]:
        if self._after_current:
            self._stream.wait(self._gpu.current.record())
        before, self._gpu.current = self._gpu.current, self._stream
        try:
            yield
        finally:
            self._gpu.current = before

    def event(self) -> Event:
        return self._stream.record()

    def hold_current(self, event: Event) -> None:
        self._gpu.current.wait(event)


class FakeMemory:
    """Memory that ranks of a machine share (runtime/gpu/symmetric.py), as one of them holds it.

    Args:
        share: all-gather of Python values between all ranks.
    """

    def __init__(
        self, nbytes: int, gpu: Gpu, machine_of: Sequence[int], share: Callable[[Any, str], list[Any]]
    ) -> None:
        with _disable_current_modes():
            own = torch.zeros(nbytes, dtype=torch.uint8)
        near = [machine == machine_of[gpu.rank] for machine in machine_of]
        everyone = share(own, "share memory")
        self.segments = [memory if is_near else None for memory, is_near in zip(everyone, near, strict=True)]


class FakeWords:
    """What tells and awaits words (runtime/gpu/words.py) on the current stream of a fake GPU, as the kernels do."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def tell(
        self, heaps: torch.Tensor, place: torch.Tensor, dst: int, word_at: int, epoch: int, tag_bits: int, tag: int
    ) -> None:
        def run() -> None:
            if not _word_at(_entry(place, "status") + 8).value:  # a wait of this rank gave up: nothing leaves it
                _word_at(int(heaps[dst, 0]) + word_at).value = (epoch << tag_bits) + tag

        self._gpu.current.add(f"tell rank {dst} epoch {epoch}", run)

    def wait(
        self, heaps: torch.Tensor, place: torch.Tensor, word_at: int, epoch: int, tag_bits: int, slot: int
    ) -> None:
        rank, until = self._gpu.rank, [float("inf")]

        def seen() -> int:
            return _word_at(int(heaps[rank, 0]) + word_at).value

        def may_run() -> bool:
            until[0] = min(until[0], time.monotonic() + _entry(place, "limit_ns") * 1e-9)
            told = _word_at(_entry(place, "abort")).value or _word_at(_entry(place, "status") + 8).value
            return seen() >= epoch << tag_bits or bool(told) or time.monotonic() > until[0]

        def run() -> None:
            status = _entry(place, "status")
            if seen() < epoch << tag_bits and not _word_at(status + 8).value:
                for i, value in enumerate((2, _entry(place, "site"), slot, epoch << tag_bits, seen()), start=1):
                    _word_at(status + 8 * i).value = value

        self._gpu.current.add(f"wait for slot {slot} of epoch {epoch}", run, may_run)


def _word_at(address: int) -> ctypes.c_int64:
    return ctypes.c_int64.from_address(address)


def _entry(place: torch.Tensor, name: str) -> int:
    return int(place[PLACE.index(name)])


class Work:
    """What tells of a group's end."""

    def __init__(self, gpu: Gpu, done: Event) -> None:
        self._gpu, self._done = gpu, done

    def wait(self) -> None:
        """Hold up the current stream."""
        self._gpu.current.wait(self._done)


class Message(NamedTuple):
    """An operation of a group: ``isend`` or ``irecv``."""

    op: Callable[..., object]
    tensor: torch.Tensor
    peer: int
    group: Group


class Group:
    """One rank's place in a communicator."""

    def __init__(self, gpu: Gpu, members: Sequence[Group]) -> None:
        self.gpu, self.members = gpu, members
        self.stream = Stream(gpu.machine, f"message stream of rank {gpu.rank}", carries_messages=True)
        self.left: list[Message] | None = None  # messages of the running group that have not travelled


class Nccl:
    """What runtime/wires/c10d.py uses of ``torch.distributed``.

    Args:
        after_current: a group begins after what the current stream holds (False: a mutant).
    """

    P2POp = Message

    def __init__(self, after_current: bool = True) -> None:
        self._after_current = after_current

    @staticmethod
    def groups(gpus: Sequence[Gpu]) -> list[Group]:
        """A communicator of these GPUs, as each of them holds it."""
        members: list[Group] = []
        members += [Group(gpu, members) for gpu in gpus]
        return members

    @staticmethod
    def isend() -> None:
        """Only named, in a :class:`Message`."""

    @staticmethod
    def irecv() -> None:
        """Only named, in a :class:`Message`."""

    @staticmethod
    def get_process_group_ranks(group: Group) -> list[int]:
        return list(range(len(group.members)))

    def batch_isend_irecv(self, messages: Sequence[Message]) -> list[Work]:
        """One group, on the communicator's own stream."""
        group, gpu = messages[0].group, messages[0].group.gpu
        if self._after_current:
            group.stream.wait(gpu.current.record())
        # The library looks at memory, not at tensors: who lets go of one too early does not keep it alive here.
        held = [message._replace(tensor=_unheld(message.tensor)) for message in messages]
        group.stream.add(f"begin {len(held)} messages", lambda: setattr(group, "left", list(held)))
        group.stream.add(f"end {_names(held)}", lambda: None, lambda: self._ended(group))
        done = group.stream.record()
        return [Work(gpu, done)]

    def _ended(self, group: Group) -> bool:
        """Let the messages travel whose two ends are there; whether all of a group have."""
        assert group.left is not None
        for message in list(group.left):
            peer = group.members[message.peer]
            here, there = group.gpu.rank, peer.left or []
            want = self.irecv if message.op is self.isend else self.isend
            first = next((other for other in there if other.op is want and other.peer == here), None)
            if first is not None:
                source, target = (message, first) if message.op is self.isend else (first, message)
                assert source.tensor.nbytes == target.tensor.nbytes, "messages of different sizes met"
                target.tensor.copy_(source.tensor)
                group.left.remove(message)
                there.remove(first)
        return not group.left


def _names(messages: Sequence[Message]) -> str:
    return " and ".join(f"{message.op.__name__} with rank {message.peer}" for message in messages)


def _unheld(tensor: torch.Tensor) -> torch.Tensor:
    with _disable_current_modes():
        return tensor.detach()
