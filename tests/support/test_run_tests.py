"""The two runs of the tests: what is told to pytest, what is added up, and that no test is left out of both."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import run_tests

ROOT = Path(__file__).resolve().parents[2]
CI_GREP = re.compile(r"^=+ .* in [0-9.]+s.* =+$")


def test_lines_of_pytest_are_added_up() -> None:
    line = "=== 1 failed, 20 passed, 3 skipped, 400 deselected, 2 warnings, 1 error in 12.00s (0:00:12) ==="
    counts = run_tests.counts_of(line) + run_tests.counts_of("\x1b[32m==== \x1b[32m5 passed\x1b[0m in 1.20s ====")
    assert counts == Counter(failed=2, passed=25, skipped=3)
    assert run_tests.counts_of("7 passed in 1.20s (with -q)") == Counter(passed=7)
    assert not run_tests.counts_of("tests/test_a.py 3 passed parcels in 2.0s")
    plain, closing = run_tests.closing(counts, 452.5)
    assert plain == "25 passed, 2 failed, 3 skipped"
    assert CI_GREP.match(closing) and "2 failed, 25 passed, 3 skipped in 452.50s (7 min 32 s)" in closing
    assert CI_GREP.pattern in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    ranks: r\n    thorough: t\n")
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "ranks = os.environ['SFCOMPILE_TEST_GROUP'] == 'ranks'\n"
        "def test_plain(): assert not ranks\n"
        "@pytest.mark.thorough\ndef test_more(): assert not ranks\n"
        "@pytest.mark.ranks\ndef test_ranks(): assert ranks\n"
        "@pytest.mark.ranks\n@pytest.mark.thorough\ndef test_more_ranks(): assert ranks\n"
    )
    (tmp_path / "test_bad.py").write_text("def test_bad(): assert False\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(["test_some.py"], 0, "2 passed, 0 failed, 0 skipped", marks=pytest.mark.thorough),
        (["--all", "-q"], 1, "4 passed, 1 failed, 0 skipped"),
        pytest.param(
            ["test_some.py", "--no-such-flag"], 4, "0 passed, 2 failed, 0 skipped", marks=pytest.mark.thorough
        ),
        pytest.param(["test_some.py", "-k", "nothing"], 5, "0 passed, 0 failed, 0 skipped", marks=pytest.mark.thorough),
    ],
)
def test_every_test_is_in_one_of_two_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int,
    said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert run_tests.main(arguments) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == said and CI_GREP.match(lines[-1])


def test_files_without_ranks_are_not_imported_for_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_bad.py").write_text("import os\nassert os.environ['SFCOMPILE_TEST_GROUP'] != 'ranks'\n")
    monkeypatch.chdir(folder)
    assert run_tests.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "2 passed, 0 failed, 0 skipped"
    assert run_tests.main(["test_bad.py"]) != 0, "it was asked for"


def test_every_mark_of_ranks_is_found_by_its_text() -> None:
    mark = "mark." + "ranks"
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        assert "from pytest" not in text or path == Path(__file__), path
        assert text.count(mark) == text.count(f"pytest.{mark}"), path
