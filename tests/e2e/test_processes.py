"""Whole models on real processes: launched as torchrun would, talking through shared memory, TCP and gloo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

WORKER = str(Path(__file__).with_name("worker.py"))


def run(tmp_path: Path, ranks: int, *case: str, machines: int = 1, timeout_s: float = 240.0) -> tuple[int, list[str]]:
    """Exit code, and every rank's output (rank 0's included: it is redirected through a launcher of its own)."""
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from sfcompile.commands.launch import launch; "
        f"sys.exit(launch({[WORKER, *case]!r}, {ranks}, {machines}, log_dir=Path({str(tmp_path)!r}), "
        f"timeout_s={timeout_s}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s + 30, check=False
    )
    logs = [done.stdout + done.stderr]
    logs += [(tmp_path / f"rank{rank}.log").read_text(errors="replace") for rank in range(1, ranks)]
    return done.returncode, logs


def passes(tmp_path: Path, ranks: int, *case: str, machines: int = 1) -> None:
    code, logs = run(tmp_path, ranks, *case, machines=machines)
    assert code == 0, "\n".join(logs)[-6000:]
    assert left_in_shared_memory() == []


def left_in_shared_memory() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("sfcompile-")]


MODELS = ("flux", "sd3", "pixart_sigma", "wan_t2v", "cogvideox_rope")


@pytest.mark.parametrize(("ranks", "machines"), [(4, 1), (3, 1), (2, 1), (4, 2)])
def test_diffusers_models(tmp_path: Path, ranks: int, machines: int) -> None:
    passes(tmp_path, ranks, "models", *MODELS, machines=machines)


@pytest.mark.parametrize(("ranks", "machines"), [(4, 1), (4, 2), (3, 1)])
def test_every_mesh(tmp_path: Path, ranks: int, machines: int) -> None:
    passes(tmp_path, ranks, "meshes", machines=machines)


@pytest.mark.parametrize("machines", [1, 2])
def test_every_schedule_and_the_batch_split(tmp_path: Path, machines: int) -> None:
    passes(tmp_path, 4, "schedules", machines=machines)


def test_inductor_runs_the_local_graph(tmp_path: Path) -> None:
    passes(tmp_path, 2, "inductor")


@pytest.mark.parametrize("name", ["shm", "c10d"])
def test_transport_by_name(tmp_path: Path, name: str) -> None:
    passes(tmp_path, 2, "transport", name)


@pytest.mark.parametrize("case", ["heap", "shapes", "dynamic", "no_attention", "options_of_a_second_model"])
def test_case_passes(tmp_path: Path, case: str) -> None:
    passes(tmp_path, 2, case)


def test_a_package_gives_the_bits_of_the_compile(tmp_path: Path) -> None:
    passes(tmp_path, 4, "package", str(tmp_path / "plain.sf"))


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_diffusers_pipeline_draws_the_same(tmp_path: Path, kind: str) -> None:
    passes(tmp_path, 4, "pipeline", kind)


@pytest.mark.parametrize("ranks", [4, 3])
def test_a_dit_in_plain_pytorch_at_three_resolutions(tmp_path: Path, ranks: int) -> None:
    passes(tmp_path, ranks, "own_dit")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("unknown_option", "Unknown option 'meshh'"),
        ("bad_mesh", "but 2 ranks run"),
        ("training", "require gradients"),
        ("other_shapes", "compile something else than rank 0"),
        ("strict", "token ops are not sharded"),
    ],
)
def test_wrong_input_is_one_clear_error_on_every_rank(tmp_path: Path, case: str, text: str) -> None:
    code, logs = run(tmp_path, 2, case)
    assert code != 0
    for rank, log in enumerate(logs):
        assert text in log, f"rank {rank}:\n{log[-3000:]}"
    assert left_in_shared_memory() == []


def test_other_shapes_later_ends_on_every_rank(tmp_path: Path) -> None:
    code, logs = run(tmp_path, 2, "other_shapes_later", timeout_s=100)
    assert code not in (0, 124)
    assert any("not every rank came along" in log or "waited 4 s" in log for log in logs), logs


def test_shm_with_two_machines_is_refused(tmp_path: Path) -> None:
    code, logs = run(tmp_path, 2, "transport", "shm", machines=2)
    assert code not in (0, 124)
    assert all("transport='shm' with 2 machines" in log for log in logs)


def test_killed_rank_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    code, logs = run(tmp_path, 3, "killed")
    assert code not in (0, 124)
    assert left_in_shared_memory() == []
