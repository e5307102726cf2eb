"""The side stream's calls, in order; a CPU has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sfcompile.runtime.gpu.streams import CudaSideStream


class Stream:
    """A CUDA stream that writes down what it is asked."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: Any) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for {event}")


def test_work_goes_behind_the_current_stream_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    made: list[Any] = []

    def stream(device: torch.device, priority: int) -> Stream:
        made.append((device, priority))
        return Stream("side", said)

    @contextmanager
    def inside(stream: Any) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append("back")

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main", said))
    monkeypatch.setattr(torch.cuda, "stream", inside)
    side = CudaSideStream(torch.device("cuda:1"))
    with side.after_current():
        said.append("work")
    side.hold_current(side.event())
    assert made == [(torch.device("cuda:1"), -1)]
    assert said == ["side waits for main", "on side", "work", "back", "main waits for event of side"]


def test_a_cpu_has_one_order() -> None:
    side = CudaSideStream(torch.device("cpu"))
    with side.after_current():
        pass
    side.hold_current(side.event())
