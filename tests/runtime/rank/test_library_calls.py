"""A library's function as an op: it is called as the model calls it, and what it returns is held to what was said."""

from __future__ import annotations

import pytest
import torch

from sfcompile.errors import UnsupportedError
from sfcompile.runtime.rank.library_calls import CALLS, LibraryCall, TensorAt


def attend(q: torch.Tensor, scale: float, v: torch.Tensor, **rest: int) -> torch.Tensor:
    """Returns v's width, or what the test wants."""
    if rest.get("wrong"):
        return q.double()
    assert torch.is_autocast_enabled("cpu")
    return (q.sum(-1, keepdim=True) * scale).expand(*q.shape[:-1], v.shape[-1])


def test_a_call_is_made_as_it_was_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"q": TensorAt(0), "scale": 0.5, "v": TensorAt(1)}
    for name, rest in (("right", {}), ("wrong", {"wrong": 1})):
        around = {"cpu": (True, torch.bfloat16)}
        call = LibraryCall(attend, {**given, "**": rest}, {0: "BHLD", 1: "BHLD"}, "BHLD", around)
        monkeypatch.setitem(CALLS, name, call)
    q, v = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5)
    out = torch.ops.streamfusion.library_call([q, v], "right")
    torch.testing.assert_close(out, (q.sum(-1, keepdim=True) * 0.5).expand(1, 2, 3, 5))
    assert out.is_contiguous() and not torch.is_autocast_enabled("cpu")
    with pytest.raises(UnsupportedError, match=r"wrong returned torch.float64 \[1, 2, 3, 4\] where torch.float32"):
        torch.ops.streamfusion.library_call([q, v], "wrong")
