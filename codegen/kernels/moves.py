"""Writes the small kernels around attention: put (cut, copy, send) and collect (wait, copy home)."""

from __future__ import annotations

from dataclasses import dataclass

from sfcompile.codegen.kernels.codecs import loaded, pointers, stored
from sfcompile.codegen.kernels.reach import KernelText
from sfcompile.codegen.kernels.tables import COLLECT, PUT
from sfcompile.codegen.kernels.text import module
from sfcompile.codegen.rows.elements import TRITON_TYPES, block_of, element_bytes, is_padded
from sfcompile.codegen.rows.rows import RowProgram
from sfcompile.runtime.program.formats import FP8, SAME

PUT_ARGUMENTS = (
    "x_ptr", "x_sb", "x_sh", "x_sr", "heaps_ptr", "place_ptr", "puts_ptr", "receivers_ptr", "counters_ptr", "rank",
    "num_puts", "num_receivers", "batch",
)  # fmt: skip
COLLECT_ARGUMENTS = (
    "out_ptr", "out_sb", "out_sh", "out_sr", "heaps_ptr", "place_ptr", "collects_ptr", "slots_ptr", "rank",
    "num_collects", "num_slots", "batch",
)  # fmt: skip


@dataclass(frozen=True)
class MoveSpec:
    """What a put or collect kernel is specialised to.

    Attributes:
        dtype: "fp32", "fp16" or "bf16".
        width: elements of a row, 1 to 256.
        reach: as in KernelSpec.
        lines: rows that a program copies at a time; 0: as many as registers allow without spilling.
        written: how rows travel (runtime/program/formats.py).
    """

    dtype: str
    width: int
    reach: str = "peer"
    lines: int = 0
    written: str = SAME

    @property
    def rows_at_a_time(self) -> int:
        """``lines``, or the number for the width."""
        most = 8 if self.written == FP8 else 32  # a factor is found from all of a row, in fp32
        return self.lines or (most if block_of(self.width) == 128 else 16)


def put_source(spec: MoveSpec, rows: RowProgram | None = None) -> str:
    """The module of ``put``: cut a tensor [B, H, L, W] into what each rank needs, copy, raise the signals.

    First it waits until every rank that this one writes to in the epoch has read the epoch that used the bank before;
    where some are reached by NVSHMEM only, until every rank has (receivers_of in codegen/engines/device_engine.py).
    Then, by load and store, rows go straight into the peers' slots. For NVSHMEM they are gathered in the staging area
    first, and the last program to finish sends the chunk as a whole. (The staging area of a bank is free by then too: a
    rank that has ended an epoch has received all that was sent to it.) What stays here is copied into the bank as well.

    Args:
        rows: compute the tensor's rows from these sources instead of reading them (codegen/rows/rows.py).
    """
    out = KernelText(spec.reach)
    with out.kernel("put", move_arguments("put", rows)):
        out.wait_for_credits()
        out("p = 0")
        with out.block("while p < num_puts:"):
            out(f"put = puts_ptr + p * {len(PUT)}")
            out.read("put", PUT)
            out("target = bank + at", "lines = batch * heads * rows")
            with out.block("if dst >= 0:"):
                out.target("at")
            _copy_lines(out, spec, home=False, program=rows)
            with out.block("if dst >= 0:"):
                with out.block("if last_of(counters_ptr + slot, programs):"):
                    out.announce("slot", "at")
            out("p += 1")
    computed = "" if rows is None else f" computed from {len(rows.dims)} tensors"
    return module(f"Sends rows of {spec.width} {spec.dtype}{computed}.", _constants(spec, rows) + out.text)


def collect_source(spec: MoveSpec) -> str:
    """The module of ``collect``: wait for each output that comes home and copy it to its heads and rows."""
    out = KernelText(spec.reach)
    with out.kernel("collect", move_arguments("collect")):
        out("c = 0")
        with out.block("while c < num_collects:"):
            out(f"row_of_table = collects_ptr + c * {len(COLLECT)}")
            out.read("row_of_table", COLLECT)
            out.wait("slot")
            out("source = bank + at", "lines = batch * heads * rows")
            _copy_lines(out, spec, home=True)
            out("c += 1")
        out.check_tags()
    return module(f"Brings home rows of {spec.width} {spec.dtype}.", _constants(spec) + out.text)


