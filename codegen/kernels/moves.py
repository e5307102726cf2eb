"""Writes the small kernels around attention: put (cut, copy, send), collect (wait, copy home), merge (of partials)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sfcompile.codegen.kernels.tables import COLLECT, PUT
from sfcompile.codegen.kernels.text import (
    PLACE,
    Lines,
    columns,
    entry_name,
    heap_of,
    module,
    prologue,
    put_signal,
    wait_lines,
)
from sfcompile.codegen.rows.indices import block_of
from sfcompile.codegen.rows.rows import RowProgram

ELEMENTS = {"fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16"}
PUT_ARGUMENTS = (
    "x_ptr", "x_sb", "x_sh", "x_sr", "heaps_ptr", "place_ptr", "puts_ptr", "receivers_ptr", "counters_ptr", "rank",
    "num_puts", "num_receivers", "batch",
)  # fmt: skip
COLLECT_ARGUMENTS = (
    "out_ptr", "out_sb", "out_sh", "out_sr", "heaps_ptr", "place_ptr", "collects_ptr", "rank", "num_collects", "batch",
)  # fmt: skip
_INTEGERS = ("rank", "num_puts", "num_collects", "num_receivers", "num_ranks", "batch", "nbytes")


@dataclass(frozen=True)
class MoveSpec:
    """What a put or collect kernel is specialised to.

    Attributes:
        dtype: "fp32", "fp16" or "bf16".
        width: elements of a row, 1 to 256.
        reach, bounded: as in KernelSpec.
        lines: rows that a program copies at a time; 0: as many as registers allow without spilling.
    """

    dtype: str
    width: int
    reach: str = "peer"
    bounded: bool = False
    lines: int = 0

    @property
    def rows_at_a_time(self) -> int:
        """``lines``, or the number for the width."""
        return self.lines or (32 if block_of(self.width) == 128 else 16)


def put_source(spec: MoveSpec, rows: RowProgram | None = None) -> str:
    """The module of ``put``: cut a tensor [B, H, L, W] into what each rank needs, copy, raise the signals.

    First it waits until every rank that this one writes to in the epoch has read the epoch that used the bank before.
    Then, by load and store, rows go straight into the peers' slots. For NVSHMEM they are gathered in the staging area
    first, and the last program to finish sends the chunk as a whole. (The staging area of a bank is free by then too:
    a receiver that has read a chunk has received it.) What stays here is copied into the bank as well.

    Args:
        rows: compute the tensor's rows from these sources instead of reading them (codegen/rows/rows.py).
    """
    out = Lines()
    with kernel(out, entry_name("put", spec.reach), move_arguments("put", spec, rows)):
        out(*await_credits(spec.reach, spec.bounded))
        out("p = 0")
        with out.block("while p < num_puts:"):
            out(f"put = puts_ptr + p * {len(PUT)}")
            out(*columns("put", PUT, {name: name for name in PUT if spec.reach == "mixed" or name != "net"}))
            _destination(out, spec)
            _copy_lines(out, spec, home=False, program=rows)
            with out.block("if dst >= 0:"):
                with out.block("if last_of(counters_ptr + slot, programs):"):
                    _announce(out, spec)
            out("p += 1")
    made = "" if rows is None else f" computed from {len(rows.dims)} tensors"
    return module(f"Sends rows of {spec.width} {spec.dtype}{made}.", _constants(spec, rows) + out.text)


def collect_source(spec: MoveSpec) -> str:
    """The module of ``collect``: wait for each output that comes home and copy it to its heads and rows."""
    out = Lines()
    with kernel(out, entry_name("collect", spec.reach), move_arguments("collect", spec)):
        out("c = 0")
        with out.block("while c < num_collects:"):
            out(f"row_of_table = collects_ptr + c * {len(COLLECT)}")
            out(*columns("row_of_table", COLLECT, {name: name for name in COLLECT}))
            out(*wait_lines(spec.reach, spec.bounded, "signals + slot * 64", "epoch", "slot"))
            out("source = bank + at")
            _copy_lines(out, spec, home=True)
            out("c += 1")
    return module(f"Brings home rows of {spec.width} {spec.dtype}.", _constants(spec) + out.text)


def merge_source() -> str:
    """The module of ``merge``: partials (o1, l1), (o2, l2) over disjoint keys, into the first.

    o [rows, E] and l [rows] are fp32; l is the natural log-sum-exp. l = logaddexp(l1, l2),
    o = o1 exp(l1 - l) + o2 exp(l2 - l). A row without keys has l = -inf and o = 0.
    """
    out = Lines()
    out("@triton.jit")
    sizes = "E: tl.constexpr, E_BLOCK: tl.constexpr, R: tl.constexpr"
    with out.block(f"def merge(o1_ptr, l1_ptr, o2_ptr, l2_ptr, rows, {sizes}):"):
        out(
            "row = tl.program_id(0) * R + tl.arange(0, R)",
            "e = tl.arange(0, E_BLOCK)",
            "inside = row < rows",
            'l1 = tl.load(l1_ptr + row, mask=inside, other=float("-inf"))',
            'l2 = tl.load(l2_ptr + row, mask=inside, other=float("-inf"))',
            "top = tl.maximum(l1, l2)",
            'top = tl.where(top == float("-inf"), 0.0, top)  # no key on either side: weights are zero, not NaN',
            "w1 = tl.exp(l1 - top)",
            "w2 = tl.exp(l2 - top)",
            "total = w1 + w2",
            "scale = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))",
            "at = row.to(tl.int64)[:, None] * E + e[None, :]",
            "stays = inside[:, None] & (e < E)[None, :]",
            "o1 = tl.load(o1_ptr + at, mask=stays, other=0.0)",
            "o2 = tl.load(o2_ptr + at, mask=stays, other=0.0)",
            "tl.store(o1_ptr + at, o1 * (w1 * scale)[:, None] + o2 * (w2 * scale)[:, None], mask=stays)",
            "tl.store(l1_ptr + row, top + tl.log(total), mask=inside)",
        )
    return module("Merges partial attention results over disjoint keys.", out.text)


def move_arguments(name: str, spec: MoveSpec, rows: RowProgram | None = None) -> tuple[str, ...]:
    """Arguments of "put" (that computes ``rows``) or "collect", in order."""
    given = {"put": PUT_ARGUMENTS, "collect": COLLECT_ARGUMENTS}[name]
    if rows is not None:
        given = (*rows.arguments, *(entry for entry in given if not entry.startswith("x_")))
    return (*given, "report_ptr") if spec.bounded else given


def await_credits(reach: str, bounded: bool) -> list[str]:
    """Lines that wait until the bank is free on every rank of ``receivers_ptr`` (numbers of the job)."""
    waits = wait_lines(reach, bounded, "credit", "before", "-1 - receiver")
    return [
        "before = tl.maximum(epoch - 2, 0)  # NVSHMEM compares without a sign",
        f"credits = heap + tl.load(place_ptr + {PLACE.index('credits_at')})",
        "r = 0",
        "while r < num_receivers:",
        "    receiver = tl.load(receivers_ptr + r)",
        "    credit = credits + receiver * 64",
        *(f"    {line}" for line in waits),
        "    r += 1",
    ]


@contextmanager
def kernel(out: Lines, name: str, arguments: tuple[str, ...]) -> Iterator[None]:
    """A kernel's head and its first lines; what is added inside is its body."""
    integers = ", ".join(f'"{entry}"' for entry in arguments if entry in _INTEGERS)
    out(f"@triton.jit(do_not_specialize=[{integers}])")
    with out.block(f"def {name}({', '.join(arguments)}):"):
        out(
            "program = tl.program_id(0)",
            "programs = tl.num_programs(0)",
            *prologue(),
        )
        yield


