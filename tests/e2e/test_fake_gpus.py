"""A model on GPU ranks without NVSHMEM, from capture to output: every rank's graph on fake GPUs, exact."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from device_workers import joint_attention
from fake_device import POLICIES, RANK_0_LATE, STORES_LATE, Gpu, Nccl
from fake_ranks import largest, on_fake_gpus
from helpers import captured, placeholder_values
from torch import fx, nn
from torch.nn import functional as F

from sfcompile.capture.graph import Captured, capture
from sfcompile.errors import RankMismatchError
from sfcompile.graph_call import CallFacts, as_called
from sfcompile.options import Options
from sfcompile.passes.runner import Compiled, run_pipeline
from sfcompile.passes.state import Asked, ShardedWeights, State
from sfcompile.runtime.gpu import symmetric_side
from sfcompile.runtime.gpu.stores import StoreTransport
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.program.weight_rows import WeightRows, places_of
from sfcompile.runtime.rank.session import current_session
from sfcompile.runtime.rank.sharded_weight import History, ShardedWeight
from sfcompile.runtime.wires.c10d import PairedTransport
from sfcompile.sharded_weights import gather_of

LAYOUTS = ((0, 0), (0, 1), (0, 0, 0, 0), (0, 0, 1, 1))
CELLS = [
    # `make test` has either carrier on four ranks of one machine or of two, and both on two ranks.
    pytest.param(
        machines, stores, id=f"{machines}-{'symm_mem' if stores else 'nccl'}",
        marks=pytest.mark.thorough if len(machines) == 4 and stores != (1 in machines) else (),
    )
    for machines in LAYOUTS for stores in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("machine_of", "stores"), CELLS)
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


class Layers(nn.Module):
    """Three attentions with an MLP each; nearly all of its memory is weights. Rows of one are no multiple of ranks.

    Args:
        attends: else MLPs alone, and no rank waits for another behind the last weight.
    """

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        self.qkv = nn.ModuleList(nn.Linear(64, 192, bias=False) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(64, 250, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(250, 64, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for qkv, up, down in zip(self.qkv, self.up, self.down, strict=True):
            if self.attends:
                q, k, v = (part.unflatten(-1, (2, 32)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
                x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + down(F.gelu(up(x)))
        return x


LARGEST = 4 * 64 * 250
CALLS = 3


@cache
def layers(attends: bool) -> tuple[Captured, list[torch.Tensor], tuple[int, ...], list[torch.Tensor]]:
    """The captured graph, values of its inputs, which of them are weights, and what three calls should give: after each
    the weights are halved."""
    got = captured(Layers(attends), torch.zeros(*((1, 12) if attends else ()), 64))
    values = placeholder_values(got)
    places = tuple(i for i, value in enumerate(values) if value.dim() == 2)
    assert len(places) == (9 if attends else 6) and got.tensor_inputs == tuple(range(len(values)))
    with torch.no_grad():
        wants = [
            got.gm(*(value / 2**call if i in places else value for i, value in enumerate(values)))[0]
            for call in range(CALLS)
        ]
    return got, values, places, wants


def compiled_for(topology: Topology, in_shares: bool, by_machine: bool = False, attends: bool = True) -> list[Compiled]:
    """Every rank's graph."""
    got, _, places, _ = layers(attends)
    ranks: list[Compiled] = []
    answers: list[Any] = []

    def agree(choose: Callable[[], Any]) -> Any:
        """Rank 0's answers for all."""
        if not ranks:
            answers.append(choose())
            return answers[-1]
        asked_before[0] += 1
        return answers[asked_before[0] - 1]

    for rank in range(topology.num_ranks):
        asked_before = [0]
        weights = ShardedWeights(places, topology, rank, by_machine) if in_shares else None
        asked = Asked(agree=agree, shard_everything=True, split_batch=False, parts=(), late_reads=True, weights=weights)
        ranks.append(run_pipeline(State(got.gm, got.mode, topology, rank, asked)))
    assert len({tuple(each.order) for each in ranks}) == 1
    return ranks


def calls_of_layers(
    monkeypatch: pytest.MonkeyPatch, ranks: list[Compiled], machine_of: tuple[int, ...], seed: int, policy: str,
    in_shares: bool = True, most: list[int] | None = None, by_machine: bool = False, attends: bool = True,
    **how: Any,
) -> float:  # fmt: skip
    """Calls as a compiled model makes them; right after each, every rank writes to its share of every weight. The
    largest error.

    Args:
        most: by rank, bytes of memory that its GPU held at most, beside the weights.
    """
    got, values, places, wants = layers(attends)

    def work(rank: int, gpu: Gpu) -> float:
        session, args = current_session(), list(values)
        gather = gather_of(session, Options())
        for i in places:
            args[i] = values[i].clone()
            if in_shares:
                cut = WeightRows(tuple(values[i].shape), places_of(machine_of, by_machine))
                args[i] = ShardedWeight(args[i][slice(*cut.rows(rank))].clone(), cut, rank, History(gather, 1))
        gpu.held_bytes = gpu.most_bytes = 0
        for program, schedules in ranks[rank].programs.items():
            session.load(program, schedules)
        facts = CallFacts(session, "model", [str(i) for i in range(len(args))], got, (), (), None, True, False,
                          shares=places if in_shares else ())  # fmt: skip
        run, outs = as_called(ranks[rank].gm, facts), []
        with torch.no_grad():
            for _ in range(CALLS):
                outs.append(run(*args)[0])
                for i in places:
                    own: Any = args[i]
                    (own.shard if in_shares else own).mul_(0.5)
            gpu.synchronize()
        if most is not None:
            most[rank] = gpu.most_bytes
        return largest(
            float((out - want).abs().max() / want.abs().max()) for out, want in zip(outs, wants, strict=True)
        )

    return on_fake_gpus(monkeypatch, machine_of, work, seed, policy, **how)


