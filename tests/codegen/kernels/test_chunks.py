"""Text of the kernels that move whole chunks; test_transfers.py tests what they do on ranks."""

from __future__ import annotations

import ast

import pytest

from sfcompile.codegen.kernels.chunks import (
    ChunkSpec,
    chunk_arguments,
    receive_source,
    release_source,
    send_source,
    tell_source,
    wait_source,
)


@pytest.mark.parametrize("reach", ["peer", "nvshmem", "mixed"])
def test_every_text_is_code_with_the_arguments_that_it_names(reach: str) -> None:
    spec = ChunkSpec(reach)
    made = {
        "send": send_source(spec), "receive": receive_source(spec), "release": release_source(spec),
        "wait": wait_source(), "tell": tell_source(),
    }  # fmt: skip
    for name, source in made.items():
        kernel = ast.parse(source).body[-1]
        assert isinstance(kernel, ast.FunctionDef) and kernel.name.startswith(name)
        assert [entry.arg for entry in kernel.args.args] == list(chunk_arguments(name))
        uses = "putmem_signal_nbi_block(" in source
        assert uses == (reach != "peer" and name not in ("receive", "wait", "tell"))
