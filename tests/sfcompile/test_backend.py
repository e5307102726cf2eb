"""The backend with one rank; with several: tests/e2e."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sfcompile import backend
from sfcompile.backend import last_report, streamfusion_backend
from sfcompile.errors import OptionError
from sfcompile.options import Options
from sfcompile.runtime.program.topology import Topology


@pytest.fixture
def model() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()


def test_one_rank_runs_the_model_as_it_is(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    with torch.no_grad():
        run = torch.compile(model, backend="streamfusion", options={"inner": "eager"})
        assert torch.equal(run(x), model(x))
    assert last_report() is None


def test_one_rank_says_once_that_nothing_is_sharded(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    backend._say_alone.cache_clear()
    with torch.no_grad(), caplog.at_level(logging.INFO, "sfcompile"):
        for size in (3, 4):
            torch._dynamo.reset()
            torch.compile(model, backend="streamfusion", options={"inner": "eager"})(torch.randn(size, 8))
    assert ["sfcompile run --ranks 4" in record.message for record in caplog.records] == [True]


def test_one_rank_goes_through_inductor_with_its_mode(model: nn.Module) -> None:
    x = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="streamfusion", mode="default")(x), model(x))


def test_torch_finds_the_backend_by_name() -> None:
    assert "streamfusion" in torch._dynamo.list_backends()
    assert torch._dynamo.lookup_backend("streamfusion") is streamfusion_backend


def test_options_are_checked_before_anything_runs(model: nn.Module) -> None:
    with torch.no_grad(), pytest.raises(OptionError, match="Did you mean 'mesh'"):
        torch.compile(model, backend="streamfusion", options={"meshh": 1})(torch.randn(3, 8))


def test_gpus_of_several_kinds_are_planned_for_as_rank_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that planned on constants of their own GPU would plan differently."""
    first, own = (Topology.parse(f"1x1:{name}").on((0, 1)) for name in ("a100-efa", "h100-ib"))
    monkeypatch.setattr(backend, "device_of", lambda inputs: torch.device("cuda"))
    monkeypatch.setattr(backend, "topology_for", lambda device, job: own)
    session: Any = SimpleNamespace(topology=Topology((0, 1)), exchange=lambda value, doing: [first, value])
    assert backend._links(Options(topology="auto:assumed"), None, session, []).topology == first != own