def move_arguments(name: str, rows: RowProgram | None = None) -> tuple[str, ...]:
    """Arguments of "put" (that computes ``rows``) or "collect", in order."""
    names = {"put": PUT_ARGUMENTS, "collect": COLLECT_ARGUMENTS}[name]
    if rows is not None:
        names = (*rows.arguments, *(entry for entry in names if not entry.startswith("x_")))
    return names


def _constants(spec: MoveSpec, rows: RowProgram | None = None) -> str:
    block, lines = block_of(spec.width), spec.rows_at_a_time
    if rows is not None and not spec.lines:  # several values of a row are held at a time
        lines = 16 if block <= 128 and spec.written == SAME else 8
    return f"W = tl.constexpr({spec.width})\nW_BLOCK = tl.constexpr({block})\nLINES = tl.constexpr({lines})\n\n\n"


def _copy_lines(out: KernelText, spec: MoveSpec, home: bool, program: RowProgram | None = None) -> None:
    """Rows (batch, head, token) of W elements between a strided tensor, or what computes it, and a packed chunk."""
    element = TRITON_TYPES[spec.dtype]
    bytes_of_row = spec.width * element_bytes(spec.dtype)
    packed = f"({'source' if home else 'target'}).to(tl.pointer_type({element}))"
    packed = f"tl.multiple_of({packed}, 16)" if bytes_of_row % 16 == 0 else packed
    out(f"packed_ptr = {packed}", "w = tl.arange(0, W_BLOCK)")
    if spec.written != SAME:
        out(*pointers(spec.written, "x", "source" if home else "target", "lines", spec.width))
    if program is not None:
        out(*program.head)
    out("line = program * LINES")
    with out.block("while line < lines:"):
        padded = " & (w < W)[None, :]" if is_padded(spec.width) else ""
        out(
            "i = line + tl.arange(0, LINES)",
            "bh = i // rows",
            "row = first_row + i % rows",
            f"inside = (i < lines)[:, None]{padded}",
        )
        dense = "i[:, None] * W + w[None, :]"
        if program is not None:
            out("live = i < lines", "b = bh // heads", "h = first_head + bh % heads", *program.lines)
            _store(out, spec, f"{program.value}.to({element})", dense)
            return
        name = "out" if home else "x"
        out(
            f"strided_ptr = {name}_ptr + ((bh // heads) * {name}_sb + (first_head + bh % heads) * {name}_sh"
            f" + row * {name}_sr)[:, None] + w[None, :]",
        )
        if not home:
            _store(out, spec, "tl.load(strided_ptr, mask=inside)", dense)
        elif spec.written == SAME:
            out(f"tl.store(strided_ptr, tl.load(packed_ptr + {dense}, mask=inside), mask=inside)")
            out("line += programs * LINES")
        else:
            out(*loaded(spec.written, "x", spec.dtype, dense, ["inside"], "i", ["(i < lines)"], "[:, None]"))
            out("tl.store(strided_ptr, x, mask=inside)", "line += programs * LINES")


def _store(out: KernelText, spec: MoveSpec, values: str, dense: str) -> None:
    """Rows into the chunk, encoded if they travel so; what stays here stays as it is."""
    if spec.written == SAME:
        out(f"tl.store(packed_ptr + {dense}, {values}, mask=inside)", "line += programs * LINES")
        return
    out(f"values = {values}")
    with out.block("if dst >= 0:"):
        out(*stored(spec.written, "x", "values", dense, "inside", "i", "(i < lines)"))
    with out.block("else:"):
        out(f"tl.store(packed_ptr + {dense}, values, mask=inside)")
    out("line += programs * LINES")
