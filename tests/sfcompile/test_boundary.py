"""Values that cross a graph break in shards: one site, no gather, and the same values for whoever reads them."""

from __future__ import annotations

import boundary_cases
import pytest
from processes import preload, run_processes

from sfcompile.errors import OptionError
from sfcompile.options import Options

preload("boundary_cases", "model_cases", "sfcompile.backend")


@pytest.mark.ranks
@pytest.mark.parametrize(("case", "homes"), [("split", [0, 0]), ("read", [0, 1]), ("uneven", [0, 0, 1])])
def test_values_cross_a_break(case: str, homes: list[int]) -> None:
    run_processes(len(homes), boundary_cases.run, (case,), homes, timeout_s=120.0)


def test_the_option_is_checked() -> None:
    assert Options.from_dict({}).boundaries == "whole"
    with pytest.raises(OptionError, match="'whole', 'shards'"):
        Options.from_dict({"boundaries": "half"})
    with pytest.raises(OptionError, match="together with inputs='rank0'"):
        Options.from_dict({"boundaries": "shards", "inputs": "rank0"})
