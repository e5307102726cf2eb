"""The runner: what it checks around every pass, what it says of a wrong order, what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import captured
from models import build

from sfcompile.capture.graph import Captured
from sfcompile.errors import InternalError, NotShardedError, OptionError
from sfcompile.passes import pipeline
from sfcompile.passes.pipeline import PIPELINE, Pass, Restart
from sfcompile.passes.runner import FIELDS, OLD_NAMES, run_pipeline
from sfcompile.passes.state import Asked, State
from sfcompile.runtime.program.topology import Topology

NAMES = tuple(entry.name for entry in PIPELINE)


def doubled() -> Captured:
    return captured(lambda x: x * 2, torch.randn(3))


def state_of(got: Captured, *order: str) -> State:
    return State(got.gm, got.mode, Topology.grid(1, 2), 0, Asked(order=order))


def test_report_and_dump(tmp_path: Path) -> None:
    model, inputs = build("self")
    got = captured(model, *inputs)
    state = State(got.gm, got.mode, Topology.grid(2, 2), 0, Asked(shard_everything=True, split_batch=False))
    report = run_pipeline(state, dump=tmp_path / "dump").report
    assert (report.num_ranks, report.num_machines, report.batch * report.ulysses * report.ring) == (4, 2, 4)
    assert report.schedule and 0 < report.limit_s <= report.predicted_s
    assert "<- taken" in str(report) and "x the best" in str(report)
    assert report.sharded_sites == 2 and report.share < 1.3
    assert "more candidates" in str(report) and "models.py" in str(report)
    (folder,) = (tmp_path / "dump").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    numbered = [f"{i:02d}_{name}.txt" for i, name in enumerate(NAMES, 1)]
    assert names == ["00_captured.txt", *numbered, "index.html", "plan.txt", "schedules.txt"]
    assert "graph as in 00_captured.txt" in (folder / "02_analyse_tokens.txt").read_text()
    assert "aten.scaled_dot_product_attention.default: 2 -> 0 (-2)" in (folder / "09_rewrite_local.txt").read_text()


@pytest.mark.parametrize("late", [True, False])
def test_an_order_that_never_splits_the_batch_plans_for_whole_batches(late: bool) -> None:
    model, inputs = build("self")
    got = captured(model, *inputs)
    order = [name for name in NAMES if name != "rewrite_batch"]
    if late:
        order.insert(order.index("build_schedules") + 1, "rewrite_batch")
    state = State(got.gm, got.mode, Topology.grid(2, 2), 0, Asked(order=tuple(order), shard_everything=True))
    assert run_pipeline(state).report.batch == 1


def test_a_failing_pass_leaves_the_dump_up_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: State) -> None:
        raise ValueError

    monkeypatch.setitem(pipeline.REGISTERED, "fail", Pass("fail", fail))
    got = doubled()
    state = state_of(got, "analyse_attention", "fail")
    with pytest.raises(ValueError):
        run_pipeline(state, dump=tmp_path)
    assert sorted(path.name for path in next(tmp_path.iterdir()).iterdir()) == [
        "00_captured.txt",
        "01_analyse_attention.txt",
        "index.html",
    ]


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (("analyse_attention", "analyse_toks"), "pass 'analyse_toks' is unknown. Did you mean 'analyse_tokens'?"),
        (("analyse_attention", "choose_axes"), "pass choose_axes needs tokens.*analyse_tokens makes it"),
        (("analyse_attention",), "pass report_graph needs tokens.*analyse_tokens makes it"),
        (tuple(n for n in NAMES if n != "choose_layouts"), "pass choose_axes needs layouts.*choose_layouts makes it"),
        (tuple(n for n in NAMES if n != "rewrite_local"), "pass rewrite_weights needs local.*rewrite_local makes it"),
        (tuple(n for n in NAMES if n != "build_schedules"), "pass report_graph needs programs.*build_schedules makes"),
    ],
)
def test_an_order_that_cannot_work_is_said(order: tuple[str, ...], text: str) -> None:
    got = doubled()
    with pytest.raises(OptionError, match=text):
        run_pipeline(state_of(got, *order))


def test_kernels_of_the_attentions_are_dumped(tmp_path: Path) -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    got = captured(attend, torch.randn(1, 2, 8, 16))
    state = State(got.gm, got.mode, Topology.grid(1, 2), 0, Asked(shard_everything=True, kernels=True))
    run_pipeline(state, dump=tmp_path)
    kernels = list(tmp_path.glob("*/kernels/attend-*.py"))
    assert len(kernels) == 3 and all("def attend(" in path.read_text() for path in kernels)


def test_strict_names_the_node_and_the_users_line() -> None:
    def mixing(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return y.sort(dim=2).values

    got = captured(mixing, torch.randn(1, 4, 8, 4))
    state = State(got.gm, got.mode, Topology.grid(1, 2), 0, Asked(shard_everything=True))
    with pytest.raises(NotShardedError, match=r"sort(?s:.)*test_runner\.py"):
        run_pipeline(state, strict=True)


def test_a_pass_that_edits_the_captured_graph_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(state: State) -> None:
        state.gm.graph.placeholder("extra")

    monkeypatch.setattr(pipeline, "PIPELINE", [Pass("analyse_attention", edit)])
    got = doubled()
    with pytest.raises(InternalError, match="pass analyse_attention edited"):
        run_pipeline(state_of(got))


def register(monkeypatch: pytest.MonkeyPatch, run: Callable[[State], None], needs: str = "", makes: str = "") -> None:
    monkeypatch.setitem(pipeline.REGISTERED, "mine", Pass("mine", run, needs, makes))


def test_a_pass_from_outside_says_what_it_needs_or_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "pass mine needs placement, which no pass before it makes.*place_min_cut makes it.*before mine"
    register(monkeypatch, lambda state: None, needs="placement")
    with pytest.raises(OptionError, match=text):
        run_pipeline(state_of(doubled(), "analyse_attention", "mine"))
    register(monkeypatch, lambda state: print(state.placement))
    with pytest.raises(OptionError, match=text):
        run_pipeline(state_of(doubled(), "analyse_attention", "mine"))
    register(monkeypatch, lambda state: None, makes="layouts")
    with pytest.raises(OptionError, match="pass mine did not make layouts.*registered from outside"):
        run_pipeline(state_of(doubled(), "mine"))


def test_an_assert_inside_a_pass_is_our_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(state: State) -> None:
        raise AssertionError("no such row")

    own = [replace(entry, run=wrong) if entry.name == "place_min_cut" else entry for entry in PIPELINE]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "PIPELINE", own)
        with pytest.raises(InternalError, match="pass place_min_cut failed a check.*no such row(?s:.)*Report this"):
            run_pipeline(state_of(doubled()))
    register(monkeypatch, wrong)
    with pytest.raises(AssertionError, match="no such row"):  # the user's own check
        run_pipeline(state_of(doubled(), "mine"))


def test_passes_need_what_they_say_and_make_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass is given only the fields that it says it needs, and fills those that it says it makes."""
    model, inputs = build("joint")
    got = captured(model, *inputs)
    free = {"group", "fused_puts", "traffic", "weights"}  # these have a value from the start

    def alone(entry: Pass) -> Pass:
        def run(state: State) -> object:
            hidden = {
                n: state.__dict__.pop(n) for n in set(FIELDS) - free - {*entry.needs.split()} if hasattr(state, n)
            }
            before = {n: getattr(state, n) for n in FIELDS if hasattr(state, n)}
            again = entry.run(state)
            changed = {n for n in FIELDS if hasattr(state, n) and before.get(n) is not getattr(state, n)}
            assert changed <= {*entry.makes.split()}, f"{entry.name} also fills {changed}"
            for name, value in hidden.items():
                state.__dict__.setdefault(name, value)
            return again

        return replace(entry, run=run)

    monkeypatch.setattr(pipeline, "PIPELINE", [alone(entry) for entry in PIPELINE])
    for mesh in (None, {"batch": 2, "ulysses": 2, "ring": 1}):
        run_pipeline(State(got.gm, got.mode, Topology.grid(1, 4), 0, Asked(mesh, shard_everything=True)))


