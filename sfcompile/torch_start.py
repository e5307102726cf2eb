"""What Inductor finds out when a process starts to compile: the private part of torch for lowering/kept_start.py.

With torch_private.py and torch_breaks.py one of the files that touch what torch does not promise.
"""

from __future__ import annotations

import functools
import importlib
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple


class StartFacts(NamedTuple):
    """Vector instructions that work, by name, and marks of torch's and Triton's sources (None: no Triton)."""

    vector_isas: Sequence[str]
    torch_key: str
    triton_key: str | None


def decides_start() -> tuple[str, list[str]] | None:
    """The C++ compiler with its version, and what this processor can do, whether the compiler can use it or not.

    None: there is no compiler, Inductor was told these things by hand, or this torch finds them out in another way.
    """
    codecache, isas, builder, config = (
        _inductor(name) for name in ("codecache", "cpu_vec_isa", "cpp_builder", "config")
    )
    if platform.machine() != "x86_64" or config.cpp.vec_isa_ok is not None:
        return None
    try:
        if not all(hasattr(key, "set") for key in (codecache.torch_key, codecache.triton_key)):
            return None
        isas.valid_vec_isa_list.cache_info()
        compiler = builder.get_cpp_compiler()
        return f"{compiler} {builder.get_compiler_version_info(compiler)}", sorted(isas.x86_isa_checker())
    except (AttributeError, RuntimeError, OSError, subprocess.SubprocessError):
        return None


def known_at_start() -> StartFacts | None:
    """What Inductor has found out in this process; None: it has not looked for vector instructions yet."""
    codecache, isas = _inductor("codecache"), _inductor("cpu_vec_isa")
    if not isas.valid_vec_isa_list.cache_info().currsize:
        return None
    names = [str(isa) for isa in isas.valid_vec_isa_list()]
    return StartFacts(names, codecache.torch_key().hex(), codecache.triton_key())


def know_at_start(facts: StartFacts) -> None:
    """Tell Inductor what it would find out. What it knows already stays."""
    codecache, isas = _inductor("codecache"), _inductor("cpu_vec_isa")
    if not isas.valid_vec_isa_list.cache_info().currsize:
        known = [isa for isa in isas.supported_vec_isa_list if str(isa) in facts.vector_isas]
        isas.valid_vec_isa_list = functools.cache(lambda: known)
        isas.valid_vec_isa_list()
    for key, value in ((codecache.torch_key, bytes.fromhex(facts.torch_key)), (codecache.triton_key, facts.triton_key)):
        with suppress(RuntimeError):  # known already
            key.set(value)


def _inductor(name: str) -> Any:
    return importlib.import_module(f"torch._inductor.{name}")
