"""Outputs of the kernel for Hopper that go to other machines; the PTX machine runs them (tests/support/ptx)."""

from __future__ import annotations

import ast

import pytest
from hopper_text import called, check_code, functions, loops, needs_tensor_copies, spec_of_size

from sfcompile.codegen.kernels.attend import attend_source
from sfcompile.codegen.toolchain.compiler import compile_attend
from sfcompile.codegen.toolchain.nvshmem_bitcode import slim_library, wheel


@pytest.mark.parametrize("reach", ["nvshmem", "mixed"])
def test_warpgroups_stage_and_count_and_one_program_puts(reach: str) -> None:
    source = attend_source(spec_of_size(64, reach=reach))
    by_name = functions(source)
    assert "attend_nvshmem" in by_name and "attend" not in by_name and "putmem_signal_nbi_block" not in source
    consumer = ast.unparse(by_name["consumer"])
    order = ["target = bank + staging", "gl.store(target_ptr", "come(counters_ptr + out_slot)"]
    assert sorted(order, key=consumer.index) == order
    assert ("raise_signal(" in consumer) == ("last_of(" in consumer) == (reach == "mixed")
    # In a warpgroup NVSHMEM's code would cost the loop over blocks; here the warps have not parted yet.
    puts = {name: called(entry).count("putmem_signal_nbi_warp") for name, entry in by_name.items()}
    assert {name: n for name, n in puts.items() if n} == {"attend_nvshmem": 2}  # outputs, chunks that are passed on
    (sending,) = (loop for loop in loops(by_name["attend_nvshmem"]) if "wait_for_all" in called(loop))
    text = ast.unparse(sending)
    order = [
        "wait_for_all(counters_ptr + out_slot, 2 * tiles, place_ptr)",
        "unbroken(",
        "if first_warp() != 0:",
        "putmem_signal",
    ]
    assert sorted(order, key=text.index) == order


def test_the_program_that_puts_does_not_attend() -> None:
    for changes, aside in (
        ({}, "COPY_PROGRAMS - 1"),
        ({"pushes": False}, "COPY_PROGRAMS"),
        ({"reach": "peer"}, "COPY_PROGRAMS"),
    ):
        spec = spec_of_size(64, **{"reach": "mixed", **changes})
        text = attend_source(spec)
        assert f"me = program - {aside}\n" in text and f"workers = programs - {aside}\n" in text
        assert spec.aside == 1 + spec.senders == 1 + ("wait_for_all(counters_ptr" in text)
        assert text.count("num_units = 0") == spec.aside
    assert spec_of_size(64, reach="nvshmem", forwards=False).aside == 1
    assert spec_of_size(64, reach="nvshmem", fetch="threads").senders == 0


CASES = [(head_dim, reach, changes) for head_dim in (64, 128) for reach in ("nvshmem", "mixed") for changes in (
    {"lse": True, "group": 4}, {"forwards": False, "tails": "none", "dtype": "fp16"}, {"mask": "key"},
    {"causal": True}, {"causal": True, "mask": "key"},
) if head_dim == 64 or "causal" not in changes]  # fmt: skip


@needs_tensor_copies
@pytest.mark.parametrize(
    ("head_dim", "reach", "changes"),
    [
        pytest.param(*case, marks=[] if i == len(CASES) // 2 + 2 else pytest.mark.thorough)
        for i, case in enumerate(CASES)
    ],
)
def test_nvshmem_costs_the_loop_over_blocks_nothing(head_dim: int, reach: str, changes: dict[str, object]) -> None:
    """Its device code is linked and inlined: with a call in it, warps would get no registers from others."""
    found = wheel()
    kernel = compile_attend(spec_of_size(head_dim, reach=reach, **changes), 90, slim_library(90))
    assert kernel.linked and "call.uni" not in kernel.ptx
    if found is not None and found[1] == "3.4.5":  # newer ones are longer
        check_code(kernel, 128)
