"""docs/models.md is what the result files say, and says what each row of them says."""

from __future__ import annotations

from pathlib import Path

import diffusers_zoo as diffusers_zoo  # declares the models
import pytest
from diffusers_zoo.registry import CLASSES
from zoo_page import RESULTS, page, rows, tried

ROOT = Path(__file__).resolve().parents[2]

FILE = """python benchmarks/zoo.py --ranks 4
model                            error   share gathers       KiB graphs  capture s passes s Inductor s first s  plan
one                    exact   3.7e-07   1.006       2      36.0      1       3.10     2.94        0.0    14.0  usp 2x2
two                    WRONG   8.0e-01   1.200       2      36.0      3       3.10     2.94        0.0    14.0  ring 1x4
none                   exact   0.0e+00     nan       0     0.0      1      3.10    2.94      nan  14.0  nothing sharded
three                  FAILED  TypeError: no
1 of 3 exact; 1 of 1 of one graph at most 1.1 x total/P
"""


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "models.md").read_text() == page(tried(), CLASSES), (
        "run benchmarks/zoo.py --page docs/models.md"
    )


@pytest.mark.parametrize("path", [max(RESULTS.glob("*-zoo-4-ranks.txt")), max(RESULTS.glob("*-zoo-convolutional.txt"))])
def test_no_row_of_a_file_is_missed(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line.split()[1:2] in (["exact"], ["WRONG"], ["FAILED"])]
    assert len(list(rows(path))) == len(lines) > 10


def test_failures_are_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "2026-01-02-zoo-4-ranks.txt").write_text(FILE)
    (tmp_path / "2026-01-01-zoo-4-ranks.txt").write_text(FILE.replace("one", "old"))
    text = page(tried(tmp_path), {"one": "First"})
    assert "2 of 4 are exact; of the 2 that are one graph, 1 give" in text
    assert "| one | First | 3.7e-07 | 1.01 | 2 | 1 | usp 2x2 | 2026-01-02 |" in text
    assert "| two |  | **8.0e-01: wrong** | 1.20 | 2 | 3 | ring 1x4 | 2026-01-02 |" in text
    assert "| three |  | FAILED |  |  |  |  | 2026-01-02 |" in text
    assert "| none |  | 0.0e+00 | unknown | 0 | 1 |  | 2026-01-02 |" in text
    assert "old" not in text.split("| on |")[1]
