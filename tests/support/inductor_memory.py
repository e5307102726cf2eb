"""Inductor's wrapper of a graph, and whether the memory that puts read is left alone until their joins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.graph import GraphLowering

from sfcompile.capture.graph import compile_with_inductor

_BUFFER = re.compile(r"\b(?:buf\d+|arg\d+_\d+|_frozen_param\d+)\b")
_TALK = re.compile(r"torch\.ops\.streamfusion\.(\w+)\.default\((.*)\)\s*$")
_SITE = re.compile(r", '(\w+)', (\d+)")
_KERNEL = re.compile(r"^(\w+) = async_compile\.cpp_pybind\(\[(.*?)\]", re.MULTILINE)


class _Written(Exception):
    """The wrapper is all that was wanted: no C++ is compiled."""


def wrapper_of(gm: fx.GraphModule, inputs: Sequence[Any], mode: Any) -> str:
    """What Inductor writes for a graph."""
    codes: list[str] = []

    def keep(code: str) -> None:
        codes.append(code)
        raise _Written

    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(keep)), torch.no_grad():
        try:
            with config.patch(force_disable_caches=True):
                compile_with_inductor(gm, inputs, mode, {})
        except Exception:
            if not codes:
                raise
    return codes[-1]


def disturbed_reads(code: str) -> tuple[int, list[str]]:
    """How many buffers puts read until a join, and where one of them is given away, written, or not the join's."""
    writes = {name: [not kind.strip(" '").startswith("const") for kind in kinds.split(",")]
              for name, kinds in _KERNEL.findall(code)}  # fmt: skip
    reading: dict[tuple[str, str], set[str]] = {}
    reads, faults = 0, []
    for line in code[code.index("def call(") :].splitlines():
        text = line.strip()
        talk = _TALK.search(text)
        if talk and (talk[1].startswith("put_") or talk[1] == "exchange_start"):
            site = _SITE.search(talk[2])
            assert site is not None, text
            sources = _sources(talk[2])
            reads += len(sources)
            reading.setdefault((site[1], site[2]), set()).update(sources)
        elif talk and talk[1] in ("attend", "exchange_finish"):
            site = _SITE.search(talk[2])
            assert site is not None, text
            missing = reading.pop((site[1], site[2]), set()) - set(_BUFFER.findall(talk[2]))
            faults += [f"{text}: does not hold {name}" for name in sorted(missing)]
        else:
            live = set().union(*reading.values())
            faults += [f"{text}: {name}" for name in sorted(_disturbs(text, writes) & live)]
    assert not reading, "a put that nothing waits for"
    return reads, faults


def _sources(arguments: str) -> list[str]:
    """Buffers in a put's first argument, a tensor or a list of them."""
    depth = 0
    for i, letter in enumerate(arguments):
        depth += letter in "([" and 1 or (letter in ")]" and -1 or 0)
        if letter == "," and depth == 0:
            return _BUFFER.findall(arguments[:i])
    return []


def _disturbs(text: str, writes: dict[str, list[bool]]) -> set[str]:
    """Buffers that a line frees, renames for another value, or writes to."""
    if text.startswith("del "):
        return set(_BUFFER.findall(text))
    if "# reuse" in text:
        return set(_BUFFER.findall(text.partition("=")[2].partition(";")[0]))
    out = re.search(r"out=(.*)\)\s*$", text)
    if out:
        return set(_BUFFER.findall(out[1])[:1])
    call = re.match(r"(\w+)\((.*)\)$", text)
    if call and call[1] in writes:
        return {name for name, written in zip(_arguments(call[2]), writes[call[1]], strict=False) if written}
    return set()


def _arguments(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]
