"""Takes the place of Triton's driver: kernels are compiled and launched as on a GPU, and arrive in a world.

The grid, the arguments in the launcher's order, shared memory and the cooperative flag are what the real driver gets;
load hooks are called. What runs is the PTX that lies beside the cubin in Triton's cache.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import _allocation, driver

from ptx.world import Stream, World
from sfcompile.codegen.engines.target import KernelTarget

_texts: dict[int, tuple[str, str]] = {}
_handles = itertools.count(1)


def _loaded(module: None, function: int, name: str, group: Any, *rest: Any) -> None:
    """Triton's hook: where the PTX of a loaded function lies."""
    path = next(Path(path) for file, path in group.items() if file.endswith(".ptx"))
    _texts[function] = (name, path.read_text())


@dataclass(frozen=True)
class Launched:
    """A launch as the driver got it."""

    name: str
    gpu: int
    grid: tuple[int, int, int]
    cooperative: bool
    shared_bytes: int
    arguments: int


class MachineDriver(DriverBase):
    """Triton's driver for a world of GPUs of one architecture.

    Args:
        arch: 80, 90.
        change: ``(kernel's name, PTX) -> PTX``: mutants.

    Attributes:
        launched: every launch so far; ``texts``: names and PTX of what was launched.
        after: called after every launch with its stream, by the thread that launched.
        lock: held while a kernel is compiled and launched; ranks may be threads.
    """

    def __init__(self, world: World, arch: int, change: Callable[[str, str], str] | None = None) -> None:
        self.world, self.arch, self._change = world, arch, change
        self.launched: list[Launched] = []
        self.texts: dict[tuple[str, str], None] = {}
        self.after: Callable[[Stream], None] = lambda stream: None
        self.lock = threading.Condition(threading.RLock())
        self._current = threading.local()
        self._kept: list[torch.Tensor] = []
        self.utils = _Utils()
        self.launcher_cls = self._launcher

    @classmethod
    def is_active(cls) -> bool:
        """Whether this kind of GPU is there."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Not asked for."""
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        """What kernels are compiled for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        """Tensors lie in this process's memory."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        """Not asked for."""
        raise NotImplementedError

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device: all GPUs of an architecture share theirs."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """The stream that :meth:`on` chose."""
        return self.world.streams.index(self.stream)

    @property
    def stream(self) -> Stream:
        """This thread's current stream."""
        stream: Stream = self._current.stream
        return stream

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Inside, kernels are launched on a stream, and this is Triton's driver."""
        before = getattr(self._current, "stream", None)
        self._current.stream = stream
        try:
            with self.active():
                yield
        finally:
            self._current.stream = before

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this is Triton's driver, for all threads."""
        active = driver._active
        driver.set_active(self)
        knobs.runtime.kernel_load_end_hook.add(_loaded)
        try:
            yield
        finally:
            driver._active = active

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        kinds = list(source.signature.values())

        def launch(
            x: int, y: int, z: int, stream: int, function: int, packed: Any, launch_metadata: Any, enter: Any,
            leave: Any, *values: Any,
        ) -> None:  # fmt: skip
            given = [value for value, kind in zip(values, kinds, strict=True) if kind != "constexpr"]
            # Triton keeps the launcher with the kernel: this may be another world than it was made in.
            here = driver.active
            here.enqueue(here.world.streams[stream], function, (x, y, z), metadata, given)

        return launch

    def enqueue(
        self, stream: Stream, function: int, grid: tuple[int, int, int], metadata: Any, given: list[Any]
    ) -> None:
        """Add a launch to its stream."""
        name, text = _texts[function]
        assert grid[1:] == (1, 1), grid
        for value in given:
            if isinstance(value, torch.Tensor):
                self.register(value)
        numbers = [value.data_ptr() if isinstance(value, torch.Tensor) else int(value or 0) for value in given]
        self.texts[name, text] = None
        code = self.world.code(self._change(name, text) if self._change else text)
        scratch = [self._scratch(metadata.global_scratch_size * grid[0])]
        scratch += [0] * (len(code.entry.params) - len(numbers) - 1)
        self.launched.append(
            Launched(name, stream.gpu, grid, bool(metadata.launch_cooperative_grid), metadata.shared, len(numbers))
        )

        def launch() -> None:
            self.world.launch(stream, code, grid[0], numbers + scratch, metadata.shared, name)

        launch()
        if self.recorder is not None:
            self.recorder(lambda: self._again(launch, stream))

    def _scratch(self, nbytes: int) -> int:
        """Memory for what a kernel keeps outside of its arguments: tensor maps. As Triton's launcher asks for it."""
        if not nbytes:
            return 0
        memory: Any = _allocation._allocator.get()(nbytes + 128, 128, None)
        self.register(memory)
        self._kept.append(memory)
        return -(-int(memory.data_ptr()) // 128) * 128  # torch aligns to 64 bytes on CPUs, to 512 on GPUs

    def _again(self, launch: Callable[[], None], stream: Stream) -> None:
        """A recorded launch, made once more."""
        with self.lock:
            launch()
        self.after(stream)

    @property
    def recorder(self) -> Callable[[Callable[[], None]], None] | None:
        """What this thread's launches are recorded by (capture.py)."""
        return getattr(self._current, "recorder", None)

    @recorder.setter
    def recorder(self, recorder: Callable[[Callable[[], None]], None] | None) -> None:
        self._current.recorder = recorder

    def register(self, tensor: torch.Tensor) -> None:
        """Let kernels touch a tensor's memory."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self.world.memory.add(storage.data_ptr(), storage.nbytes(), "a tensor", storage)


class _Utils:
    """What Triton asks of a driver's library."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of an H100."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """``(module, function, registers, spills, most threads)``; no module, for Triton would unload it some time."""
        return None, next(_handles), 0, 0, 1024


class _Kernel:
    """Launches a kernel of Triton's as the machine wants it."""

    def __init__(self, kernel: Any, machine: MachineDriver | None) -> None:
        assert machine is not None
        self._kernel, self._driver = kernel, machine

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*values: Any, **options: Any) -> None:
            with self._driver.lock:
                self._kernel[grid](*values, **options)
            self._driver.after(self._driver.stream)

        return launch


@dataclass(frozen=True)
class MachineTarget(KernelTarget):
    """A GPU of the machine, for the engines of sfcompile.

    Attributes:
        driver: where launches go.
        move_programs: programs of a kernel that only moves.
        edit: ``(kernel's name, generated source) -> source``: mutants.
    """

    driver: MachineDriver | None = None
    move_programs: int = 2
    edit: Callable[[str, str], str] | None = None

    @property
    def interpreted(self) -> bool:
        """Not by Triton."""
        return False

    @property
    def architecture(self) -> int:
        """Of the world's GPUs."""
        assert self.driver is not None
        return self.driver.arch

    def load(self, source: str, name: str, reach: str) -> Any:
        """Triton's kernel; its launches are made one at a time."""
        return _Kernel(super().load(self.edit(name, source) if self.edit else source, name, reach), self.driver)

    def options(self, reach: str, **more: Any) -> dict[str, Any]:
        """NVSHMEM's functions stay calls: the world stands for them."""
        return more if reach == "peer" else more | {"ptx_options": "-c"}

    def move(self, kernel: Any, values: Any, reach: str, **more: Any) -> None:
        """Launch a kernel that only moves."""
        kernel[(self.move_programs,)](*values, **self.options(reach, **more))