@pytest.mark.parametrize(("machine_of", "stores"), CELLS)
def test_weights_in_shares_are_gathered(
    monkeypatch: pytest.MonkeyPatch, machine_of: tuple[int, ...], stores: bool
) -> None:
    """In every kind of order between streams, with one rank late, and though weights are written to between calls."""
    for attends in (True, False):
        ranks = compiled_for(Topology(machine_of), in_shares=True, attends=attends)
        late = STORES_LATE if stores else RANK_0_LATE
        for seed, policy in enumerate([*POLICIES, late]):
            error = calls_of_layers(monkeypatch, ranks, machine_of, seed, policy, attends=attends, stores=stores)
            assert error <= 1e-5


def test_gpus_of_each_machine_hold_all_weights_together(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_of = (0, 0, 1, 1)
    ranks = compiled_for(Topology(machine_of), True, by_machine=True)
    for seed, policy in enumerate(POLICIES):
        assert calls_of_layers(monkeypatch, ranks, machine_of, seed, policy, by_machine=True, stores=True) <= 1e-5


def test_a_rank_holds_no_more_than_the_weights_that_are_read_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its share, and what it holds with whole weights: two banks for what comes, and three that are whole."""
    machine_of, most, before = (0, 0), [0, 0], [0, 0]
    for in_shares, held in ((False, before), (True, most)):
        ranks = compiled_for(Topology(machine_of), in_shares)
        assert calls_of_layers(monkeypatch, ranks, machine_of, 1, "messages late", in_shares, held) <= 1e-5
    banks = 2 * (LARGEST // 2)
    assert max(now - then for now, then in zip(most, before, strict=True)) <= banks + 3 * LARGEST + 4096


@pytest.mark.parametrize("stores", [False, True])
def test_a_state_dict_counts_from_the_next_call_on(monkeypatch: pytest.MonkeyPatch, stores: bool) -> None:
    """Loaded into weights in shares as into whole ones, right behind a call whose puts may still be read."""
    machine_of = (0, 0)
    got, values, places, wants = layers(True)
    ranks = compiled_for(Topology(machine_of), in_shares=True)

    def work(rank: int, gpu: Gpu) -> float:
        session, args, model = current_session(), list(values), nn.ParameterDict()
        gather = gather_of(session, Options())
        for i in places:
            cut = WeightRows(tuple(values[i].shape), places_of(machine_of, False))
            shard = values[i][slice(*cut.rows(rank))].clone()
            model[str(i)] = nn.Parameter(ShardedWeight(shard, cut, rank, History(gather, 1)), requires_grad=False)
            args[i] = model[str(i)]
        for program, schedules in ranks[rank].programs.items():
            session.load(program, schedules)
        names = [str(i) for i in range(len(args))]
        facts = CallFacts(session, "model", names, got, (), (), None, True, False, shares=places)
        run, outs = as_called(ranks[rank].gm, facts), []
        with torch.no_grad():
            for call in range(CALLS):
                outs.append(run(*args)[0])
                model.load_state_dict({str(i): values[i] / 2 ** (call + 1) for i in places})
            gpu.synchronize()
        return largest(
            float((out - want).abs().max() / want.abs().max()) for out, want in zip(outs, wants, strict=True)
        )

    for seed, policy in enumerate([*POLICIES, STORES_LATE if stores else RANK_0_LATE]):
        assert on_fake_gpus(monkeypatch, machine_of, work, seed, policy, stores=stores) <= 1e-5


class StoresUnawaited(StoreTransport):
    """Ends an epoch while what it sent is still read; all of that stays in memory."""

    def finish(self, epoch: int) -> None:
        self._for_ever = [*getattr(self, "_for_ever", []), *self._kept]
        self._kept = []
        super().finish(epoch)


class ReadsUnawaited(PairedTransport):
    """Reads a slot before its chunk has come, as that of the call before, whose word is as good, lies in it."""

    def wait(self, src: int, slot: int, epoch: int) -> None:
        self._receives.pop((epoch, slot), None)


class WithoutCredit(StoreTransport):
    """Overwrites a bank that others may still read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._peers = []


@pytest.mark.parametrize("mutant", [StoresUnawaited, ReadsUnawaited, WithoutCredit, "groups start early"])
def test_an_order_too_little_is_seen(monkeypatch: pytest.MonkeyPatch, mutant: Any) -> None:
    """In some order of the streams a weight is another one, and the result wrong, or a chunk is of another call."""
    how: dict[str, Any] = {}
    if isinstance(mutant, str):
        how["nccl"] = Nccl(after_current=False)
    elif issubclass(mutant, StoreTransport):
        monkeypatch.setattr(symmetric_side, "StoreTransport", mutant)
        how["stores"] = True
    else:
        how["transport"] = mutant
    attends = mutant is not StoresUnawaited  # else a rank's output holds up the other, and with it what that writes
    ranks = compiled_for(Topology((0, 0)), in_shares=True, attends=attends)
    # Late is by the clock: where a thread of the host rested for long, what is late ran all the same. So several times.
    for seed, policy in enumerate([*POLICIES, *(4 * [STORES_LATE, RANK_0_LATE])]):
        try:
            error = calls_of_layers(monkeypatch, ranks, (0, 0), seed, policy, attends=attends, **how)
        except RankMismatchError:
            return
        if not error <= 1e-5:
            return
    raise AssertionError("no order of the streams showed it")
