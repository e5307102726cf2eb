"""The command line: what it accepts, what it says, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sfcompile.commands import cli
from sfcompile.commands.cli import EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_USAGE, main
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


@pytest.mark.parametrize("argv", [["demo", "--ranks", "0"], ["demo", "--inner", "x"], ["demo", "--nope"], ["demos"]])
def test_bad_arguments_are_usage_errors(argv: list[str], demos: list[DemoConfig]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == EXIT_USAGE
    assert not demos


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: sfcompile") and "explain" in out


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["expalin"], "explain"),
        (["simulate", "flux", "--tokns", "4096"], "--tokens"),
        (["simulate", "flux", "--schedule", "tours"], "torus"),
        (["run", "--rank", "2", "--machins", "2", "x.py"], "--machines"),
        (["run", "--nproc-per-node", "2", "x.py"], "--ranks"),
        (["--verion"], "--version"),
    ],
)
def test_what_was_meant_is_said(argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == EXIT_USAGE
    assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_help_of_run_says_everything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for word in ("--ranks", "--machines", "--logs", "-m", "OMP_NUM_THREADS", "Exit code", "breakpoint()", "torchrun"):
        assert word in out, word


def test_slips_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    """Each with the sentence that is about it; a process of its own, since tests have torch."""
    (tmp_path / "file").touch()
    (tmp_path / "own.py").write_text("def make():\n    pass\n")
    (tmp_path / "broken.py").write_text("def make(:\n")
    slips = [
        ("kernels 1x24x4096", "'1x24x4096' has 3 sizes"),
        ("kernels 1x24x4096x128 --topology 4x8:b300", "preset 'b300' is unknown"),
        ("kernels 1x24x4096x128 --out file", "is a file"),
        ("kernels", "No model and no shape"),
        ("kernels 1x24x4096x128 --config a=1", "--config is said of 1x24x4096x128"),
        ("kernels flux --causal", "--causal is said of flux"),
        ("kernels flx", "Did you mean"),
        ("simulate no-such-model", "'no-such-model'"),
        ("simulate flux --out gone", "gone is not there"),
        ("simulate flux --model wan", "Two models are named"),
        ("simulate flux --paper", "has models of its own"),
        ("explain flux --topology gone.toml", "gone.toml"),
        ("explain flux --rank 99", "There is no rank 99"),
        ("explain flux --html gone/page.html", "gone is not there"),
        ("explain flux --config x", "is no KEY=VALUE"),
        ("export x.py:f --topology 1y2 --out p.sf", "1y2"),
        ("export --show gone.sf", "gone.sf is not there"),
        ("run --ranks 2 gone.py", "gone.py is not there"),
        ("run --ranks 2 .", "is a folder without __main__.py"),
        ("run --ranks 2 python own.py", "Leave python out"),
        ("run --ranks 2 --logs file own.py", "is a file"),
        ("run own.py --ranks 2", "--ranks stands behind the script"),
        ("run own.py", "--ranks is not said"),
        ("explain own.py", "names no function; own.py has make"),
        ("simulate own.py:mke", "Did you mean 'make'?"),
        ("export broken.py:make --topology 1x2 --out p.sf", "is no Python: line 1"),
        ("demo --head-dim 12", "no multiple of 8"),
        ("demo --ranks 3 --machines 2", "Cannot place 3 ranks"),
        ("demo --ranks 40000", "40000 ranks are to be started"),
        ("doctor --measure --out gone/cluster.toml", "gone is not there"),
    ]
    code = (
        "import contextlib, io, sys\n"
        "from sfcompile.commands.cli import main\n"
        f"for words, sentence in {slips!r}:\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err):\n"
        "        code = main(words.split())\n"
        "    assert code == 2 and sentence in err.getvalue(), (words, code, err.getvalue())\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["help"]])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
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


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: DemoConfig) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_demo", interrupted)
    assert main(["demo"]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "sfcompile: Interrupted. All ranks were ended.\n"


def test_run_needs_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--ranks", "2"]) == EXIT_USAGE
    assert "No script is named" in capsys.readouterr().err


@pytest.mark.parametrize(("full", "code", "said"), [(False, EXIT_NO_READER, ""), (True, 1, "no room left")])
def test_a_reader_who_has_had_enough_and_a_full_disk_are_no_tracebacks(full: bool, code: int, said: str) -> None:
    with open("/dev/full", "wb") as disk:
        command = [sys.executable, "-m", "sfcompile", "completion"]
        with subprocess.Popen(command, stdout=disk if full else subprocess.PIPE, stderr=subprocess.PIPE) as process:
            if process.stdout is not None:
                process.stdout.close()
            assert process.stderr is not None
            err = process.stderr.read().decode()
    assert process.returncode == code and said in err and err.count("\n") <= 1, err


def test_simulate_prints_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--paper"]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out and "published" in out and "image 3072, 4 machines" in out


@pytest.mark.parametrize(
    ("model", "found"),
    [
        pytest.param("sd3", "18 attentions: 4608 tokens, 18 heads x 64", marks=pytest.mark.thorough),
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
