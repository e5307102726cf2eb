"""Whole models on real processes, under torchrun's environment, talking through shared memory, TCP and gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import copy_ranks
import model_cases
import pytest
from processes import Outcome, preload, run_outcomes, run_processes

pytestmark = pytest.mark.ranks

MODELS = ("flux", "sd3", "pixart_sigma", "wan_t2v", "cogvideox_rope")
# ranks of each machine
LAYOUTS = {"4": (4,), "3": (3,), "2": (2,), "2x2": (2, 2)}

preload("diffusers_models", "clients", "copy_ranks", "model_cases")


def machines(layout: str) -> list[int]:
    """The machine of every rank."""
    if layout == "2+2":  # ranks of a group on different machines
        return [0, 1, 0, 1]
    return [machine for machine, count in enumerate(LAYOUTS[layout]) for _ in range(count)]


def passes(layout: str, *case: str) -> None:
    homes = machines(layout)
    run_processes(len(homes), model_cases.run, case, homes, timeout_s=240.0)
    assert left_in_shared_memory() == []


def outcomes(layout: str, *case: str) -> Iterator[Outcome]:
    """Of a case that must fail, and not by the time limit."""
    homes = machines(layout)
    ended = run_outcomes(len(homes), model_cases.run, case, homes, timeout_s=100.0)
    assert left_in_shared_memory() == []
    for outcome in ended:
        assert outcome.exit_code is not None, f"rank {outcome.rank} still ran:\n{outcome.log[-3000:]}"
    assert any(outcome.error is not None for outcome in ended)
    yield from ended


def left_in_shared_memory() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("sfcompile-")]


def thorough(*values: str) -> object:
    """A cell of a matrix that `make test` takes by its other rows and columns."""
    return pytest.param(*values, marks=pytest.mark.thorough)


# Every model and every layout once; all pairs in `make test-all`.
# Of each kind of plan one; every structure runs over threads in tests/passes/test_pipeline.py.
QUICK = {"flux": "2", "pixart_sigma": "3", "wan_t2v": "2x2"}
PAIRS = [
    (model, layout) if QUICK.get(model) == layout else thorough(model, layout) for model in MODELS for layout in LAYOUTS
]


@pytest.mark.parametrize(("model", "layout"), PAIRS)
def test_diffusers_models(model: str, layout: str) -> None:
    passes(layout, "model", model)


@pytest.mark.parametrize(("model", "layout"), [("image_decoder", "3"), thorough("video_decoder", "4")])
def test_convolutional_decoders(model: str, layout: str) -> None:
    passes(layout, "decoder", model)


@pytest.mark.parametrize("layout", ["2x2", thorough("3"), thorough("4")])
def test_every_mesh(layout: str) -> None:
    passes(layout, "meshes")


@pytest.mark.parametrize(
    ("layout", "transport"), [("2x2", "auto"), thorough("4", "auto"), thorough("2x2", "c10d"), thorough("2+2", "auto")]
)
def test_groups_of_ranks_run_side_by_side(layout: str, transport: str) -> None:
    passes(layout, "groups", transport)


def test_a_rank_outside_of_a_group_is_told_so() -> None:
    passes("3", "not_in_the_group")


@pytest.mark.parametrize("layout", ["2x2", thorough("4")])
def test_every_schedule_and_the_batch_split(layout: str) -> None:
    passes(layout, "schedules")


def test_machines_behind_slow_links_compute_the_same_each(tmp_path: Path) -> None:
    slow = tmp_path / "slow.toml"
    slow.write_text("machine_of = [0, 0, 1, 1]\nnetwork_bytes_per_s = 1e5\n")
    run_processes(4, copy_ranks.run, (str(slow),), machines("2x2"), timeout_s=240.0)


def test_inductor_runs_the_local_graph(tmp_path: Path) -> None:
    passes("2", "inductor", str(tmp_path))


@pytest.mark.parametrize("name", ["shm", "c10d"])
def test_transport_by_name(name: str) -> None:
    passes("2", "transport", name)


@pytest.mark.parametrize(
    "case", ["heap", "shapes", "no_attention", "options_of_a_second_model", "own_inputs_again", "autocast"]
)
def test_case_passes(case: str) -> None:
    passes("2", case)


@pytest.mark.parametrize("model", ["plain", thorough("sd3")])
def test_resolutions_are_compiled_once_each(model: str) -> None:
    passes("2", "dynamic", model)


def test_a_package_gives_the_bits_of_the_compile(tmp_path: Path) -> None:
    passes("4", "package", str(tmp_path / "plain.sf"))


@pytest.mark.parametrize("layout", ["2", thorough("3"), thorough("4")])
def test_a_dit_in_plain_pytorch_at_three_resolutions(layout: str) -> None:
    passes(layout, "own_dit")


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("unknown_option", "Unknown option 'meshh'"),
        ("bad_mesh", "but 2 ranks run"),
        ("training", "require gradients"),
        ("other_shapes", "compile something else than rank 0"),
        ("other_weights", "weights (are they seeded or loaded alike?) is"),
        ("other_wire", "options['wire'] is Wire(q='"),
        ("other_noise", "the ranks are not in the same call"),
        ("strict", "token ops are not sharded"),
    ],
)
def test_wrong_input_is_one_clear_error_on_every_rank(case: str, text: str) -> None:
    for outcome in outcomes("2", case):
        assert text in str(outcome.error), f"rank {outcome.rank}:\n{outcome.log[-3000:]}"


def test_other_shapes_later_ends_on_every_rank() -> None:
    said = [str(outcome.error) for outcome in outcomes("2", "other_shapes_later")]
    assert any("not every rank came along" in text or "waited 4 s" in text for text in said), said


def test_shm_with_two_machines_is_refused() -> None:
    homes = (0, 1)
    for outcome in run_outcomes(2, model_cases.run, ("transport", "shm"), homes):
        assert "transport='shm' with 2 machines" in str(outcome.error), outcome.log[-3000:]


@pytest.mark.thorough  # ranks are killed in test_torture.py, and end with an error under the launcher in test_edges.py
def test_killed_rank_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """As a user would see it: ranks that our launcher started, each a program of its own."""
    argv = [str(model_cases.__file__), "killed"]
    code = (
        "import sys; from pathlib import Path; from sfcompile.commands.launch import launch; "
        f"sys.exit(launch({argv!r}, 3, log_dir=Path({str(tmp_path)!r}), timeout_s=240))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode not in (0, 124), done.stderr[-3000:]
    assert left_in_shared_memory() == []
