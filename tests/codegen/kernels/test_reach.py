"""Text that reaches other ranks: what each reach writes, and when."""

from __future__ import annotations

import ast

import pytest

from sfcompile.codegen.kernels.reach import KernelText, put_signal, reach_of

REACHES = ("peer", "nvshmem", "mixed")


def test_reach_follows_the_machines() -> None:
    assert [reach_of(machines) for machines in ((0, 0), (0, 1), (0, 0, 1))] == list(REACHES)


@pytest.mark.parametrize("reach", REACHES)
def test_waits_are_our_own_whatever_the_reach(reach: str) -> None:
    """NVSHMEM's wait is a volatile loop without an acquire, and nothing would end it."""
    out = KernelText(reach)
    out.wait("slot")
    out.wait_for_credits()
    ast.parse(out.text)
    assert out.text.count("wait_word(") == 2 and "signal_wait_until" not in out.text
    assert "place_ptr, -1 - receiver)" in out.text


@pytest.mark.parametrize("reach", REACHES)
def test_nothing_leaves_a_rank_that_gave_up(reach: str) -> None:
    out = KernelText(reach)
    with out.kernel("put", ("place_ptr", "rank", "num_puts")):
        out.wait_for_credits()
        out.announce("slot", "at")
    lines = [line.strip() for line in out.text.splitlines()]
    assert lines.count("num_puts *= going") == 2
    last = max(i for i, line in enumerate(lines) if line.startswith(("raise_signal(", "putmem_signal")))
    assert any(line == "if unbroken(place_ptr) != 0:" for line in lines[:last])


@pytest.mark.parametrize("reach", REACHES)
def test_near_destinations_by_store_and_far_ones_by_nvshmem(reach: str) -> None:
    out = KernelText(reach)
    out.target("at")
    out.announce("slot", "at")
    ast.parse(out.text)
    near, far = reach != "nvshmem", reach != "peer"
    assert ("raise_signal(" in out.text) == ("+ bank_at + at\n" in out.text) == near
    assert ("putmem_signal_nbi_block(" in out.text) == ("target = bank + staging" in out.text) == far
    assert ("if net != 0:" in out.text) == (near and far)


def test_a_fork_may_be_an_if_with_an_else_or_second_thoughts() -> None:
    texts = {}
    for name, changes in {"plain": {}, "near": {"if_near": "t"}, "revised": {"if_near": "t", "revise": True}}.items():
        out = KernelText("mixed")
        out.fork(["x = 1"], ["x = 2"], **changes)  # type: ignore[arg-type]
        texts[name] = out.text
    assert texts["plain"] == "if net != 0:\n    x = 2\nelse:\n    x = 1\n"
    assert texts["near"] == "if t:\n    x = 1\nelse:\n    x = 2\n"
    assert texts["revised"] == "x = 2\nif t:\n    x = 1\n"


@pytest.mark.parametrize("reach", REACHES)
def test_kernels_have_heads_and_read_what_they_need(reach: str) -> None:
    out = KernelText(reach)
    with out.kernel("move", ("x_ptr", "rank", "num_puts")):
        out.read("row", ("slot", "net"))
    (kernel,) = ast.parse(out.text).body
    assert isinstance(kernel, ast.FunctionDef) and kernel.name == ("move" if reach == "peer" else "move_nvshmem")
    assert 'do_not_specialize=["rank", "num_puts"]' in out.text
    assert ("net = tl.load(row + 1)" in out.text) == (reach == "mixed")


def test_puts_are_code() -> None:
    for group in ("block", "warp"):
        text = "\n".join(put_signal("dst", "bank", "bank_at + 1", "nbytes", "signals_at + 2", "signal", group))
        (*_, last) = ast.parse(text).body
        assert isinstance(last, ast.If) == (group == "warp")  # one warp of those that come there
        assert f"putmem_signal_nbi_{group}(" in ast.unparse(last)


def test_where_warps_have_work_of_their_own_one_of_them_puts() -> None:
    """All threads of a program never meet there; what warps wait for each other for stands before the test."""
    out = KernelText("mixed", "warp")
    out.announce("slot", "at")
    out.fork(["pass"], out.put_signal("bank + at", "to_at", "signals_at"))
    ast.parse(out.text)
    assert out.text.count("if first_warp() != 0:") == out.text.count("putmem_signal_nbi_warp(") == 2
    assert "_block(" not in out.text
    assert out.text.index("unbroken(") < out.text.index("first_warp(")
