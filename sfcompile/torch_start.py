"""What Inductor finds out when a process starts to compile: the private part of torch for lowering/kept_start.py.

With torch_private.py and torch_breaks.py one of the files that touch what torch does not promise.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple


class StartFacts(NamedTuple):
    """What is found out.

    Attributes:
        vector_isas: the vector instructions that Inductor takes, by name ("": none work), and what it knows of them.
        torch_key, triton_key: marks of torch's and Triton's sources; None: no Triton.
    """

    vector_isas: Mapping[str, Mapping[str, bool | int | str]]
    torch_key: str
    triton_key: str | None


def decides_start() -> tuple[str, list[str]] | None:
    """The C++ compiler with its version, and what this processor can do, whether the compiler can use it or not.

    None: there is no compiler, Inductor was told these things by hand, or this torch finds them out in another way.
    """
    codecache, isas, builder, config = (
        _inductor(name) for name in ("codecache", "cpu_vec_isa", "cpp_builder", "config")
    )
    if platform.machine() != "x86_64" or config.cpp.vec_isa_ok is not None or _others_are_asked(isas):
        return None
    try:
        if not all(hasattr(key, "set") for key in (codecache.torch_key, codecache.triton_key)):
            return None
        isas.valid_vec_isa_list.cache_info()
        compiler = builder.get_cpp_compiler()
        return f"{compiler} {builder.get_compiler_version_info(compiler)}", sorted(isas.x86_isa_checker())
    except (AttributeError, RuntimeError, OSError, subprocess.SubprocessError):
        return None


def try_first_only() -> None:
    """Have Inductor try vector instructions until some work, which it takes, and the others only where they are asked
    for: each trial compiles a library."""
    isas = _inductor("cpu_vec_isa")
    if isas.valid_vec_isa_list.cache_info().currsize:
        return  # all are tried

    def first() -> list[Any]:
        can = isas.x86_isa_checker()
        tried = (isa for isa in isas.supported_vec_isa_list if all(flag in can for flag in str(isa).split()) and isa)
        return list(itertools.islice(tried, 1))

    _take_first(isas, first)


def known_at_start() -> StartFacts | None:
    """What Inductor has found out in this process; None: it has not looked for vector instructions yet, or what it
    found has to be found, or asked for, in every process."""
    codecache, isas = _inductor("codecache"), _inductor("cpu_vec_isa")
    if not isas.valid_vec_isa_list.cache_info().currsize or _others_are_asked(isas):
        return None
    first = {
        str(isa): {
            name: value for name, value in vars(isa).items() if not name.startswith("__")
        }  # methods of its class
        for isa in isas.valid_vec_isa_list()[:1]
    }
    plain = all(type(value) in (bool, int, str) for facts in first.values() for value in facts.values())
    # Linux lets a process use AMX's tiles once it has asked for them, which the trial does.
    if not plain or any("amx" in name for name in first):
        return None
    return StartFacts(first, codecache.torch_key().hex(), codecache.triton_key())


def know_at_start(facts: StartFacts) -> None:
    """Tell Inductor what it would find out. What it knows already stays."""
    codecache, isas = _inductor("codecache"), _inductor("cpu_vec_isa")
    if not isas.valid_vec_isa_list.cache_info().currsize:
        known = [isa for isa in isas.supported_vec_isa_list if str(isa) in facts.vector_isas]
        for isa in known:
            vars(isa).update(facts.vector_isas[str(isa)])
        _take_first(isas, lambda: known)
        isas.valid_vec_isa_list()
    for key, value in ((codecache.torch_key, bytes.fromhex(facts.torch_key)), (codecache.triton_key, facts.triton_key)):
        with suppress(RuntimeError):  # known already
            key.set(value)


def _take_first(isas: Any, first: Callable[[], list[Any]]) -> None:
    """From now on ``first`` gives the vector instructions that work, unless others than the first are asked for."""
    every, one = isas.valid_vec_isa_list, functools.cache(first)

    def valid() -> list[Any]:
        return every() if _others_are_asked(isas) else one()

    valid.cache_info, valid.cache_clear = one.cache_info, one.cache_clear  # type: ignore[attr-defined]
    isas.valid_vec_isa_list = valid


def _others_are_asked(isas: Any) -> bool:
    """Whether Inductor looks for vector instructions by their name or width, and does not take the first."""
    return isas.config.cpp.simdlen is not None or bool(os.environ.get("ATEN_CPU_CAPABILITY"))


def _inductor(name: str) -> Any:
    return importlib.import_module(f"torch._inductor.{name}")
