"""The launcher: environment of the ranks, output, exit codes, and that nobody is left behind."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfcompile.commands.launch import EXIT_TIMEOUT, launch, num_cores
from sfcompile.errors import LaunchError

pytestmark = pytest.mark.ranks

NAMES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS"
)
WRITE_ENV = f"""
import json, os, pathlib, sys
values = {{name: os.environ[name] for name in {NAMES!r}.split()}}
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(values))
"""
SLEEP_FOREVER = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); time.sleep(600)"


def run(code: str, *args: object, ranks: int = 2, machines: int = 1, **kwargs: object) -> int:
    return launch(["-c", code, *map(str, args)], ranks, machines, timeout_s=60, **kwargs)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_get_the_environment_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run(WRITE_ENV, tmp_path, ranks=4, machines=2) == 0
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    assert [int(env["RANK"]) for env in seen] == [0, 1, 2, 3]
    assert [int(env["LOCAL_RANK"]) for env in seen] == [0, 1, 0, 1]
    assert [int(env["GROUP_RANK"]) for env in seen] == [0, 0, 1, 1]
    assert {env["WORLD_SIZE"] for env in seen} == {"4"}
    assert {env["LOCAL_WORLD_SIZE"] for env in seen} == {env["GROUP_WORLD_SIZE"] for env in seen} == {"2"}
    assert {env["OMP_NUM_THREADS"] for env in seen} == {str(max(1, num_cores() // 4))}
    assert len({(env["MASTER_ADDR"], env["MASTER_PORT"]) for env in seen}) == 1


def test_threads_that_are_set_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert run(WRITE_ENV, tmp_path) == 0
    assert json.loads((tmp_path / "1").read_text())["OMP_NUM_THREADS"] == "7"
    assert run(WRITE_ENV, tmp_path, env={"OMP_NUM_THREADS": "3"}) == 0
    assert json.loads((tmp_path / "1").read_text())["OMP_NUM_THREADS"] == "3"


def test_rank_0_speaks_and_the_others_write_logs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("import os; print('hello from', os.environ['RANK'])", ranks=3, log_dir=tmp_path) == 0
    assert capfd.readouterr().out == "hello from 0\n"
    assert (tmp_path / "rank2.log").read_text() == "hello from 2\n"


def test_first_failure_gives_its_code_and_log_and_ends_the_rest(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("the reason")
    sys.exit(3)
time.sleep(600)
"""
    start = time.monotonic()
    assert run(code, ranks=3, log_dir=tmp_path) == 3
    assert time.monotonic() - start < 20
    error = capfd.readouterr().err
    assert "rank 1 ended with exit code 3" in error
    assert "[rank 1] the reason" in error
    assert str(tmp_path) in error


def test_a_rank_ended_by_a_signal_gives_128_plus_its_number() -> None:
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ranks=1) == 128 + signal.SIGKILL


def test_timeout_ends_all_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(["-c", SLEEP_FOREVER, str(tmp_path)], 2, timeout_s=1.5) == EXIT_TIMEOUT
    assert "still running after 1.5 s" in capfd.readouterr().err
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    # A shell that runs us in the background has us ignore Ctrl-C, and children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from sfcompile.commands.launch import launch; launch(['-c', {SLEEP_FOREVER!r}, {str(tmp_path)!r}], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    launcher.send_signal(number)
    assert launcher.wait(30) != 0
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir())


def test_a_second_ctrl_c_leaves_nobody_behind(tmp_path: Path) -> None:
    stubborn = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP_FOREVER}"
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from sfcompile.commands import launch\nend = launch._end\n"
    code += f"launch._end = lambda ranks: (open({str(tmp_path / 'ending')!r}, 'w').close(), end(ranks))\n"
    code += f"launch.launch(['-c', {stubborn!r}, {str(tmp_path)!r}], 2)"
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    for files in (2, 3):  # both ranks are there; then they are being ended
        while len(list(tmp_path.iterdir())) < files:
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.02)
        time.sleep(0.1)
        launcher.send_signal(signal.SIGINT)
    assert launcher.wait(30) != 0
    assert not any(alive(int(path.name)) for path in tmp_path.iterdir() if path.name.isdecimal())


@pytest.mark.parametrize(("ranks", "machines"), [(0, 1), (4, 3), (2, 4), (2, 0)])
def test_numbers_that_do_not_fit_are_refused(ranks: int, machines: int) -> None:
    with pytest.raises(LaunchError, match=f"Cannot place {ranks} ranks on {machines} machines"):
        launch(["-c", "pass"], ranks, machines)


def test_a_terminal_is_handed_to_rank_0_so_that_breakpoint_can_be_answered(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os\nif os.environ['RANK'] == '0':\n    answer = 6 * 7\n    breakpoint()\n    print('on')\n"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "sfcompile", "run", "--ranks", "2", str(script)]
    launcher = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said = b""
    try:
        os.write(ours, b"p answer\ncontinue\n")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and select.select([ours], [], [], 5.0)[0]:
            try:
                said += os.read(ours, 4096)
            except OSError:  # the last process that had the terminal has ended
                break
        assert launcher.wait(30) == 0, said
    finally:
        launcher.kill()
        os.close(ours)
    assert b"(Pdb) " in said and b"42" in said and b"on\r\n" in said, said
