"""CUDA graphs in the machine: what a rank does is recorded once and then done again at the same addresses.

A captured graph is a list of kernels whose arguments stay. Here it is a list of launches and of torch's operations on
CPU tensors; a replay runs the operations again and puts their results where the first ones lie, as a graph's own pool
of memory would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptx.driver import MachineDriver


class Capture(TorchDispatchMode):
    """Record what a thread does inside; it is done too.

    Attributes:
        launches: kernels recorded so far.
    """

    def __init__(self, driver: MachineDriver) -> None:
        super().__init__()
        self._driver = driver
        self._steps: list[Callable[[], None]] = []
        self.launches = 0

    def __enter__(self) -> Any:
        self._driver.recorder = self._launched
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._driver.recorder = None

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

    def replay(self) -> None:
        """Everything once more, in order."""
        for step in self._steps:
            step()
