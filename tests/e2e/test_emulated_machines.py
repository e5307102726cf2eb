"""Two emulated machines with a 200 Mbit link, two ranks each, started by plain torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from emulated_machines import CannotEmulate, emulated_machines  # noqa: E402

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("models", [["plain"], pytest.param(["flux", "wan_t2v"], marks=pytest.mark.thorough)])
def test_models_over_shaped_links_and_machines_found_by_themselves(models: list[str]) -> None:
    try:
        with emulated_machines(2, "200mbit") as cluster:
            worker = str(ROOT / "tests" / "support" / "model_cases.py")
            code, outputs = cluster.torchrun(2, [worker, "two_machines", *models])
    except CannotEmulate as reason:
        pytest.skip(f"this machine cannot make network namespaces: {reason}")
    assert code == 0, "\n".join(outputs)[-6000:]
