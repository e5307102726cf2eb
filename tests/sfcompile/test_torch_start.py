"""What Inductor finds out at a start is told to one that does not know it yet, and to no other."""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any

import pytest

from sfcompile.torch_start import StartFacts, decides_start, know_at_start, known_at_start, try_first_only

FACTS = StartFacts({"avx2": {"_is_fast": True}}, "ab" * 32, "3.9.0-cd")


def inductor(name: str) -> Any:
    """A module of Inductor's."""
    return importlib.import_module(f"torch._inductor.{name}")


told = pytest.mark.skipif(
    not all(hasattr(getattr(inductor("codecache"), name, None), "set") for name in ("torch_key", "triton_key")),
    reason="this torch cannot be told what it would find out: nothing is kept",
)


class Isa:
    """Vector instructions that work or not."""

    def __init__(self, name: str, works: bool = True) -> None:
        self._works, self.tried = works, 0
        self._name = name

    def __str__(self) -> str:
        return self._name

    def __bool__(self) -> bool:
        self.tried += 1
        return self._works


@pytest.fixture
def unknowing(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Inductor as it is in a process that has compiled nothing; looking would fail."""
    codecache, isas = inductor("codecache"), inductor("cpu_vec_isa")

    def looks() -> Any:
        raise AssertionError("it looked for itself")

    for name in ("torch_key", "triton_key"):
        monkeypatch.setattr(codecache, name, codecache.torch_key_cache(looks))
    monkeypatch.setattr(isas, "valid_vec_isa_list", functools.cache(looks))
    monkeypatch.setattr(isas, "supported_vec_isa_list", [Isa("avx512", False), Isa("avx2"), Isa("avx")])
    monkeypatch.setattr(isas, "x86_isa_checker", lambda: ["avx", "avx2", "avx512"])
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    return codecache, isas


@told
def test_who_knows_nothing_takes_what_it_is_told(unknowing: tuple[Any, Any]) -> None:
    codecache, isas = unknowing
    assert known_at_start() is None
    know_at_start(FACTS)
    (isa,) = isas.valid_vec_isa_list()
    assert isas.pick_vec_isa() is isa and str(isa) == "avx2" and vars(isa)["_is_fast"] and not isa.tried
    known = known_at_start()
    assert known is not None and known.vector_isas["avx2"]["_is_fast"] and known[1:] == FACTS[1:]
    assert codecache.torch_key() == bytes.fromhex(FACTS.torch_key) and codecache.triton_key() == FACTS.triton_key


@told
def test_what_is_known_stays(unknowing: tuple[Any, Any]) -> None:
    know_at_start(FACTS)
    know_at_start(StartFacts({"avx512": {}}, "00" * 32, None))
    known = known_at_start()
    assert known is not None and list(known.vector_isas) == ["avx2"] and known[1:] == FACTS[1:]


@told
def test_no_more_is_tried_than_the_first_that_works(unknowing: tuple[Any, Any]) -> None:
    _, isas = unknowing
    try_first_only()
    assert str(isas.pick_vec_isa()) == str(isas.pick_vec_isa()) == "avx2"
    assert [isa.tried for isa in isas.supported_vec_isa_list] == [1, 1, 0]


@told
@pytest.mark.parametrize("how", ["by name", "by width"])
def test_where_others_are_asked_for_all_are_looked_at(
    how: str, unknowing: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, isas = unknowing
    try_first_only()
    assert str(isas.pick_vec_isa()) == "avx2"
    if how == "by name":
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with inductor("config").patch({"cpp.simdlen": 256 if how == "by width" else None}):
        with pytest.raises(AssertionError, match="looked for itself"):
            isas.pick_vec_isa()
        assert known_at_start() is None and decides_start() is None


@told
def test_what_has_to_be_asked_for_in_every_process_is_not_kept(
    unknowing: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that has not asked for AMX's tiles is ended at their first use."""
    _, isas = unknowing
    monkeypatch.setattr(isas, "supported_vec_isa_list", [Isa("avx512 amx_tile")])
    monkeypatch.setattr(isas, "x86_isa_checker", lambda: ["avx512", "amx_tile"])
    try_first_only()
    assert "amx" in str(isas.pick_vec_isa())
    assert known_at_start() is None


@told
def test_the_first_is_what_torch_itself_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    isas = inductor("cpu_vec_isa")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(isas, "valid_vec_isa_list", isas.valid_vec_isa_list)  # put back when the test ends
    want = isas.pick_vec_isa()
    monkeypatch.setattr(isas, "valid_vec_isa_list", functools.cache(lambda: pytest.fail("all were tried")))
    try_first_only()
    assert isas.pick_vec_isa() is want


@told
def test_what_a_trial_leaves_behind_is_kept_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags of a compile hang on it, and with them Inductor's keys: another start is to come to the same ones."""
    isas = inductor("cpu_vec_isa")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(isas, "valid_vec_isa_list", isas.valid_vec_isa_list)  # put back when the test ends
    isa, facts = isas.pick_vec_isa(), known_at_start()
    if "amx" in str(isa) or not isa:
        assert facts is None or not facts.vector_isas
        return
    assert facts is not None and list(facts.vector_isas) == [str(isa)]
    flags, before = isa.build_arch_flags(), dict(vars(isa))
    for name, value in facts.vector_isas[str(isa)].items():
        assert type(value) in (bool, int, str)
        monkeypatch.setitem(vars(isa), name, not value if isinstance(value, bool) else "other")
    assert isa.build_arch_flags() != flags
    monkeypatch.setattr(isas, "valid_vec_isa_list", functools.cache(lambda: pytest.fail("it looked for itself")))
    know_at_start(StartFacts(*json.loads(json.dumps(facts))))
    assert isas.pick_vec_isa() is isa and isa.build_arch_flags() == flags and vars(isa) == before


@told
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


@told
def test_without_a_compiler_nothing_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(inductor("cpp_builder"), "get_cpp_compiler", none)
    assert decides_start() is None