def test_old_names_of_passes_are_other_names() -> None:
    old = {new: name for name, new in OLD_NAMES.items()}
    order = [old.get(name, name) for name in NAMES if name != "report_graph"]
    assert set(OLD_NAMES) <= set(order)
    model, inputs = build("self")
    report = run_pipeline(state_of(captured(model, *inputs), *order)).report
    assert tuple(report.pass_seconds) == NAMES, "the report comes last where the order does not name it"


def test_what_runs_again_is_in_the_dump_and_in_the_order(tmp_path: Path) -> None:
    assert [entry.name for entry in PIPELINE if isinstance(entry, Restart)] == ["rewrite_batch"]
    model, inputs = build("self")
    got = captured(model, *inputs)
    asked = Asked({"batch": 2, "ulysses": 2, "ring": 1})
    report = run_pipeline(State(got.gm, got.mode, Topology.grid(1, 4), 0, asked), dump=tmp_path).report
    assert tuple(report.pass_seconds) == NAMES and report.batch == 2
    (folder,) = tmp_path.iterdir()
    at = NAMES.index("rewrite_batch")
    ran = [*NAMES[: at + 1], *NAMES[:at], *NAMES[at + 1 :]]
    files = sorted(path.name for path in folder.iterdir() if path.name[0].isdigit())
    assert files == ["00_captured.txt", *(f"{i:02d}_{name}.txt" for i, name in enumerate(ran, 1))]
    assert "again, after rewrite_batch: " in (folder / f"{at + 2:02d}_{NAMES[0]}.txt").read_text()
