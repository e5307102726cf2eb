"""The command line: what it accepts, what it says, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfcompile.commands import cli
from sfcompile.commands.cli import EXIT_USAGE, main
from sfcompile.commands.demo import DemoConfig


@pytest.fixture
def demos(monkeypatch: pytest.MonkeyPatch) -> list[DemoConfig]:
    """The configurations that the demo was asked to run, without running it."""
    asked: list[DemoConfig] = []

    def record(config: DemoConfig) -> int:
        asked.append(config)
        return 0

    monkeypatch.setattr(cli, "run_demo", record)
    return asked


def test_demo_has_defaults(demos: list[DemoConfig]) -> None:
    assert main(["demo"]) == 0
    assert demos == [DemoConfig()]


def test_demo_takes_every_size(demos: list[DemoConfig]) -> None:
    flags = "--ranks 2 --machines 2 --tokens 64 --text 8 --layers 1 --single-layers 3 --heads 2 --head-dim 16 --steps 5"
    assert main(["demo", *flags.split(), "--inner", "eager"]) == 0
    assert demos == [DemoConfig(2, 2, 64, 8, 1, 3, 2, 16, 5, "eager")]


@pytest.mark.parametrize("argv", [["demo", "--ranks", "0"], ["demo", "--inner", "x"], ["demo", "--nope"], []])
def test_bad_arguments_are_usage_errors(argv: list[str], demos: list[DemoConfig]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == EXIT_USAGE
    assert not demos


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "run", "simulate", "explain", "kernels", "export", "doctor"))


def test_run_passes_arguments_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(__file__).with_name('out' + os.environ['RANK']).write_text(' '.join(sys.argv[1:]))\n"
    )
    assert main(["run", "--ranks", "2", str(script), "--ranks", "9", "--help"]) == 0
    assert [(tmp_path / f"out{rank}").read_text() for rank in range(2)] == ["--ranks 9 --help"] * 2


def test_run_takes_a_module_and_returns_its_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--ranks", "1", "-m", "json.tool", "--help"]) == 0
    assert "json.tool" in capfd.readouterr().out
    assert main(["run", "--ranks", "1", "-m", "json.tool", "no-such-file"]) == 2


def test_errors_of_ours_come_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--ranks", "3", "--machines", "2", "x.py"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert error.startswith("sfcompile: Cannot place 3 ranks on 2 machines.")
    assert "Traceback" not in error


def test_run_needs_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--ranks", "2"]) == EXIT_USAGE
    assert "name a script" in capsys.readouterr().err


def test_simulate_prints_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--paper"]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out and "published" in out and "image 3072, 4 machines" in out


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("sd3", "18 attentions: 4608 tokens, 18 heads x 64"),
        pytest.param("flux", "57 attentions: 4608 tokens, 24 heads x 128", marks=pytest.mark.thorough),
    ],
)
def test_simulate_plans_a_full_size_model_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, found: str
) -> None:
    """The class is found among those of diffusers; weights stay on the meta device."""
    flags = f"--model {model} --tokens 4096 --topology 2x4:h100-ib --out"
    assert main(["simulate", *flags.split(), str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert found in out and "<- taken" in out and "of the limit" in out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["simulate"], "say --paper, or name a model"),
        (["simulate", "--model", "no-such-model"], "no-such-model"),
        (["simulate", "--model", "flux", "--topology", "4x8:b300"], "preset 'b300' is unknown"),
    ],
)
def test_what_is_missing_is_said(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == EXIT_USAGE
    assert text in capsys.readouterr().err
