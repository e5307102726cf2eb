"""`make gpu-check` without a GPU: it says so and runs nothing; a dry run goes through every section."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
from gpu_check import SECTIONS, Found, Section, Task  # noqa: E402

pytestmark = pytest.mark.ranks


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "gpu-check", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "run_all", lambda *given: pytest.fail("something was run"))
    assert gpu_check.main([]) == 2
    said = capsys.readouterr().out
    assert "no GPU" in said and len(said.splitlines()) == 1


def test_a_dry_run_goes_through_every_section() -> None:
    done = run("GPU_ARGS=--dry-run")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for section in SECTIONS:
        assert f"== {section.name}:" in done.stdout
    assert "PASSED" in done.stdout and "\nFAIL " not in done.stdout
    assert "log-sum-exp" in done.stdout and "in slot" in done.stdout and "epochs after" in done.stdout
    assert "\nok   2 ranks, fp32, attention='aten', call 1:" in done.stdout and "1 of 1 attentions" in done.stdout
    assert "\nok   2 ranks, fp32, attention='aten', weights in shares, call 2:" in done.stdout
    assert "in shares: a rank holds" in done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skip ")]
    assert ["compiles nothing" in line for line in skipped] == [True], skipped
    assert "\nok   calls of sites were not captured on every rank" in done.stdout


def test_a_triton_without_the_sanitizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_check_kernels
    from triton.backends.nvidia.compiler import CUDAOptions

    assert "elect.sync" in gpu_check_kernels.no_sanitizer(80)
    left = {name: value for name, value in CUDAOptions.__dataclass_fields__.items() if name != "instrumentation_mode"}
    monkeypatch.setattr(CUDAOptions, "__dataclass_fields__", left)
    said = gpu_check_kernels.no_sanitizer(90)
    assert "this Triton has none" in said and "the option instrumentation_mode" in said


def task(folder: Path, code: str, limit_s: float) -> Task:
    """A process that runs some code in place of a section."""
    made = Task(["speed:0/1"], limit_s, folder / "lines", folder / "log")
    with made.log.open("wb") as log:
        made.process = subprocess.Popen([sys.executable, "-c", code], stderr=log, start_new_session=True)
    made.began = gpu_check.time.monotonic()
    return made


@pytest.mark.parametrize(
    ("code", "limit_s", "said"),
    [("import time; time.sleep(60)", 0.5, "was killed"), ("raise SystemError('broken device')", 30, "broken device")],
    ids=["hangs", "crashes"],
)
def test_a_section_that_does_not_end_well_is_a_failure_and_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, limit_s: float, said: str
) -> None:
    made = task(tmp_path, code, limit_s)
    monkeypatch.setattr(gpu_check, "_start", lambda task, dry: None)
    gpu_check._together([made], 1, False, made.began + 60)
    assert made.process is not None and made.process.poll() is not None
    result = {"section": "speed", "kind": "ok", "text": "a first result"}
    made.lines.write_text(json.dumps(result) + "\n" + '{"section": "speed", "ki')  # it was killed as it wrote
    found = Found(Section("speed", "", "speed", 1.0), [made], gpu_check._read(made.lines))
    text, failed = gpu_check.report([found], "", 1.0, True)
    assert failed and "a first result" in text and said in text


def test_a_goal_that_is_missed_is_told_and_no_failure() -> None:
    missed = Found(Section("speed", "", "speed", 1.0), [], [{"section": "speed", "kind": "MISS", "text": "0.5"}])
    text, failed = gpu_check.report([missed], "", 1.0, True)
    assert not failed and "1 goals missed" in text
    text, failed = gpu_check.report([Found(Section("puts", "", "puts", 1.0))], "", 1.0, True)
    assert failed and "gave no result" in text


def test_wheels_that_cannot_be_installed_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "WHEELS_AT", tmp_path / "target")
    assert "no wheels" in gpu_check.install(tmp_path)
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    said = gpu_check.install(tmp_path)
    assert "could not be installed" in said and gpu_check.report([], said, 1.0, True)[1]


def test_figures_of_sections_that_ended_well_become_the_file_that_defaults_are_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check_report import Bench

    from sfcompile.codegen.toolchain.gpu_results import result_of

    monkeypatch.setenv("SFCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpu_check, "gpu_name", lambda: "A GPU")
    lines = tmp_path / "lines"
    bench = Bench(lines, "speed", True)
    bench.figure("tiles", 64, {"block_m": 128, "tails": "apart"})
    bench.figure("rates", 64, {"fused": 2.0, "library": 3.0})
    speed = Found(Section("speed", "", "speed", 1.0), [], gpu_check._read(lines))
    gpu_check.keep_figures([speed], tmp_path)
    bench.figure("rates", 64, {"fused": 4.0, "library": 3.0})
    again = Found(Section("library", "", "library", 1.0), [], gpu_check._read(lines)[2:])
    gpu_check.keep_figures([again], tmp_path)
    kept = result_of("A GPU")
    assert kept is not None and kept.rates == {64: {"fused": 4.0, "library": 3.0}}
    assert kept.tiles == {64: {"block_m": 128, "tails": "apart"}}  # of the first run
    assert [path.name for path in tmp_path.glob("*.json")] == [f"{kept.measured}-gpu-check-a-gpu.json"]
    bench.figure("rates", 64, {"fused": 9.0, "library": 9.0})
    bench.check(False, "something else")
    broken = Found(Section("library", "", "library", 1.0), [], gpu_check._read(lines)[3:])
    gpu_check.keep_figures([broken], tmp_path)
    assert result_of("A GPU") == kept
