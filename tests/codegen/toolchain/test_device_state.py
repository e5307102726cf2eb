"""NVSHMEM's state in the modules of loaded kernels: filled once, never missing at a launch, taken out at the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfcompile.codegen.engines.target import KernelTarget
from sfcompile.codegen.toolchain import device_state
from sfcompile.codegen.toolchain.device_state import fill_device_state, leave_device_state, require_device_state
from sfcompile.errors import CodegenError


class Library:
    """NVSHMEM's two functions; ``status`` is what filling returns."""

    def __init__(self) -> None:
        self.status = 0
        self.calls: list[tuple[str, int]] = []

    def init(self, module: int) -> int:
        self.calls.append(("init", module))
        return self.status

    def finalize(self, module: int) -> int:
        self.calls.append(("finalize", module))
        return 0


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Triton's hooks at a module's load and unload, on a process that has loaded nothing."""
    from triton import knobs

    added: dict[str, Any] = {}
    monkeypatch.setattr(knobs.runtime.kernel_load_end_hook, "add", lambda hook: added.setdefault("load", hook))
    unload = SimpleNamespace(add=lambda hook: added.setdefault("unload", hook))
    monkeypatch.setattr(knobs.runtime, "kernel_unload_hook", unload, raising=False)  # Triton 3.6 and 3.7 have none
    for name, empty in (("_library", []), ("_hooked", []), ("_filled", {}), ("_empty", {})):
        monkeypatch.setattr(device_state, name, empty)
    monkeypatch.setattr(device_state, "NVSHMEM_KERNELS", {"put_nvshmem"})
    return added


def load(hooks: dict[str, Any], module: int, name: str = "put_nvshmem") -> None:
    hooks["load"](module, 1, name, None, "hash")


def test_modules_are_filled_when_loaded_and_emptied_before_they_go(hooks: dict[str, Any]) -> None:
    library = Library()
    fill_device_state(library.init, library.finalize)
    load(hooks, 17)
    load(hooks, 18, "somebody_elses")
    load(hooks, 19)
    hooks["unload"](17, 1, "put_nvshmem", None, "hash")
    hooks["unload"](18, 1, "somebody_elses", None, "hash")
    assert library.calls == [("init", 17), ("init", 19), ("finalize", 17)]
    leave_device_state(False)
    hooks["unload"](19, 1, "put_nvshmem", None, "hash")  # at the interpreter's end: NVSHMEM has gone
    assert library.calls[3:] == [("finalize", 19)]


def test_a_second_start_fills_what_the_first_one_filled(hooks: dict[str, Any]) -> None:
    first, second = Library(), Library()
    fill_device_state(first.init, first.finalize)
    load(hooks, 17)
    leave_device_state(True)
    assert first.calls == [("init", 17)]  # after a failure kernels may still run on it
    fill_device_state(second.init, second.finalize)
    require_device_state()
    require_device_state()
    assert second.calls == [("init", 17)]


def test_a_status_is_an_error_and_no_launch_goes_on_without_state(hooks: dict[str, Any]) -> None:
    library = Library()
    fill_device_state(library.init, library.finalize)
    library.status = 7
    with pytest.raises(CodegenError, match="kernel put_nvshmem .status 7"):
        load(hooks, 17)
    target = KernelTarget(torch.device("cuda"))
    assert target.options("peer") == {}
    with pytest.raises(CodegenError, match="status 7"):  # Triton keeps the module: the next launch would run it
        target.options("mixed")
    library.status = 0
    target.options("nvshmem")
    target.options("nvshmem")
    assert library.calls == [("init", 17)] * 3


def test_no_module_is_filled_in_a_capture(hooks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    fill_device_state(library.init, library.finalize)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CodegenError, match="Call the model once before the capture"):
        load(hooks, 17)
    assert library.calls == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    require_device_state()
    assert library.calls == [("init", 17)]
