"""The quick part of the table of faults (tests/support/torture/); the whole is `make torture`."""

from __future__ import annotations

import os

import pytest
from torture.job import run_fault
from torture.judge import judge
from torture.table import Fault, all_faults

pytestmark = pytest.mark.ranks

QUICK = [fault for fault in all_faults() if fault.quick]


@pytest.mark.parametrize("fault", QUICK, ids=[fault.name for fault in QUICK])
def test_a_fault_is_seen_by_every_rank_and_leaves_nothing(fault: Fault) -> None:
    if fault.needs_root and os.geteuid() != 0:
        pytest.skip("needs root for a mount of its own")
    verdict = judge(run_fault(fault))
    assert verdict.passes, f"{verdict.seen}\n" + "\n".join(verdict.problems)