def _constants(spec: MoveSpec, rows: RowProgram | None = None) -> str:
    block, lines = block_of(spec.width), spec.rows_at_a_time
    if rows is not None and not spec.lines:  # several values of a row are held at a time
        lines = 16 if block <= 128 else 8
    return f"W = tl.constexpr({spec.width})\nW_BLOCK = tl.constexpr({block})\nLINES = tl.constexpr({lines})\n\n\n"


def _destination(out: Lines, spec: MoveSpec) -> None:
    out("target = bank + at")
    if spec.reach == "nvshmem":
        with out.block("if dst >= 0:"):
            out("target = bank + staging")
        return
    with out.block("if dst >= 0:"):
        if spec.reach == "mixed":
            with out.block("if net != 0:"):
                out("target = bank + staging")
            with out.block("else:"):
                out(f"target = {heap_of('dst')} + bank_at + at")
        else:
            out(f"target = {heap_of('dst')} + bank_at + at")


def _copy_lines(out: Lines, spec: MoveSpec, home: bool, program: RowProgram | None = None) -> None:
    """Rows (batch, head, token) of W elements between a strided tensor, or what computes it, and a packed chunk."""
    element = ELEMENTS[spec.dtype]
    bytes_of_row = spec.width * (4 if spec.dtype == "fp32" else 2)
    packed = f"({'source' if home else 'target'}).to(tl.pointer_type({element}))"
    packed = f"tl.multiple_of({packed}, 16)" if bytes_of_row % 16 == 0 else packed
    out(f"packed_ptr = {packed}", "lines = batch * heads * rows", "w = tl.arange(0, W_BLOCK)")
    if program is not None:
        out(*program.head)
    out("line = program * LINES")
    with out.block("while line < lines:"):
        padded = "" if block_of(spec.width) == spec.width else " & (w < W)[None, :]"
        out(
            "i = line + tl.arange(0, LINES)",
            "bh = i // rows",
            "row = first_row + i % rows",
            f"inside = (i < lines)[:, None]{padded}",
        )
        dense = "packed_ptr + i[:, None] * W + w[None, :]"
        if program is not None:
            out("live = i < lines", "b = bh // heads", "h = first_head + bh % heads", *program.lines)
            out(f"tl.store({dense}, {program.value}.to({element}), mask=inside)", "line += programs * LINES")
            return
        name = "out" if home else "x"
        out(
            f"strided_ptr = {name}_ptr + ((bh // heads) * {name}_sb + (first_head + bh % heads) * {name}_sh"
            f" + row * {name}_sr)[:, None] + w[None, :]",
        )
        source, target = (dense, "strided_ptr") if home else ("strided_ptr", dense)
        out(f"tl.store({target}, tl.load({source}, mask=inside), mask=inside)", "line += programs * LINES")


def _announce(out: Lines, spec: MoveSpec) -> None:
    def by_store() -> None:
        out(f"raise_signal({heap_of('dst')} + signals_at + slot * 64, epoch)")

    def by_nvshmem() -> None:
        out(*put_signal("dst", "bank + staging", "bank_at + at", "nbytes", "signals_at + slot * 64"))

    if spec.reach == "peer":
        by_store()
    elif spec.reach == "nvshmem":
        by_nvshmem()
    else:
        with out.block("if net != 0:"):
            by_nvshmem()
        with out.block("else:"):
            by_store()
