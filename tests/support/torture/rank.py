"""What a fault's function sees of its rank: attempts that are written down, meetings beside the product, triggers."""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import torch
from model_cases import Plain, tokens
from torch import nn

from sfcompile.errors import StreamFusionError

TOLERANCE = 1e-5
"""Largest difference from eager, in fp32, as a share of the output's scale."""


class Injected(Exception):
    """What a fault raises as the user's own exception."""


class Rank:
    """One rank of a job under a fault.

    Attributes:
        number, ranks: this rank, and how many there are.
        folder: of the job, the same on all ranks; what stays in it is a leftover unless the fault says otherwise.
        timeout_s: the option that this job runs with.
    """

    def __init__(self, number: int, ranks: int, control: Path, folder: Path, timeout_s: float) -> None:
        self.number = number
        self.ranks = ranks
        self.folder = folder
        self.timeout_s = timeout_s
        self._control = control
        self._pid = os.getpid()
        self._record = os.open(control / f"rank{number}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    # ------------------------------------------------------------------ what is written down

    def note(self, what: str, **facts: Any) -> None:
        """One line of the record, with the time; it is there even if this process is killed in the next moment.

        A forked child writes none.
        """
        if os.getpid() != self._pid:
            return
        line = {"what": what, "at": time.monotonic(), "queued_s": _queued_s(), **facts}
        os.write(self._record, (json.dumps(line) + "\n").encode())

    def strike(self, victim: bool = True) -> None:
        """The fault happens now; ``victim``: nothing more is asked of this rank than to end."""
        self.note("fault", victim=victim)
        (self._control / "struck").touch()

    def attempt(
        self,
        name: str,
        call: Callable[[], Any],
        want: Callable[[], torch.Tensor] | torch.Tensor | None = None,
        must: str = "exact",
        own: tuple[type[BaseException], ...] = (),
    ) -> Any:
        """One thing that a user does, and how it ended.

        Args:
            want: eager's value; None: only errors count.
            must: "exact", "error" (one of ours) or "either". Anything else is a failure whatever stands here.
            own: exceptions of the fault's making, which are the user's own and may pass through.
        """
        self.note("begin", name=name, must=must)
        value: Any = None
        try:
            value = call()
        except BaseException as error:
            self.note("end", name=name, must=must, **_told(error, own))
            return None
        facts: dict[str, Any] = {"outcome": "exact"}
        if want is not None:
            expected = want() if callable(want) else want
            difference = float((value - expected).abs().max() / expected.abs().max())
            good = value.shape == expected.shape and value.dtype == expected.dtype and difference <= TOLERANCE
            facts = {"outcome": "exact" if good else "wrong", "text": f"error {difference:.1e} of the output's scale"}
        self.note("end", name=name, must=must, **facts)
        return value

    def check(self, name: str, holds: bool, text: str) -> None:
        """A fact about the job that is no value: a failure of the fault unless it ``holds``."""
        self.note("begin", name=name, must="exact")
        self.note("end", name=name, must="exact", outcome="exact" if holds else "broken", text=text)

    # ------------------------------------------------------------------ ranks among themselves, beside the product

    def mark(self, name: str) -> None:
        """Leave a mark that ranks and the harness can wait for."""
        (self._control / name).touch()

    def await_mark(self, name: str, limit_s: float = 30.0) -> bool:
        """Wait for a mark; whether it came."""
        end = time.monotonic() + limit_s
        while not (self._control / name).exists():
            if time.monotonic() > end:
                return False
            time.sleep(2e-3)
        return True

    def meet(self, name: str, limit_s: float = 30.0) -> None:
        """Wait until every rank is here, as an application's own barrier would."""
        self.mark(f"{name}-{self.number}")
        for other in range(self.ranks):
            self.await_mark(f"{name}-{other}", limit_s)

    # ------------------------------------------------------------------ when something happens

    def before(self, target: str, do: Callable[[], Any], nth: int = 1, if_text: str = "") -> None:
        """Do something when ``target``, e.g. "sfcompile.runtime.rank.session:Session.put", is called the n-th time.

        Args:
            if_text: count only calls among whose arguments is a text that contains this.
        """
        self._wrap(target, do, nth, if_text, after=False)

    def after(self, target: str, do: Callable[[], Any], nth: int = 1, if_text: str = "") -> None:
        """As :meth:`before`, when the call has ended."""
        self._wrap(target, do, nth, if_text, after=True)

    def _wrap(self, target: str, do: Callable[[], Any], nth: int, if_text: str, after: bool) -> None:
        module, _, path = target.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, last = path.split(".")
        for name in outer:
            owner = getattr(owner, name)
        function = getattr(owner, last)
        left = nth
        self.note("armed", target=target)

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
            left -= not if_text or any(if_text in text for text in texts)
            now = left == 0 and (not if_text or any(if_text in text for text in texts))
            if now:
                left = -1
                self.note("sprung", target=target)
                if not after:
                    do()
            value = function(*args, **kwargs)
            if now and after:
                do()
            return value

        setattr(owner, last, wrapped)

    def die(self, signal_number: int = signal.SIGKILL) -> NoReturn:
        """End this process at once."""
        self.strike()
        os.kill(os.getpid(), signal_number)
        time.sleep(60)
        raise AssertionError("a killed process goes on")

    # ------------------------------------------------------------------ what is run

    def compiled(self, model: nn.Module, **options: Any) -> Any:
        """The model behind the backend, sharded whatever it costs, along a ring unless ``options`` say otherwise."""
        asked = {"inner": "eager", "placement": "shard", "timeout_s": self.timeout_s, **options}
        asked.setdefault("mesh", {"ring": int(os.environ["WORLD_SIZE"])})
        return torch.compile(model, backend="streamfusion", options=asked)

    def call(self, name: str, run: Any, model: nn.Module, x: torch.Tensor | None = None, **how: Any) -> Any:
        """Attempt a call of a compiled model, compared with the model itself."""
        given = tokens() if x is None else x
        return self.attempt(name, lambda: run(given), lambda: model(given), **how)

    def warm(self, **options: Any) -> tuple[Any, Plain]:
        """A small model and its compiled form, called once."""
        model = Plain()
        run = self.compiled(model, **options)
        self.call("warm", run, model)
        return run, model

    def recovers(self, run: Any, model: nn.Module) -> None:
        """After a failure all meet and call again. A rank may learn of it only now; the second call is exact."""
        for name, must in (("again", "either"), ("again 2", "exact")):
            self.meet(name)
            self.call(name, run, model, must=must)


def _queued_s() -> float:
    """How long this thread has waited for a core so far, by the kernel's own count."""
    try:
        with open("/proc/thread-self/schedstat") as stat:
            return int(stat.read().split()[1]) / 1e9
    except FileNotFoundError:  # a kernel that does not count it
        return 0.0


def _told(error: BaseException, own: tuple[type[BaseException], ...]) -> dict[str, Any]:
    """How an exception counts. torch.compile wraps what a backend raises; the error inside is the one that is told."""
    inside = getattr(error, "inner_exception", None) or error
    outcome = "ours" if isinstance(inside, StreamFusionError) else "raw"
    if own and (isinstance(error, own) or isinstance(inside, own)):
        outcome = "own"
    return {"outcome": outcome, "error": type(inside).__name__, "text": str(inside)[:1500]}
