"""inputs="rank0": one set of inputs for all ranks, whatever each was given."""

from __future__ import annotations

import pytest
import shared_input_ranks
import torch
from processes import run_outcomes, run_processes
from threads import run_threads

from sfcompile.errors import RankMismatchError, StreamFusionError, UnsupportedError
from sfcompile.runtime.program.topology import Topology
from sfcompile.runtime.rank.session import current_session
from sfcompile.shared_inputs import SharedInputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_values_of_every_dtype_and_layout(ranks: int) -> None:
    """To the bit, laid out like the tensors that a rank was given."""
    gen = torch.Generator().manual_seed(0)
    whole = torch.rand(6, 5, 4, generator=gen)
    given = [
        whole,
        whole[::2, :, 1:3],
        whole.permute(2, 0, 1),
        whole[:1].expand(3, 5, 4),
        whole[0, 0, 0],
        whole[:0],
        whole.to(torch.bfloat16)[:, :1].expand(6, 7, 4)[::3],
        whole > 0.5,
        torch.complex(whole, whole).conj(),
        (whole * 100).to(torch.uint16),
        whole.to(torch.float8_e4m3fn),
        whole.double()[1:, 1:],
    ]
    shared = SharedInputs("g", [(tuple(x.shape), x.dtype) for x in given], ranks, CPU)

    def work(rank: int) -> None:
        session = current_session()
        session.load(shared.program, shared.schedules)
        mine = [x if rank == 0 else torch.zeros_like(x) if x.is_contiguous() else _others(x) for x in given]
        for value, own, want in zip(shared.share(session, mine), mine, given, strict=True):
            assert (value.shape, value.dtype, value.stride()) == (own.shape, own.dtype, own.stride())
            assert torch.equal(value.resolve_conj().contiguous().view(-1).view(torch.uint8), _bytes(want))
            assert not value.numel() or value.data_ptr() != own.data_ptr()

    run_threads(ranks, work, timeout_s=20.0)
    assert f"{shared.nbytes / 2**20:.2f} MiB" in shared.line(Topology.grid(1, ranks))


def _others(x: torch.Tensor) -> torch.Tensor:
    """Zeros laid out alike."""
    reach = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True) if size)
    return torch.zeros(reach, dtype=x.dtype).as_strided(x.shape, x.stride())


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.resolve_conj().contiguous().view(-1).view(torch.uint8)


def test_nothing_to_send_is_no_traffic() -> None:
    shared = SharedInputs("g", [((0, 3), torch.float32)], 2, CPU)
    assert shared.schedules == [] and shared.nbytes == 0


def test_elements_on_one_another_are_refused() -> None:
    windows = torch.arange(8.0).as_strided((4, 3), (1, 1))
    shared = SharedInputs("g", [((4, 3), torch.float32)], 2, CPU)

    def work(rank: int) -> None:
        session = current_session()
        session.load(shared.program, shared.schedules)
        with pytest.raises(UnsupportedError, match="lie on one another"):
            shared.share(session, [windows])

    run_threads(2, work, timeout_s=20.0)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("machine_of", "transport", "dynamic", "inner"),
    [
        ((0, 0), "auto", True, "eager"),
        ((0, 1), "auto", False, "eager"),
        pytest.param((0, 0, 1), "c10d", False, "eager", marks=pytest.mark.thorough),
        pytest.param((0, 0), "auto", True, "inductor", marks=pytest.mark.thorough),
    ],
)
def test_ranks_that_were_given_other_values(
    machine_of: tuple[int, ...], transport: str, dynamic: bool, inner: str
) -> None:
    """Shared memory, TCP and gloo; what is written to gets what rank 0's would, all else is left as it was."""
    options = {"transport": transport, "inner": inner, "placement": "shard"}
    results = run_processes(len(machine_of), shared_input_ranks.every_kind, (options, dynamic), machine_of, 240.0)
    for result in results:
        assert result["worst"] < 2e-5 and result["untouched"], result["worst"]
        assert "rank 0's, sent to all before the step: " in result["report"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("how", "dynamic", "words"),
    [
        ("shapes", True, ""),
        ("weights", False, "weights (are they seeded or loaded alike?)"),
        ("values", False, "not in the same call"),
        ("values", True, "not in the same call"),
    ],
)
def test_what_must_be_equal_is_an_error_on_every_rank(how: str, dynamic: bool, words: str) -> None:
    """Shapes and weights with inputs="rank0"; values without it, with symbolic sizes too."""
    for outcome in run_outcomes(2, shared_input_ranks.fails, (how, dynamic), timeout_s=200.0):
        assert isinstance(outcome.error, StreamFusionError if how == "shapes" else RankMismatchError), outcome.log
        assert words in str(outcome.error)


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["a class", "a mode", "many programs"])
def test_what_runs_as_python_is_refused(how: str) -> None:
    """At every call, on every rank: results would be each rank's own."""
    for seen in run_processes(2, shared_input_ranks.left_to_python, (how,), timeout_s=200.0):
        assert len(seen) == 2 and all("is not compiled" in str(call) for call in seen), seen
