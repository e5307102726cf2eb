"""NVSHMEM's state on the device: every module that calls NVSHMEM holds some, which the host library fills in.

A module is filled when Triton has loaded it, and emptied before it is unloaded or NVSHMEM is left. Filling synchronises
the device, so it cannot be done while a CUDA graph is captured. What could not be filled is tried again before each
launch: a kernel never runs on state that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sfcompile.codegen.toolchain.loader import NVSHMEM_KERNELS
from sfcompile.errors import CodegenError

FillState = Callable[[int], int]
"""nvshmem4py's ``cumodule_init`` or ``cumodule_finalize``: takes the driver's handle of a module, returns a status."""

_library: list[tuple[FillState, FillState]] = []
"""What fills and empties; one pair, or none while NVSHMEM is not started."""
_filled: dict[int, str] = {}
"""Modules by handle, and a kernel of each."""
_empty: dict[int, str] = {}
"""Those that are loaded and hold no state yet."""
_hooked: list[bool] = []


def fill_device_state(initialise: FillState, finalise: FillState) -> None:
    """NVSHMEM has been started: from now on its state is filled into every module that holds some."""
    from triton import knobs

    if not _hooked:
        knobs.runtime.kernel_load_end_hook.add(_loaded)
        unloads = getattr(knobs.runtime, "kernel_unload_hook", None)  # a Triton without it keeps modules for ever
        if unloads is not None:
            unloads.add(_unloaded)
        _hooked.append(True)
    _empty.update(_filled)  # what an earlier start filled in is of that one
    _filled.clear()
    _library[:] = [(initialise, finalise)]


def leave_device_state(failed: bool) -> None:
    """NVSHMEM is about to be left: take its state out of every module.

    Args:
        failed: kernels may still be running on it, so that nothing is touched.
    """
    if not failed:
        for module in _filled:
            _library[0][1](module)
    _empty.update(_filled)
    _filled.clear()
    _library.clear()


def require_device_state() -> None:
    """Before a launch of a kernel that calls NVSHMEM: every loaded module holds its state.

    Raises:
        CodegenError: NVSHMEM refuses, or a CUDA graph is being captured.
    """
    while _empty and _library:
        module, name = next(iter(_empty.items()))
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise CodegenError(
                f"kernel {name} is loaded while a CUDA graph is captured",
                "NVSHMEM fills its state into the kernel's module when that is loaded, and synchronises the device",
                "call the model once before the capture",
            )
        status = _library[0][0](module)
        if status != 0:
            raise CodegenError(
                f"NVSHMEM's state cannot be filled into the module of kernel {name} (status {status})",
                "the kernel would put to places of no rank",
                "install the NVSHMEM wheel of the release that the host library is of; NVSHMEM_DEBUG=INFO says more",
            )
        _filled[module] = _empty.pop(module)


def _loaded(module: int, function: Any, name: str, *rest: Any) -> None:
    if name in NVSHMEM_KERNELS:
        _empty[int(module)] = name
        require_device_state()


def _unloaded(module: int, *rest: Any) -> None:
    _empty.pop(int(module), None)
    if _filled.pop(int(module), None) is not None and _library:
        _library[0][1](int(module))
