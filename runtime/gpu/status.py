"""What went wrong inside kernels, as far as a GPU tells: chunks of another call, waits that ended in vain.

Kernels wait for the epoch alone; a site's last kernel compares what came with the call's own signal and notes one that
differs in a word on the device. A wait that gives up, because its time is up or the host said so, notes what it waited
for, and from then on nothing leaves this rank (codegen/kernels/device.py).

The host does not wait for these words. At the end of a call, on its stream, they are copied to where the host reads
them when it likes, and an assertion on the device then stops the stream: whoever reads the call's result gets an error,
and who makes another call learns from the host's copy what it was.

The host speaks to waiting kernels by one word in its own memory, which they look at. A thread of its own writes it
(:class:`Watchdog`): the thread that made the call may be waiting for the stream.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sfcompile.errors import HeapError, RuntimeTimeoutError, StreamFusionError
from sfcompile.runtime.gpu.streams import synchronize
from sfcompile.runtime.wires.symmetric_heap import STATUS, Watched
from sfcompile.runtime.wires.transport import TAG_BITS, notice_of, out_of_step, peer_failed
from sfcompile.torch_private import assert_on_device

_log = logging.getLogger("sfcompile")
LOOK_S = 0.5
"""Seconds between two looks of the watchdog: a part of what a dead peer's ranks wait for."""


class Reporting(Protocol):
    """What can say in words what a wait of its kernels was for."""

    def gave_up(self, slot: int, wanted: int, seen: int, limit_s: float) -> StreamFusionError:
        """The error; see codegen/engines/launch.py."""


