"""A model on GPU ranks without NVSHMEM, from capture to output: every rank's graph on fake GPUs, exact."""

from __future__ import annotations

import pytest
import torch
from device_workers import joint_attention
from fake_device import POLICIES, Gpu
from fake_ranks import largest, on_fake_gpus
from torch import fx

from sfcompile.capture.graph import capture
from sfcompile.passes.runner import run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session

LAYOUTS = ((0, 0), (0, 1), (0, 0, 0, 0), (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("machine_of", "stores"),
    [
        # `make test` has either carrier on four ranks of one machine or of two, and both on two ranks.
        pytest.param(
            machines, stores, id=f"{machines}-{'symm_mem' if stores else 'nccl'}",
            marks=pytest.mark.thorough if len(machines) == 4 and stores != (1 in machines) else (),
        )
        for machines in LAYOUTS for stores in (False, True)
    ],
)  # fmt: skip
def test_a_model_is_exact(monkeypatch: pytest.MonkeyPatch, machine_of: tuple[int, ...], stores: bool) -> None:
    """Joint attention with norms and RoPE, three calls, in every kind of order between streams."""
    torch.manual_seed(0)
    tables = (torch.randn(1, 14, 1, 16), torch.randn(1, 14, 1, 16))
    inputs = [torch.randn(1, 10, 32), torch.randn(1, 4, 32), *(torch.randn(32, 32) for _ in range(4))]
    inputs += [torch.randn(16), torch.randn(16), *tables]
    topology = Topology(machine_of)
    with torch.no_grad():
        got = capture(fx.symbolic_trace(joint_attention), inputs)
        asked = Asked(shard_everything=True, split_batch=False, parts=())
        ranks = [run_pipeline(State(got.gm, got.mode, topology, r, asked)) for r in range(topology.num_ranks)]
        assert len({tuple(compiled.order) for compiled in ranks}) == 1 and ranks[0].report.sharded_sites == 1
        (want,) = got.gm(*inputs)

    def work(rank: int, gpu: Gpu) -> float:
        session, compiled, outs = current_session(), ranks[rank], []
        with torch.no_grad():
            for program, schedules in compiled.programs.items():
                session.load(program, schedules)
            for _ in range(3):
                with session.call("model", []):
                    outs.append(compiled.gm(*inputs)[0])
            gpu.synchronize()
        return largest(float((out - want).abs().max() / want.abs().max()) for out in outs)

    for seed, policy in enumerate(POLICIES):
        assert on_fake_gpus(monkeypatch, machine_of, work, seed, policy, stores=stores) <= 1e-5
