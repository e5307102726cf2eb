"""Writes the small kernels around attention: put (cut, copy, send), collect (wait, copy home), merge (of partials)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sfcompile.codegen.kernel_spec import block_of
from sfcompile.codegen.kernel_tables import COLLECT, PUT
from sfcompile.codegen.kernel_text import Lines, columns, module

ELEMENTS = {"fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16"}
PUT_ARGUMENTS = (
    "x_ptr", "x_sb", "x_sh", "x_sr", "heaps_ptr", "puts_ptr", "counters_ptr", "rank", "bank_at", "signals_at", "epoch",
    "num_puts", "batch",
)  # fmt: skip
COLLECT_ARGUMENTS = (
    "out_ptr", "out_sb", "out_sh", "out_sr", "heaps_ptr", "collects_ptr", "rank", "bank_at", "signals_at", "epoch",
    "num_collects", "batch",
)  # fmt: skip
_INTEGERS = ("rank", "bank_at", "signals_at", "epoch", "num_puts", "num_collects", "batch")


@dataclass(frozen=True)
class MoveSpec:
    """What a put or collect kernel is specialised to.

    Attributes:
        dtype: "fp32", "fp16" or "bf16".
        width: elements of a row, 1 to 256.
        reach: as in KernelSpec.
        lines: rows that a program copies at a time.
    """

    dtype: str
    width: int
    reach: str = "peer"
    lines: int = 32


def put_source(spec: MoveSpec) -> str:
    """The module of ``put``: cut a tensor [B, H, L, W] into what each rank needs, copy, raise the signals.

    By load and store, rows go straight into the peers' slots. For NVSHMEM they are gathered in the staging area first,
    and the last program to finish sends the chunk as a whole. What stays here is copied into the bank as well.
    """
    out = Lines()
    with _kernel(out, "put", PUT_ARGUMENTS):
        out("p = 0")
        with out.block("while p < num_puts:"):
            out(f"put = puts_ptr + p * {len(PUT)}")
            out(*columns("put", PUT, {name: name for name in PUT if spec.reach == "mixed" or name != "net"}))
            _destination(out, spec)
            _copy_lines(out, spec, home=False)
            with out.block("if dst >= 0:"):
                with out.block("if last_of(counters_ptr + slot, programs):"):
                    _announce(out, spec)
            out("p += 1")
    return module(f"Sends rows of {spec.width} {spec.dtype}.", _constants(spec) + out.text)


def collect_source(spec: MoveSpec) -> str:
    """The module of ``collect``: wait for each output that comes home and copy it to its heads and rows."""
    out = Lines()
    with _kernel(out, "collect", COLLECT_ARGUMENTS):
        out("c = 0")
        with out.block("while c < num_collects:"):
            out(f"row_of_table = collects_ptr + c * {len(COLLECT)}")
            out(*columns("row_of_table", COLLECT, {name: name for name in COLLECT}))
            if spec.reach == "peer":
                out("wait_word(signals + slot * 64, epoch)")
            else:  # what a network card writes is ordered by NVSHMEM's own wait
                out("signal_wait_until(signals + slot * 64, CMP_GE, epoch)")
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
    with out.block("def merge(o1_ptr, l1_ptr, o2_ptr, l2_ptr, rows, E: tl.constexpr, E_BLOCK: tl.constexpr, R: tl.constexpr):"):
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


@contextmanager
def _kernel(out: Lines, name: str, arguments: tuple[str, ...]) -> Iterator[None]:
    integers = ", ".join(f'"{entry}"' for entry in arguments if entry in _INTEGERS)
    out(f"@triton.jit(do_not_specialize=[{integers}])")
    with out.block(f"def {name}({', '.join(arguments)}):"):
        out(
            "program = tl.program_id(0)",
            "programs = tl.num_programs(0)",
            "heap = tl.load(heaps_ptr + rank)",
            "bank = heap + bank_at",
            "signals = heap + signals_at",
        )
        yield


def _constants(spec: MoveSpec) -> str:
    return (
        f"W = tl.constexpr({spec.width})\nW_BLOCK = tl.constexpr({block_of(spec.width)})\n"
        f"LINES = tl.constexpr({spec.lines})\n\n\n"
    )


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
                out("target = tl.load(heaps_ptr + dst) + bank_at + at")
        else:
            out("target = tl.load(heaps_ptr + dst) + bank_at + at")


def _copy_lines(out: Lines, spec: MoveSpec, home: bool) -> None:
    """Rows (batch, head, token) of W elements between a strided tensor and a packed chunk."""
    element = ELEMENTS[spec.dtype]
    bytes_of_row = spec.width * (4 if spec.dtype == "fp32" else 2)
    packed = f"({'source' if home else 'target'}).to(tl.pointer_type({element}))"
    packed = f"tl.multiple_of({packed}, 16)" if bytes_of_row % 16 == 0 else packed
    out(f"packed_ptr = {packed}", "lines = batch * heads * rows", "w = tl.arange(0, W_BLOCK)")
    out("line = program * LINES")
    with out.block("while line < lines:"):
        padded = "" if block_of(spec.width) == spec.width else " & (w < W)[None, :]"
        out(
            "i = line + tl.arange(0, LINES)",
            "bh = i // rows",
            "row = first_row + i % rows",
            f"inside = (i < lines)[:, None]{padded}",
        )
        name = "out" if home else "x"
        out(
            f"strided_ptr = {name}_ptr + ((bh // heads) * {name}_sb + (first_head + bh % heads) * {name}_sh"
            f" + row * {name}_sr)[:, None] + w[None, :]",
        )
        dense = "packed_ptr + i[:, None] * W + w[None, :]"
        source, target = (dense, "strided_ptr") if home else ("strided_ptr", dense)
        out(f"tl.store({target}, tl.load({source}, mask=inside), mask=inside)", "line += programs * LINES")


def _announce(out: Lines, spec: MoveSpec) -> None:
    def by_store() -> None:
        out("raise_signal(tl.load(heaps_ptr + dst) + signals_at + slot * 64, epoch)")

    def by_nvshmem() -> None:
        out(
            "putmem_signal_nbi_block(",
            "    bank + at, bank + staging, nbytes, signals + slot * 64, epoch, SIGNAL_SET, dst.to(tl.int32)",
            ")",
        )

    if spec.reach == "peer":
        by_store()
    elif spec.reach == "nvshmem":
        by_nvshmem()
    else:
        with out.block("if net != 0:"):
            by_nvshmem()
        with out.block("else:"):
            by_store()
