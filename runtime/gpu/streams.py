"""A stream beside the current one, and events of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class SideStream(Protocol):
    """Work beside what the current stream does."""

    def after_current(self) -> Any:
        """A context: inside, work goes to the side stream, after what the current one holds so far."""

    def event(self) -> Any:
        """What happens once all that the side stream holds so far has run."""

    def hold_current(self, event: Any) -> None:
        """The current stream goes on after the event."""


class CudaSideStream:
    """On a GPU, before others that are ready: what it sends, other ranks wait for. On a CPU all is in order anyway."""

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
