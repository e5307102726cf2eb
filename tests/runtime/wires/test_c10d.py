"""gloo messages between ranks that share no memory."""

from __future__ import annotations

import device_workers
import pytest
import rank_workers
import torch
from processes import run_outcomes, run_processes

from sfcompile.errors import PeerDiedError, PeerFailedError, RuntimeTimeoutError
from sfcompile.runtime.wires import c10d as transport_c10d
from sfcompile.runtime.wires.transport import Source

pytestmark = pytest.mark.ranks


class FakeWork:
    """A message that gloo still holds."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.gone = False

    def wait(self, timeout: object) -> None:
        self.gone = True


def test_what_gloo_still_reads_is_ours_until_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is a copy with the call's word behind it; ``finish`` waits for exactly the epochs that end."""
    sent: list[FakeWork] = []

    def isend(tensor: torch.Tensor, dst: int, group: object, tag: int) -> FakeWork:
        sent.append(FakeWork(tensor))
        return sent[-1]

    monkeypatch.setattr(transport_c10d.dist, "isend", isend)
    monkeypatch.setattr(transport_c10d.dist, "get_process_group_ranks", lambda group: [0, 1])
    transport = transport_c10d.C10dTransport(0, None, 1.0, lambda: None)  # type: ignore[arg-type]
    caller, slot = torch.ones(4), torch.ones(4)
    transport.put(1, 0, 0, caller, epoch=1)
    transport.put(1, 1, 0, slot, epoch=2, source=Source.BANK)
    transport.put(1, 2, 0, torch.empty(0), epoch=1)
    assert len(sent) == 2
    for work, chunk in zip(sent, (caller, slot), strict=True):
        assert work.tensor.nbytes == chunk.nbytes + 8
        assert torch.equal(work.tensor[: chunk.nbytes].view(chunk.dtype), chunk)
    caller.zero_()
    assert sent[0].tensor[:16].view(torch.float32).tolist() == [1.0] * 4
    transport.finish(1)
    assert [work.gone for work in sent] == [True, False]
    transport.finish(2)
    assert [work.gone for work in sent] == [True, True]


@pytest.mark.parametrize(("machine_of", "transport"), [((0, 1), "c10d"), ((0, 0, 0), "c10d")])
@pytest.mark.parametrize("seed", [11, 12])
def test_attention_between_machines(machine_of: tuple[int, ...], transport: str, seed: int) -> None:
    results = run_processes(len(machine_of), rank_workers.attention, (seed, transport, 4), machine_of)
    for result in results:
        assert result["error"] < 1e-5 and result["same"] and result["machines"] == machine_of


def test_a_killed_rank_closes_its_connections() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("c10d", 2, "kill"), (0, 0, 1))
    assert outcomes[2].exit_code == -9
    for outcome in outcomes[:2]:
        assert isinstance(outcome.error, PeerDiedError | PeerFailedError) and "rank 2" in str(outcome.error)
        assert outcome.seconds < outcomes[2].seconds + 5


def test_a_failure_reaches_other_machines_with_its_first_words() -> None:
    outcomes = run_outcomes(3, rank_workers.one_dies, ("c10d", 0, "raise"), (0, 1, 1))
    assert isinstance(outcomes[0].error, ValueError)
    for outcome in outcomes[1:]:
        assert isinstance(outcome.error, PeerFailedError)
        assert "failed first: rank 0: ValueError: the victim's own mistake" in str(outcome.error)


def test_gloo_takes_over_where_connections_cannot_be_made() -> None:
    for result in run_processes(3, rank_workers.without_connections, (11,), (0, 1, 1)):
        assert result["error"] < 1e-5 and result["same"] and result["wires"] == "C10dTransport"


def test_messages_without_tags_match_by_order() -> None:
    """As NCCL's do: the group of a slot's send and receive is at the same place of every rank's row."""
    for result in run_processes(4, device_workers.over_messages, (11, 4), (0, 0, 1, 1)):
        assert result["error"] < 1e-5 and result["same"]


def test_a_slow_rank_is_a_timeout() -> None:
    outcomes = run_outcomes(2, rank_workers.one_dies, ("c10d", 1, "sleep"))
    assert isinstance(outcomes[0].error, RuntimeTimeoutError)
    assert "waited 2 s for its message with rank 1" in str(outcomes[0].error)
