"""The current stream, one beside it, and events of that. On a CPU all is in order and nothing is captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def synchronize(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SideStream(Protocol):
    """Work beside what the current stream does."""

    def after_current(self) -> Any:
        """A context: inside, work goes to the side stream, after what the current one holds so far."""

    def event(self) -> Any:
        """What happens once all that the side stream holds so far has run."""

    def hold_current(self, event: Any) -> None:
        """The current stream goes on after the event."""


class CudaSideStream:
    """On a GPU, before others that are ready: what it sends, other ranks wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def after_current(self) -> Iterator[None]:
        """See :class:`SideStream`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def event(self) -> Any:
        """See :class:`SideStream`."""
        return None if self._stream is None else self._stream.record_event()

    def hold_current(self, event: Any) -> None:
        """See :class:`SideStream`."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
