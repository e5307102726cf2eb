"""What would carry chunks between the GPUs of this machine, and why not what would be better."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from sfcompile.commands import gpu_transport as commands
from sfcompile.commands.gpu_transport import gpu_transport


def test_layers_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvshmem", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    text, hindrance = gpu_transport()
    assert text.startswith("none") and "not symm_mem: GPUs 0 and 1 do not" in text and "built without it" in text
    assert hindrance
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    text, hindrance = gpu_transport()
    assert text.startswith("nccl: messages") and "not nvshmem: nvshmem4py does not load" in text
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    assert gpu_transport()[0].startswith("symm_mem: stores") and gpu_transport()[1].startswith("no NVSHMEM")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "not symm_mem: there is one GPU" in gpu_transport()[0]
    for name in ("nvshmem", "nvshmem.core"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert gpu_transport()[0].startswith("nvshmem: one-sided") and gpu_transport()[1] == ""
    monkeypatch.setattr(commands, "find_spec", lambda name: None)
    assert "not nvshmem: Triton, in which" in gpu_transport()[0] and gpu_transport()[1]
