"""What the host learns of chunks of other calls and of waits in vain, and when; what it tells kernels."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress

import pytest
import torch

from sfcompile.errors import HeapError, PeerFailedError, RankMismatchError, RuntimeTimeoutError, StreamFusionError
from sfcompile.runtime.gpu.status import LOOK_S, DeviceStatus, Watchdog
from sfcompile.runtime.wires.transport import word_of


def test_a_noted_chunk_is_an_error_at_the_end_of_the_call_and_stays_one() -> None:
    status = DeviceStatus(1, torch.device("cpu"), 2.0)
    status.end_call()
    assert status.error() is None
    status.words[0] = word_of(7, 5)
    assert status.error() is None  # the host looks at its copy only
    for _ in range(2):
        with pytest.raises(
            RankMismatchError, match="not in the same call: rank 1 got a chunk of another call"
        ) as caught:
            status.end_call()
        assert caught.value.epoch == 7


class Site:
    """What says in words what a wait was for."""

    def gave_up(self, slot: int, wanted: int, seen: int, limit_s: float) -> StreamFusionError:
        return RuntimeTimeoutError(
            f"slot {slot}: {wanted} not {seen} in {limit_s:g} s", "", "", rank=1, peer=2, epoch=wanted
        )


def broken(status: DeviceStatus, site: Site) -> None:
    """What a kernel writes that gave up."""
    status.words[1:] = torch.tensor([1, status.number_of(site), 5, 7, 6])


def test_a_wait_in_vain_is_an_error_at_the_end_of_the_call() -> None:
    status, site = DeviceStatus(1, torch.device("cpu"), 2.0), Site()
    assert (status.number_of(Site()), status.number_of(site), status.number_of(site)) == (0, 1, 1)
    broken(status, site)
    with pytest.raises(RuntimeTimeoutError, match="slot 5: 7 not 6 in 2 s"):
        status.end_call()
    assert status.notice() == "rank 1: slot 5: 7 not 6 in 2 s"


def test_kernels_are_told_of_a_failure_and_the_error_says_whose() -> None:
    status, site = DeviceStatus(1, torch.device("cpu"), 2.0), Site()
    watched = status.watched
    assert watched.limit_ns == 2 * 10**9
    status.stop("rank 2: out of memory")
    status.stop("rank 1: rank 2 is gone")  # an echo
    assert ctypes.c_int64.from_address(watched.abort).value == 1
    status.end_call()  # nobody waited: the result is right
    assert status.notice() == "rank 2: out of memory"
    broken(status, site)
    with pytest.raises(PeerFailedError, match="another rank failed first: rank 2: out of memory") as caught:
        status.end_call()
    assert (caught.value.peer, caught.value.epoch) == (2, 7)


def test_the_watchdog_asks_until_it_hears_of_trouble_or_is_closed() -> None:
    told = iter([None, None, "rank 2: gone"])
    status = DeviceStatus(1, torch.device("cpu"), 2.0)

    def trouble() -> str | None:
        return next(told)

    watchdog = Watchdog(status, trouble)
    deadline = time.monotonic() + 20.0
    while status.notice() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert status.notice() == "rank 2: gone"
    watchdog.close()
    quiet = DeviceStatus(1, torch.device("cpu"), 2.0)
    watchdog = Watchdog(quiet, lambda: "rank 2: gone")
    watchdog.close()
    time.sleep(2 * LOOK_S)
    assert quiet.notice() is None


def test_a_device_that_has_stopped_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own error says nothing of what was waited for; the host's copy does, if a kernel gave up."""

    def stopped(device: torch.device) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr("sfcompile.runtime.gpu.status.synchronize", stopped)
    status, site = DeviceStatus(1, torch.device("cpu"), 2.0), Site()
    with pytest.raises(HeapError, match=r"GPU of rank 1 has stopped .*\(CUDA error: device-side assert triggered\)"):
        status.settle()
    broken(status, site)
    with pytest.raises(RuntimeTimeoutError):
        status.end_call()  # which copies what the kernel noted
    with pytest.raises(RuntimeTimeoutError, match="slot 5: 7 not 6 in 2 s"):
        status.settle()


def test_the_stream_stops_where_something_was_noted_and_the_host_knows_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a wait of the stream only for a wait in vain, at the end of a call for a chunk of another call too."""
    held: list[tuple[bool, list[int]]] = []
    status = DeviceStatus(1, torch.device("cpu"), 2.0)
    status._on_gpu = True

    def assert_on_device(fine: torch.Tensor, message: str) -> None:
        held.append((bool(fine), status._seen[0, :2].tolist()))

    monkeypatch.setattr("sfcompile.runtime.gpu.status.assert_on_device", assert_on_device)
    site = status.number_of(Site())
    for words in ([0, 0], [word_of(7, 5), 0], [0, 1]):
        status.words[:3] = torch.tensor([*words, site])
        for look in (status.check_waits, status.end_call):
            with suppress(StreamFusionError):
                look()
        assert [known for _, known in held[-2:]] == [words, words]
    assert [fine for fine, _ in held] == [True, True, True, False, False, False]


def test_each_stream_has_a_copy_and_what_was_waited_for_may_come_late() -> None:
    """A wait ends when another gave up; its stream's copy may be older than what that one notes."""
    status, site = DeviceStatus(1, torch.device("cpu"), 2.0), Site()
    status.words[1] = 1
    with pytest.raises(RuntimeTimeoutError, match="gave up, and the GPU stopped before it had told for what"):
        status.check_waits(aside=True)
    broken(status, site)
    for aside in (False, True, False):
        with pytest.raises(RuntimeTimeoutError, match="slot 5: 7 not 6 in 2 s"):
            status.check_waits(aside)
    status.words.zero_()
    with pytest.raises(RuntimeTimeoutError, match="slot 5: 7 not 6 in 2 s"):
        status.check_waits()  # an old copy of this stream does not take the other's word back


def test_an_error_of_the_device_is_explained_where_a_wait_gave_up(caplog: pytest.LogCaptureFixture) -> None:
    """And not where the host knows of none: a model has errors of its own. The log says it before anybody reads."""
    status, site = DeviceStatus(1, torch.device("cpu"), 2.0), Site()
    raw = RuntimeError("CUDA error: device-side assert triggered\nmore")
    assert status.explained(raw) is None
    watchdog = Watchdog(status, lambda: None)
    broken(status, site)
    with suppress(RuntimeTimeoutError):
        status.end_call()
    own = status.explained(raw)
    assert isinstance(own, RuntimeTimeoutError) and own.peer == 2
    assert status.explained(RuntimeError("shapes do not fit")) is None and status.explained(ValueError("CUDA")) is None
    ended = DeviceStatus(1, torch.device("cpu"), 2.0)
    ended.stop("rank 2: gone")  # whose messages the watchdog ends
    assert isinstance(ended.explained(RuntimeError("NCCL communicator was aborted on rank 1.")), PeerFailedError)
    deadline = time.monotonic() + 20.0
    while "slot 5: 7 not 6 in 2 s" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    watchdog.close()
    assert caplog.text.count("the stream of this rank has stopped: [rank 1] slot 5: 7 not 6 in 2 s") == 1