class DeviceStatus:
    """The words on the device, the host's copy of them, and the word that tells kernels to stop waiting.

    Args:
        limit_s: how long a wait may last.

    Attributes:
        words: int64, see STATUS in runtime/wires/symmetric_heap.py.
        limit_s: may change; places that were made before are told by device_run.py.
    """

    def __init__(self, rank: int, device: torch.device, limit_s: float) -> None:
        self._rank, self._on_gpu, self.limit_s = rank, device.type == "cuda", limit_s
        self.words = torch.zeros(len(STATUS), dtype=torch.int64, device=device)
        self._known = torch.zeros(2, len(STATUS), dtype=torch.int64, pin_memory=self._on_gpu)  # by stream
        self._seen: NDArray[np.int64] = self._known.numpy()  # reading it asks the device for nothing
        self._abort = torch.zeros(1, dtype=torch.int64, pin_memory=self._on_gpu)
        self._notice: str | None = None
        self._sites: list[Reporting] = []

    @property
    def watched(self) -> Watched:
        """What kernels look at."""
        return Watched(self.words.data_ptr(), self._abort.data_ptr(), round(self.limit_s * 1e9))

    def number_of(self, site: Reporting) -> int:
        """What kernels of a site call it in the status."""
        if site not in self._sites:
            self._sites.append(site)
        return self._sites.index(site)

    def stop(self, notice: str) -> None:
        """Tell waiting kernels to give up; any thread may. The first notice stays."""
        self._notice = self._notice or notice
        self._abort.fill_(1)

    def check_waits(self, aside: bool = False) -> None:
        """After a wait of the stream: what is launched next runs only if no wait of this rank has given up.

        Args:
            aside: of the stream beside the main one. Each has a copy of its own: an older one might come later.

        Raises:
            RuntimeTimeoutError, PeerFailedError: the host knows that one gave up.
        """
        self._demand(self.words[1:2], "streamfusion: a wait of the stream ended in vain", aside)
        error = self.error() if self._seen[:, 1].any() else None
        if error is not None:
            raise error

    def end_call(self) -> None:
        """After a call's last kernel, on its stream.

        Raises:
            RankMismatchError: the host knows already that a chunk of another call has come.
            RuntimeTimeoutError, PeerFailedError: it knows that a wait gave up.
        """
        self._demand(self.words[:2], "streamfusion: a kernel waited in vain, or got a chunk of another call")
        error = self.error()
        if error is not None:
            raise error

    def settle(self) -> None:
        """Until the device has done what was asked of it.

        Raises:
            HeapError: it has stopped, and the host does not know of a wait in vain; where it does, that is raised.
        """
        try:
            synchronize(self.words.device)
        except RuntimeError as error:  # CUDA's own
            said = str(error).splitlines()[0]
            raise self.error() or HeapError(
                f"the GPU of rank {self._rank} has stopped before its heap could grow ({said})",
                "a kernel of an earlier call failed, and CUDA runs nothing more in this process",
                "look at the logs of all ranks for the first error, and start the job again",
                rank=self._rank,
            ) from error

    def _demand(self, zeros: torch.Tensor, message: str, aside: bool = False) -> None:
        """Copy the status to the host; on a GPU, stop the stream with a message unless these words of it are 0."""
        self._known[int(aside)].copy_(self.words, non_blocking=True)
        if self._on_gpu:
            # After the copy: when the assertion has stopped the stream, the host's copy says why.
            assert_on_device(zeros.any().logical_not(), message)

    def error(self) -> StreamFusionError | None:
        """What the host knows by now of what kernels noted."""
        known = self._noted()
        if known["gave_up"] and known["stranger"] < known["wanted"]:
            known["stranger"] = 0  # what lay there before: on a GPU nobody looks at it any more
        if known["stranger"] and self._notice is not None:
            return peer_failed(self._rank, self._notice)  # messages that were ended hold anything
        if known["stranger"]:
            what = f"rank {self._rank} got a chunk of another call than it is in"
            return out_of_step(what, self._rank, epoch=known["stranger"] >> TAG_BITS)
        if not known["gave_up"]:
            return None
        report = self._report(known)
        if self._notice is None:
            return report
        slot = known["slot"] if known["wanted"] else None
        return peer_failed(self._rank, self._notice, report.peer, slot, report.epoch)

    def _noted(self) -> dict[str, int]:
        """The copy that says more, of the two streams'."""
        rows = [dict(zip(STATUS, row, strict=True)) for row in self._seen.tolist()]
        return max(rows, key=lambda row: [bool(row[name]) for name in ("stranger", "gave_up", "wanted")])

    def _report(self, known: dict[str, int]) -> StreamFusionError:
        if known["wanted"]:
            return self._sites[known["site"]].gave_up(known["slot"], known["wanted"], known["seen"], self.limit_s)
        return RuntimeTimeoutError(
            f"a wait on the GPU of rank {self._rank} gave up, and the GPU stopped before it had told for what",
            "a peer is late or gone",
            "look at the logs of the other ranks",
            rank=self._rank,
        )

    def explained(self, error: BaseException) -> StreamFusionError | None:
        """What stopped the device, or NCCL, if an error is theirs: it says only that they did. None: not known here."""
        if not isinstance(error, RuntimeError) or not re.search("CUDA|NCCL", str(error)):
            return None
        known = self.error()
        return peer_failed(self._rank, self._notice) if known is None and self._notice is not None else known

    def notice(self) -> str | None:
        """For other ranks: what this one knows of a failure, its own or another's; None: nothing."""
        error = self.error()
        return self._notice if error is None else notice_of(self._rank, error)


class Watchdog:
    """A thread that tells kernels to stop waiting when another rank has failed or gone.

    Args:
        trouble: what is known of other ranks' failures; asked by the thread.
    """

    def __init__(self, status: DeviceStatus, trouble: Callable[[], str | None]) -> None:
        self._status, self._trouble = status, trouble
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="sfcompile-watchdog", daemon=True).start()

    def _watch(self) -> None:
        heard = told = False
        while not (heard and told) and not self._ended.wait(LOOK_S):
            notice = None if heard else self._trouble()
            if notice is not None and not self._ended.is_set():
                _log.error("kernels of this rank that wait for others are told to stop: %s", notice)
                self._status.stop(notice)
                heard = True
            error = self._status.error()
            if error is not None and not told:
                # Who reads a result next gets CUDA's word for a stopped stream.
                _log.error("the stream of this rank has stopped: %s", error)
                told = True

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
