"""What Inductor finds out at a start is told to one that does not know it yet, and to no other."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import pytest

from sfcompile.torch_start import StartFacts, decides_start, know_at_start, known_at_start

FACTS = StartFacts(["avx2"], "ab" * 32, "3.9.0-cd")


def inductor(name: str) -> Any:
    """A module of Inductor's."""
    return importlib.import_module(f"torch._inductor.{name}")


@pytest.fixture
def unknowing(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Inductor as it is in a process that has compiled nothing; looking would fail."""
    codecache, isas = inductor("codecache"), inductor("cpu_vec_isa")

    def looks() -> Any:
        raise AssertionError("it looked for itself")

    for name in ("torch_key", "triton_key"):
        monkeypatch.setattr(codecache, name, codecache.torch_key_cache(looks))
    monkeypatch.setattr(isas, "valid_vec_isa_list", functools.cache(looks))
    return codecache, isas


def test_who_knows_nothing_takes_what_it_is_told(unknowing: tuple[Any, Any]) -> None:
    codecache, isas = unknowing
    assert known_at_start() is None
    know_at_start(FACTS)
    assert known_at_start() == FACTS
    assert codecache.torch_key() == bytes.fromhex(FACTS.torch_key) and codecache.triton_key() == FACTS.triton_key
    assert str(isas.pick_vec_isa()) == "avx2" or isas.config.cpp.simdlen is not None


def test_what_is_known_stays(unknowing: tuple[Any, Any]) -> None:
    know_at_start(FACTS)
    know_at_start(StartFacts(["avx512"], "00" * 32, None))
    assert known_at_start() == FACTS


def test_what_decides_it_is_told_unless_it_was_told_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    decides = decides_start()
    assert decides is not None
    compiler, flags = decides
    assert "g++" in compiler or "clang" in compiler
    assert flags == sorted(flags)
    with inductor("config").patch({"cpp.vec_isa_ok": True}):
        assert decides_start() is None
    monkeypatch.setattr(inductor("codecache"), "torch_key", lambda: b"")  # as another torch may have it
    assert decides_start() is None


def test_without_a_compiler_nothing_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(inductor("cpp_builder"), "get_cpp_compiler", none)
    assert decides_start() is None
