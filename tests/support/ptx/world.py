"""All GPUs of a job: streams of launches, run together in an order that chance decides.

On a stream a kernel starts when the one before has ended, and has seen what it did. Kernels of different streams and
GPUs run at the same time, some for a long while before others. What travels by NVSHMEM is delivered later, in pieces,
in any order. A world in which nobody can go on any more is a deadlock and says who waits where; kernels that look at
the clock while they wait get to see it advance first.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ptx.clocks import PLANES, Clock, Clocks
from ptx.emit import Code, compile_entry
from ptx.launch import Gang, Launch
from ptx.memory import Memory
from ptx.text import PtxError, read_entry

Start = Callable[[], Launch]


class Deadlock(PtxError):
    """No thread can go on."""


class Stream:
    """Launches of a GPU, one after the other."""

    def __init__(self, world: World, gpu: int) -> None:
        self.world, self.gpu = world, gpu
        self.queue: deque[Any] = deque()
        self.running: Launch | None = None
        self.clock: Clock = np.zeros((PLANES, 1), np.int64)
        self.warps = np.zeros(0, np.int64)
        self.weight = 1.0

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return self.running is None and not self.queue

    def take_warps(self, count: int) -> Any:
        """Numbers for the warps of a launch: launches of a stream follow each other and share them."""
        if count > len(self.warps):
            self.warps = np.concatenate([self.warps, self.world.clocks.add(count - len(self.warps), self.gpu)])
        return self.warps[:count]

    def learn(self, clock: Clock) -> None:
        """What the stream's next kernel has seen."""
        size = max(clock.shape[1], self.clock.shape[1])
        pads = [np.pad(c, ((0, 0), (0, size - c.shape[1]))) for c in (clock, self.clock)]
        self.clock = np.maximum(*pads)


