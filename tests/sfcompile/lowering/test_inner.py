"""What runs a graph: Inductor, or eager where no compiler is installed."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from sfcompile.lowering.inner import run_inner
from sfcompile.options import Options


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()


def test_eager_is_the_graph_itself() -> None:
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    assert run_inner(gm, [torch.zeros(1, 2)], None, Options.from_dict({"inner": "eager"})) == gm.forward


def test_no_compiler_means_eager_with_a_warning(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="streamfusion")(x), model(x))
    assert "no C++ compiler found" in caplog.text
