"""What a call of a compiled graph looks at before it runs. Between ranks: tests/e2e/test_hidden_inputs.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from threads import run_threads
from torch import fx, nn

from sfcompile.capture.graph import Captured
from sfcompile.errors import OptionError, UnsupportedError
from sfcompile.graph_call import (
    GPU_LOOKS,
    _can_look,
    compared_inputs,
    compared_weights,
    not_shared,
    refuse_sharded,
    share_weights,
    watched,
)
from sfcompile.options import Options
from sfcompile.passes.report.report import GraphReport
from sfcompile.passes.report.steps import FIRST_CALLS, LEAST_CALLS
from sfcompile.passes.runner import Compiled
from sfcompile.runtime.program.stages import GraphStages
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session
from sfcompile.shared_inputs import SharedInputs
from sfcompile.torch_private import FakeTensorMode


class Named(torch.Tensor):
    """Its ops are torch's."""


INPUTS = [torch.ones(2), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), 3, torch.ones(2).to_sparse()]


def graph(written: tuple[int, ...] = (), numbers: tuple[int, ...] = ()) -> Captured:
    # Written and not traced: a trace takes the place of every module's call, and two threads that trace at a time may
    # leave it there.
    identity = fx.Graph()
    identity.output(identity.placeholder("input"))
    gm = fx.GraphModule({}, identity)
    return Captured((0, 1, 2, 4), written, numbers, gm=gm, mode=FakeTensorMode())


@pytest.mark.parametrize("inputs", ["checked", "rank0"])
def test_written_buffers_go_with_the_inputs(inputs: str) -> None:
    asked = Options(inputs=inputs)
    assert compared_inputs(INPUTS, asked, graph()) == (0,)
    assert compared_inputs(INPUTS, asked, graph(written=(2,))) == (0, 2)
    assert compared_inputs(INPUTS, asked, graph(numbers=(3,))) == (0, 3)
    assert compared_weights(INPUTS, asked) == (1, 2)


def test_tensors_of_a_class_that_keeps_torchs_meaning_are_compared_too() -> None:
    inputs = [torch.ones(2).as_subclass(Named), nn.Parameter(torch.ones(2).as_subclass(Named)), *INPUTS[2:]]
    assert compared_inputs(inputs, Options(), graph()) == (0,)
    assert compared_weights(inputs, Options()) == (1, 2)


def test_ranks_that_trust_each_other_compare_nothing() -> None:
    asked = Options(inputs="trusted")
    assert compared_inputs(INPUTS, asked, graph(written=(2,))) == compared_weights(INPUTS, asked) == ()


def test_gpus_look_at_first_calls_only() -> None:
    assert all(_can_look(torch.device("cpu"), call) for call in (1, GPU_LOOKS + 1))
    assert not _can_look(torch.device("cuda"), GPU_LOOKS + 1)


def test_a_refusal_is_every_ranks() -> None:
    error = not_shared(UnsupportedError("a graph with a loop"))
    assert error.on_every_rank and "a graph with a loop" in str(error) and "'checked'" in str(error)


@pytest.mark.parametrize(
    ("asked", "device", "machines", "text"),
    [
        ({"weights": "sharded", "mode": "reduce-overhead"}, "cuda", 1, "cuda and mode='reduce-overhead'"),
        ({"weights": "sharded", "mode": "max-autotune"}, "cuda", 1, "records CUDA graphs"),
        ({"weights": "sharded", "transport": "c10d"}, "cpu", 1, "transport='c10d'"),
    ],
)
def test_where_weights_cannot_be_sharded(asked: dict[str, str], device: str, machines: int, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        refuse_sharded(Options(**asked), torch.device(device), Topology.grid(machines, 2))  # type: ignore[arg-type]


def test_gpus_of_unequal_machines_hold_no_copy_a_machine() -> None:
    with pytest.raises(OptionError, match="machines of unequal numbers of ranks"):
        refuse_sharded(Options(weights="sharded-by-machine"), torch.device("cuda"), Topology((0, 0, 1)))
    refuse_sharded(Options(weights="sharded-by-machine"), torch.device("cuda"), Topology((0, 0, 1, 1)))


def test_where_weights_can_be_sharded() -> None:
    refuse_sharded(Options(), torch.device("cuda"), Topology.grid(2, 2))
    refuse_sharded(Options(weights="sharded"), torch.device("cuda"), Topology.grid(1, 2))
    refuse_sharded(
        Options(weights="sharded", mode="max-autotune-no-cudagraphs"), torch.device("cuda"), Topology.grid(1, 2)
    )
    refuse_sharded(Options(weights="sharded"), torch.device("cpu"), Topology.grid(1, 2))
    refuse_sharded(Options(weights="sharded"), torch.device("cpu"), Topology.grid(2, 2))
    refuse_sharded(Options(weights="sharded-by-machine"), torch.device("cpu"), Topology.grid(2, 2))


def test_weights_that_the_graph_writes_to_stay_each_ranks() -> None:
    """Also of ranks that trust each other: what is shared is compared to the last bit."""

    def work(rank: int) -> str:
        inputs = [torch.ones(2), nn.Parameter(torch.ones(200, 200)), nn.Parameter(torch.ones(200, 200))]
        assert share_weights(["x", "w", "b"], inputs, graph(), current_session(), Options()) is None
        asked = Options(weights="sharded", inputs="trusted")
        kept = share_weights(["x", "w", "b"], inputs, graph(written=(2,)), current_session(), asked)
        assert kept is not None
        return kept.line

    for line in run_threads(2, work):
        assert line == "156.2 KiB of 156.2 KiB lie once for the 2 ranks of a machine"


def test_steps_are_compared_with_all_that_a_call_takes() -> None:
    """Rank 0's inputs are sent within the call, so the prediction holds them; a call that one process's is compared
    with takes two steps, and does not count."""
    topology = Topology.grid(2, 1, network_bytes_per_s=1e6)
    shared = SharedInputs("g", [((1 << 20,), torch.uint8)], 2, torch.device("cpu"))
    report = GraphReport(2, 2, 1, 2, stages=GraphStages((), 0.25))
    compiled = Compiled(graph().gm, {}, report)
    verifier = SimpleNamespace(calls=2)
    session = SimpleNamespace(rank=0, waited_s={})

    def run() -> None:
        verifier.calls = max(0, verifier.calls - 1)

    timed = watched(run, compiled, session, topology, shared, verifier)  # type: ignore[arg-type]
    for _ in range(2 + FIRST_CALLS + LEAST_CALLS):
        assert report.steps is not None and report.steps.summary == ""
        timed()
    assert report.steps.summary != "" and shared.seconds(topology) > 1.0
    assert f"predicted {0.25 + shared.seconds(topology):.3g} s" in report.steps.summary
