"""CUDA graphs in the machine: what a rank does is recorded once and then done again at the same addresses.

A captured graph is a list of kernels whose arguments stay. Here it is a list of launches, of torch's operations on CPU
tensors, and of the loops that Inductor compiles (:func:`follow_inductor`); a replay runs the operations again and puts
their results where the first ones lie, as a graph's own pool of memory would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor.codecache import PyCodeCache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptx.driver import MachineDriver


class Capture(TorchDispatchMode):
    """Record what a thread does inside; it is done too.

    Attributes:
        launches: kernels recorded so far; ``loops``: of Inductor's.
    """

    def __init__(self, driver: MachineDriver) -> None:
        super().__init__()
        self._driver = driver
        self._steps: list[Callable[[], None]] = []
        self.launches = self.loops = 0

    def __enter__(self) -> Any:
        self._driver.recorder = self._launched
        _active.capture = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._driver.recorder = None
        _active.capture = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and remember how to do it again."""
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace != "aten":
            return result
        given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        fresh = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and id(leaf) not in given]

        def again() -> None:
            values = [x for x in tree_leaves(func(*args, **(kwargs or {}))) if isinstance(x, torch.Tensor)]
            for old, new in zip(fresh, [x for x in values if id(x) not in given], strict=True):
                old.copy_(new)

        self._steps.append(again)
        return result

    def _launched(self, launch: Callable[[], None]) -> None:
        """A kernel's launch, to be made again."""
        self.launches += 1
        self._steps.append(launch)

    def loop(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        """One of Inductor's loops, to be run again over the same memory, which the arguments keep."""
        self.loops += 1
        self._steps.append(lambda: function(*arguments))

    def replay(self) -> None:
        """Everything once more, in order."""
        for step in self._steps:
            step()


_active = threading.local()


@contextmanager
def follow_inductor() -> Iterator[None]:
    """Loops of modules that Inductor writes inside are recorded by the thread's capture when they run."""
    before = len(PyCodeCache.modules)
    yield
    for module in PyCodeCache.modules[before:]:
        for name, value in list(vars(module).items()):
            if name.startswith("cpp_fused"):
                setattr(module, name, _followed(value))


def _followed(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        capture = getattr(_active, "capture", None)
        if capture is not None:
            capture.loop(function, arguments)
        return function(*arguments)

    return run