class World:
    """See the head of the file.

    Args:
        seed: of every choice.
        together: how often warps at one place run together; 0 is every warp for itself, and slow.

    Attributes:
        patience: how often the clock advances, each time by twice as much, before a deadlock is one.
        deliveries: what a network still has to do; each is called until it returns True.
        calls: what functions outside of kernels do: ``(world, gang, name, arguments, number)``; False: come again.
    """

    def __init__(self, seed: int = 0, together: float = 0.9) -> None:
        self.coin = random.Random(seed)
        self.together = together
        self.patience = 60
        self.clocks = Clocks()
        self.memory = Memory(self.clocks, seed)
        self.streams: list[Stream] = []
        self.deliveries: list[Callable[[], bool]] = []
        self.calls: Callable[..., bool] = _no_calls
        self.steps = self.launches = 0
        self._time_ns = 1_000_000
        self._mark = (0, 0, 0)
        self._codes: dict[tuple[str, str], Code] = {}
        self._draws = 0

    def stream(self, gpu: int) -> Stream:
        """A new stream."""
        self.streams.append(Stream(self, gpu))
        return self.streams[-1]

    def code(self, ptx: str, name: str = "") -> Code:
        """A kernel, ready to run."""
        if (ptx, name) not in self._codes:
            self._codes[ptx, name] = compiled(ptx, name)
        code = self._codes[ptx, name]
        self.memory.refine(code.narrow)
        return code

    def launch(
        self, stream: Stream, code: Code, grid: int, arguments: Sequence[int], shared_bytes: int, name: str = ""
    ) -> None:
        """Add a kernel to a stream."""

        def start() -> Launch:
            warps = stream.take_warps(grid * code.entry.threads // 32)
            self.clocks.start(warps, stream.clock)
            self.launches += 1
            label = f"{name or code.entry.name} on GPU {stream.gpu}"
            return Launch(
                code, grid, list(arguments), shared_bytes, stream.gpu, label, self.memory, warps, self.coin,
                self.now_ns, self._call, self.deliveries,
            )  # fmt: skip

        stream.queue.append(start)

    def then(self, stream: Stream, action: Callable[[], None]) -> None:
        """Something that happens on a stream when all before it has ended."""
        stream.queue.append(action)

    def record(self, stream: Stream) -> Event:
        """An event: what the stream does up to here."""
        event = Event()
        self.then(stream, lambda: event.reach(stream.clock.copy()))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        """What is added to the stream from now on follows the event."""
        stream.queue.append(event)

    def now_ns(self) -> int:
        """The clock of all GPUs; every look is a little later."""
        self._time_ns += 32
        return self._time_ns

    def _call(self, gang: Gang, name: str, arguments: Any, at: int) -> bool:
        return self.calls(self, gang, name, arguments, at)

    # ------------------------------------------------------------------ running

    def run(
        self,
        until: Callable[[], bool] | None = None,
        stuck: Callable[[], bool] | None = None,
        most_steps: int = 50_000_000,
    ) -> None:
        """Run until everything has ended, or ``until`` holds.

        Args:
            stuck: asked when nobody can go on and time would pass: True gives control back, for launches to come.

        Raises:
            Deadlock: nobody can go on.
            PtxError: a kernel did what no kernel may do.
        """
        vain = 0
        with np.errstate(all="ignore"):
            while not (until and until()):
                if self.steps > most_steps:
                    raise PtxError(f"no end after {most_steps} steps: {self.state()}")
                signals = self.memory.signals
                active = [stream for stream in self.streams if self._advance(stream)]
                ready = [(stream, lanes) for stream in active if (lanes := stream.running.runnable(signals)).any()]  # type: ignore[union-attr]
                if self.deliveries and (not ready or self.coin.random() < 0.02):
                    self._deliver()
                    continue
                if ready:
                    vain = 0 if self._progress() else vain
                    self._step(ready)
                    continue
                if all(stream.idle for stream in self.streams) or (stuck and stuck()):
                    return
                vain = 0 if self._progress() else vain + 1
                if vain > self.patience:
                    raise Deadlock(f"nobody can go on: {self.state()}")
                self._time_ns += 1 << min(vain, 36)
                for stream in active:
                    stream.running.asleep[:] = -1  # type: ignore[union-attr]

    def _progress(self) -> bool:
        """Whether a signal has changed or a kernel has ended since the last look."""
        mark = (self.memory.signals, self.launches, sum(stream.idle for stream in self.streams))
        changed, self._mark = mark != self._mark, mark
        return changed

    def _advance(self, stream: Stream) -> bool:
        """End and start launches; whether one runs."""
        launch = stream.running
        if launch is not None and launch.done:
            clock = self.clocks.seen[launch.warps, :, : self.clocks.count].max(0)
            clock[1:] = clock[0]  # the end of a kernel is a fence for everything
            stream.learn(clock)
            launch.close()
            stream.running = None
            self.memory.signals += 1
        while stream.running is None and stream.queue:
            item = stream.queue[0]
            if isinstance(item, Event):
                if item.clock is None:
                    return False
                stream.queue.popleft()
                stream.learn(item.clock)
                continue
            stream.queue.popleft()
            started = item()
            if isinstance(started, Launch):
                stream.running = started
        return stream.running is not None

    def _step(self, ready: list[tuple[Stream, Any]]) -> None:
        self._draws += 1
        if self._draws % 100 == 1:  # now these are fast, now those
            for stream in self.streams:
                stream.weight = self.coin.choice([0.02, 1.0, 1.0])
        weights = [stream.weight for stream, _ in ready]
        stream, lanes = self.coin.choices(ready, weights)[0]
        launch = stream.running
        assert launch is not None
        gang, place = launch.pick(lanes, self.together)
        before = launch.steps
        launch.run(gang, place, self.coin.choice([8, 64, 256]))
        self.steps += launch.steps - before

    def _deliver(self) -> None:
        index = self.coin.randrange(len(self.deliveries))
        if self.deliveries[index]():
            del self.deliveries[index]

    def state(self) -> str:
        """Who stands where."""
        running = [stream.running.where() for stream in self.streams if stream.running is not None]
        waiting = [f"a stream of GPU {s.gpu} with {len(s.queue)} more" for s in self.streams if s.queue]
        return "; ".join(running + waiting) or "nothing is left"

    def races(self) -> list[str]:
        """Every race as text, with how often it was seen."""
        return [f"{race} ({count} x)" for race, count in self.memory.races.items()]


class Event:
    """A point on a stream; ``clock`` is what has happened by then, once it has."""

    def __init__(self) -> None:
        self.clock: Clock | None = None

    def reach(self, clock: Clock) -> None:
        """The stream has come here."""
        self.clock = clock


def _no_calls(world: World, gang: Gang, name: str, arguments: Any, at: int) -> bool:
    raise PtxError(f"nothing stands for the function {name}")


_COMPILED: dict[tuple[str, str], Code] = {}


def compiled(ptx: str, name: str) -> Code:
    """A kernel's functions, once per process."""
    if (ptx, name) not in _COMPILED:
        _COMPILED[ptx, name] = compile_entry(read_entry(ptx, name))
    return _COMPILED[ptx, name]
